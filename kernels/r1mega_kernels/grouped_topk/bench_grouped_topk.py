"""grouped_topk beside plain torch, Megatron's gate and its floor, the memory that must move.

    python -m r1mega_kernels.grouped_topk.bench_grouped_topk [--device cpu|cuda] [--json FILE]

Correctness first: choices, weights and gradients, of Triton and of CUDA C++ where both are there, are compared with the float64
reference before anything is timed. Providers take turns on fresh random data. The floor: the forward reads the logits and
writes K weights and experts a token, the backward writes the logits' gradient and reads what was chosen; bytes over the speed
of a copy of the same tensor in the same run. "own is x": a loss is reported like a win.
--tune also finds out whether CUDA C++ or Triton serves this GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from r1mega_kernels.bench import Measured, Trial, compiled, main, of_peak, peers, take_turns
from r1mega_kernels.grouped_topk import cuda, grouped_topk

SHAPES = {
    "cpu": [(8192, 8, 2, 4, 2), (2048, 256, 8, 8, 4)],
    "cuda": [(4096, 256, 8, 8, 4), (32768, 256, 8, 8, 4)],
}
"""T, E, K, groups, kept groups: the tiny models' gate and DeepSeek-V3's."""
CHECKED_TOKENS = 512
Gate = Callable[[Tensor, Tensor], Tensor]
"""Logits [T, E] and bias [E] -> weights, [T, K] or dense."""


def own(logits_TE: Tensor, bias_E: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return grouped_topk(
        logits_TE, bias_E, shape[2], num_groups=shape[3], kept_groups=shape[4], scale=2.5
    ).weight_TK


def of_module(logits_TE: Tensor, bias_E: Tensor, *, module: ModuleType, shape: tuple[int, ...]) -> Tensor:
    return _OfModule.apply(logits_TE, bias_E, module, shape[2:])


class _OfModule(torch.autograd.Function):
    """One implementation, without the choice between them."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, bias_E: Tensor, module: ModuleType, sizes: tuple) -> Tensor:
        none = (None, None, 0, None, None, None)
        weight_TK, expert_TK, *_ = module.forward(logits_TE, bias_E, *sizes, True, 2.5, *none)
        ctx.save_for_backward(logits_TE, expert_TK)
        ctx.module = module
        return weight_TK

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TE, expert_TK = ctx.saved_tensors
        gradient_TE = ctx.module.backward(grad_TK.contiguous(), None, logits_TE, expert_TK, None, True, 2.5)
        return gradient_TE, None, None, None


def plain(logits_TE: Tensor, bias_E: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """What one writes in torch: topk for groups and experts, dense weights."""
    _, _, top_k, num_groups, kept = shape
    score_TE = logits_TE.sigmoid()
    with torch.no_grad():
        biased_TGE = (score_TE + bias_E).unflatten(1, (num_groups, -1))
        group_TG = biased_TGE.topk(min(2, biased_TGE.shape[-1]), dim=-1).values.sum(dim=-1)
        kept_TK = group_TG.topk(kept, dim=-1, sorted=False).indices
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, kept_TK, False)
        biased_TE = biased_TGE.masked_fill(dropped_TG[..., None], float("-inf")).flatten(1)
        chosen_TK = biased_TE.topk(top_k, dim=-1, sorted=False).indices
    weight_TK = score_TE.gather(1, chosen_TK)
    weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
    return torch.zeros_like(score_TE).scatter(1, chosen_TK, weight_TK)


def megatron(logits_TE: Tensor, bias_E: Tensor, *, shape: tuple[int, ...], fused: bool) -> Tensor:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    return topk_routing_with_score_function(
        logits_TE,
        shape[2],
        num_groups=shape[3],
        group_topk=shape[4],
        scaling_factor=2.5,
        score_function="sigmoid",
        expert_bias=bias_E,
        fused=fused,
    )[0]


def providers(shape: tuple[int, ...], device: str) -> dict[str, Gate]:
    found: dict[str, Gate] = {"own": partial(own, shape=shape), "plain": partial(plain, shape=shape)}
    if importlib.util.find_spec("megatron"):
        found["megatron"] = partial(megatron, shape=shape, fused=False)
    if device == "cuda":
        from r1mega_kernels.grouped_topk import kernel

        found["triton"] = partial(of_module, module=kernel, shape=shape)
        if cuda.load():
            found["cuda"] = partial(of_module, module=cuda, shape=shape)
        found["compiled"] = compiled(partial(plain, shape=shape))
        if importlib.util.find_spec("transformer_engine"):
            found["transformer engine"] = partial(megatron, shape=shape, fused=True)
    return found


def make_inputs(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    logits_TE = torch.randn(shape[:2], device=device) * 2
    return logits_TE.requires_grad_(), torch.randn(shape[1], device=device) * 0.01


def sequences(shape: tuple[int, ...], device: str, num_sequences: int) -> dict[str, Any]:
    """grouped_topk's arguments for the balance loss; none for 0 sequences."""
    sequence_T = torch.arange(shape[0], device=device) * num_sequences // shape[0]
    return {"sequence_T": sequence_T, "num_sequences": num_sequences} if num_sequences else {}


def check(shape: tuple[int, ...], device: str, num_sequences: int = 0) -> float:
    """Largest error of weights and gradients against float64 where the choice is the same; raises where it is wrong."""
    shape = (CHECKED_TOKENS, *shape[1:])
    logits_TE, bias_E = make_inputs(shape, device)
    sizes = {"top_k": shape[2], "num_groups": shape[3], "kept_groups": shape[4], "scale": 2.5}
    routing = grouped_topk(logits_TE, bias_E, **sizes, **sequences(shape, device, num_sequences))  # type: ignore[arg-type]
    exact_TE = logits_TE.detach().cpu().double().requires_grad_()
    exact = grouped_topk(exact_TE, bias_E.cpu(), **sizes, **sequences(shape, "cpu", num_sequences))  # type: ignore[arg-type]
    same_T = (routing.expert_TK.cpu() == exact.expert_TK).all(dim=-1)
    assert same_T.double().mean() > 0.98, f"{int((~same_T).sum())} of {len(same_T)} tokens chose otherwise"
    grad_TK = torch.randn(shape[0], shape[2], dtype=torch.float64)
    grad_SE = torch.randn(exact.share_SE.shape, dtype=torch.float64)
    exact_loss = (exact.weight_TK * grad_TK).sum() + (exact.share_SE * grad_SE).sum()
    loss = (routing.weight_TK * grad_TK.to(routing.weight_TK)).sum()
    loss = loss + (routing.share_SE * grad_SE.to(routing.share_SE)).sum()
    (exact_TE_grad,) = torch.autograd.grad(exact_loss, exact_TE)
    (grad_TE,) = torch.autograd.grad(loss, logits_TE)
    pairs = ((routing.weight_TK, exact.weight_TK), (grad_TE, exact_TE_grad))
    error = max(float((a.detach().cpu().double() - b)[same_T].abs().max()) for a, b in pairs)
    assert error < 1e-5, f"error {error}"
    return error


def check_all(shape: tuple[int, ...], device: str) -> dict[str, float]:
    """Largest error of our providers: of what serves, and of both implementations on a GPU."""
    errors = {"own": check(shape, device)}
    if device == "cuda":
        for name in ("triton", *["cuda"] * cuda.load()):
            with cuda.IMPLEMENTATION.forced({"implementation": name}):
                errors[name] = check(shape, device)
    return errors


def measure(shape: tuple[int, ...], device: str, repeats: int) -> dict[str, dict[str, Measured]]:
    """Pass -> provider -> its time. The floor is one of them."""
    tokens, experts, top_k = shape[:3]
    gates = providers(shape, device)

    def copy(inputs: tuple[Tensor, ...]) -> None:
        inputs[2].copy_(inputs[0].detach())

    def inputs_and_copy() -> tuple[Tensor, ...]:
        logits_TE, bias_E = make_inputs(shape, device)
        return logits_TE, bias_E, torch.empty_like(logits_TE)

    def graphs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        logits_TE, bias_E = make_inputs(shape, device)
        weights = {name: gates[name](logits_TE, bias_E) for name in forward if name != "floor"}
        return {name: (weight, logits_TE, torch.randn_like(weight)) for name, weight in weights.items()}

    forwards: dict[str, Callable] = {"floor": copy}
    forwards |= {name: partial(lambda gate, inputs: gate(*inputs[:2]), gate) for name, gate in gates.items()}
    forward = take_turns(forwards, inputs_and_copy, device, repeats)
    backwards = {
        name: partial(lambda name, graphs: torch.autograd.grad(*graphs[name]), name)
        for name in forward
        if name != "floor"
    }
    backward = take_turns(backwards, graphs, device, repeats)
    per_byte = forward["floor"].milliseconds / (8 * tokens * experts)
    for found, bytes_a_choice in ((forward, 12), (backward, 16)):
        found["floor"] = Measured(per_byte * tokens * (4 * experts + bytes_a_choice * top_k), None)
    return {"forward": forward, "backward": backward}


def run(device: str, repeats: int = 15) -> list[dict]:
    """Prints the table and returns its rows."""
    print(
        f"grouped_topk on {device}, float32, {torch.get_num_threads()} threads, {peers()}\n"
        f"{'T':>7}{'E':>5}{'K':>4}{'pass':>10}  {'provider':20}{'us':>10}{'of floor':>10}{'own is x':>10}{'MiB':>9}"
        f"{'error':>10}"
    )
    rows: list[dict] = []
    for shape in SHAPES[device]:
        errors = check_all(shape, device)
        for part, found in measure(shape, device, repeats).items():
            for name, measured in found.items():
                row: dict[str, Any] = dict(zip(("tokens", "experts", "top_k"), shape[:3], strict=True))
                row |= {"pass": part, "device": device, "provider": name}
                row |= measured.row(found["own"], found["floor"]) | {"largest_error": errors.get(name)}
                rows.append(row)
                error = f"{errors[name]:10.1e}" if name in errors else f"{'-':>10}"
                print(
                    f"{shape[0]:7}{shape[1]:5}{shape[2]:4}{part:>10}  {name:20}{1e3 * row['milliseconds']:10.1f}"
                    f"{row['share_of_floor']:10.2f}{row['own_is_faster_by']:10.2f}"
                    f"{of_peak(measured.peak_mebibytes)}{error}"
                )
    return rows


def trials(device: str) -> list[Trial]:
    """Triton's kernels for the largest shape, and then, with what these turned out to like best, CUDA C++ against them."""
    from r1mega_kernels.grouped_topk import kernel

    shape = SHAPES[device][-1]
    sizes: dict[str, Any] = {"num_groups": shape[3], "kept_groups": shape[4], "scale": 2.5}

    def graph(num_sequences: int) -> tuple[Tensor, Tensor]:
        logits_TE, bias_E = make_inputs(shape, device)
        of_sequences = sequences(shape, device, num_sequences)
        routing = grouped_topk(logits_TE, bias_E, shape[2], **sizes, **of_sequences)
        return routing.weight_TK.sum() + routing.share_SE.sum(), logits_TE

    def gradient(of: tuple[Tensor, Tensor]) -> None:
        torch.autograd.grad(*of, retain_graph=True)

    def forward(inputs: tuple[Tensor, Tensor]) -> Tensor:
        return own(inputs[0].detach(), inputs[1], shape=shape)

    def both(inputs: tuple[Tensor, Tensor]) -> None:
        torch.autograd.grad(own(*inputs, shape=shape).sum(), inputs[0])

    make, right = partial(make_inputs, shape, device), partial(check, shape, device)
    found = [
        Trial(kernel.FORWARD, _on_triton(right), make, _on_triton(forward)),
        Trial(kernel.BACKWARD, _on_triton(right), partial(graph, 0), _on_triton(gradient)),
        Trial(
            kernel.BACKWARD_OF_SHARES,
            _on_triton(partial(right, num_sequences=4)),
            partial(graph, 4),
            _on_triton(gradient),
        ),
    ]
    if cuda.load():
        return [*found, Trial(cuda.IMPLEMENTATION, right, make, both)]
    print("the CUDA C++ kernels were not built: Triton serves")
    return found


def _on_triton(call: Callable) -> Callable:
    def wrapped(*arguments: Any) -> Any:
        with cuda.IMPLEMENTATION.forced({"implementation": "triton"}):
            return call(*arguments)

    return wrapped


if __name__ == "__main__":
    main("grouped_topk", run, __doc__, SHAPES, repeats=15, trials=trials)
