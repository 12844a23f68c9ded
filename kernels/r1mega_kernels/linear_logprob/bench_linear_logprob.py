"""linear_logprob beside its peers and beside its floor, the bare matrix products.

    python -m r1mega_kernels.linear_logprob.bench_linear_logprob [--device cpu|cuda] [--json FILE]

Correctness first: results and gradients are compared with the float64 reference on the first rows before anything is timed,
the log-probs with the 2e-5 that is asked of them; every peer's log-prob error on the same rows stands beside its time.
Providers take turns on fresh random data. The floor of the forward is one product, of forward and backward three (logits,
d_hidden, d_weight): what nothing that computes the same can undercut. Megatron's, Liger's and cut-cross-entropy's give
log-probs without entropies, which is less work.
"""

from __future__ import annotations

import atexit
import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega_kernels.bench import Trial, compiled, main, of_peak, peers, take_turns
from r1mega_kernels.linear_logprob import linear_logprob, linear_logprob_reference

SHAPES = {
    "cpu": [(4096, 128, 64), (8192, 128, 128), (8192, 128, 256), (1024, 32768, 256)],
    "cuda": [(8192, 129280, 7168), (8192, 16160, 7168), (32768, 16160, 7168), (32768, 129280, 7168)],
}
"""T, V, D. cpu: tiny models, whose vocabulary is small; cuda: DeepSeek-V3's head, whole and its TP8 shard."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CHECKED_TOKENS = 300
"""More than a tile of any candidate, and no multiple of one."""
LOGPROB_ERROR = 2e-5
"""At most, against float64."""
Op = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden_TD, weight_VD, targets_T -> log-probs [T], or their sum where they are differentiable."""


def plain(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd users write: keeps logits and log-probs in the inputs' dtype."""
    logprobs_TV = F.linear(hidden_TD, weight_VD).log_softmax(dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T


@cache
def group_of_one(device: str) -> None:
    """Megatron's parallel state, in this process alone."""
    from megatron.core import parallel_state

    if not torch.distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(torch.distributed.destroy_process_group)
    parallel_state.initialize_model_parallel()


def megatron(device: str) -> Op:
    """Logits in the inputs' dtype, then Megatron's cross entropy over a vocabulary-parallel group: on a GPU its fused one."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group_of_one(device)

    def op(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        logits_T1V, targets_T1 = F.linear(hidden_TD, weight_VD)[:, None], targets_T[:, None]
        if device == "cpu":
            loss_T1 = tensor_parallel.vocab_parallel_cross_entropy(logits_T1V, targets_T1)
        else:
            group = parallel_state.get_tensor_model_parallel_group()
            loss_T1 = fused_vocab_parallel_cross_entropy(logits_T1V, targets_T1, group)
        return -loss_T1[:, 0]

    return op


def liger(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Makes its gradients in the forward, for a sum only."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    reduction = "sum" if hidden_TD.requires_grad else "none"
    return -liger_fused_linear_cross_entropy(hidden_TD, weight_VD, targets_T, reduction=reduction)


def cut_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """With its default filter, which leaves out gradients too small for the dtype."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden_TD, weight_VD, targets_T, reduction="none")


def differentiable_peers(device: str) -> dict[str, Op]:
    """Those whose log-probs any loss may follow: what is installed and runs on this device."""
    found: dict[str, Op] = {}
    if importlib.util.find_spec("megatron"):
        found["megatron"] = megatron(device)
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut_cross_entropy
    return found


def providers(device: str) -> dict[str, Op]:
    found: dict[str, Op] = {"own": only_logprobs(linear_logprob), "plain": only_logprobs(plain)}
    if device == "cuda":
        found["compiled"] = only_logprobs(compiled(plain))
        if importlib.util.find_spec("liger_kernel"):
            found["liger"] = liger
    return found | differentiable_peers(device)


def only_logprobs(op: Callable[..., tuple[Tensor, Tensor]]) -> Op:
    return lambda *inputs: op(*inputs)[0]


def make_inputs(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_rows, hidden_size = shape
    hidden_TD = torch.randn(num_tokens, hidden_size, device=device)
    weight_VD = torch.randn(num_rows, hidden_size, device=device) * 2 / math.sqrt(hidden_size)
    targets_T = torch.randint(0, num_rows, (num_tokens,), device=device)
    return (
        hidden_TD.to(DTYPES[device]).requires_grad_(),
        weight_VD.to(DTYPES[device]).requires_grad_(),
        targets_T,
    )


def check(shape: tuple[int, int, int], device: str) -> float:
    """Largest log-prob error against float64; raises where results or gradients are wrong."""
    hidden_TD, weight_VD, targets_T = make_inputs((CHECKED_TOKENS, *shape[1:]), device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    own_T, own_entropy_T = linear_logprob(hidden_TD, weight_VD, targets_T)
    exact_T, exact_entropy_T = linear_logprob_reference(exact[0], exact[1], targets_T)
    (own_T.sum() + own_entropy_T.sum()).backward()
    (exact_T.sum() + exact_entropy_T.sum()).backward()
    torch.testing.assert_close(own_T.double(), exact_T, rtol=0, atol=LOGPROB_ERROR)
    torch.testing.assert_close(own_entropy_T.double(), exact_entropy_T, rtol=1e-4, atol=1e-4)
    tolerance = 1e-4 if DTYPES[device] == torch.float32 else 2e-2
    for own, reference in zip((hidden_TD, weight_VD), exact):
        assert own.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(
            own.grad.double(),
            reference.grad,
            rtol=tolerance,
            atol=tolerance * float(reference.grad.abs().max()),
        )
    return float((own_T - exact_T).detach().abs().max())


def error_of(op: Op, shape: tuple[int, int, int], device: str) -> float:
    """Largest log-prob error against float64; NaN for a peer that fails (take_turns will say how)."""
    hidden_TD, weight_VD, targets_T = make_inputs((CHECKED_TOKENS, *shape[1:]), device)
    with torch.no_grad():
        exact_T, _ = linear_logprob_reference(hidden_TD.double(), weight_VD.double(), targets_T)
        try:
            return float((op(hidden_TD.detach(), weight_VD.detach(), targets_T) - exact_T).abs().max())
        except Exception:
            return math.nan


def forward_of(op: Op) -> Callable[[tuple[Tensor, Tensor, Tensor]], Any]:
    def provider(inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
        with torch.no_grad():
            return op(inputs[0].detach(), inputs[1].detach(), inputs[2])

    return provider


def backward_of(op: Op) -> Callable[[tuple[Tensor, Tensor, Tensor]], Any]:
    return lambda inputs: torch.autograd.grad(op(*inputs).sum(), inputs[:2])


def one_product(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        F.linear(inputs[0], inputs[1])


def three_products(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_TD, weight_VD, _ = inputs
    with torch.no_grad():
        logits_TV = F.linear(hidden_TD, weight_VD)
        torch.mm(logits_TV, weight_VD)
        torch.mm(logits_TV.T, hidden_TD)


def run(device: str, repeats: int = 9) -> list[dict]:
    """Prints the table and returns its rows."""
    print(f"linear_logprob on {device}, {DTYPES[device]}, {torch.get_num_threads()} threads, {peers()}")
    print(
        f"{'T':>7}{'V':>8}{'D':>6}{'pass':>10}  {'provider':18}{'ms':>10}{'of floor':>10}{'own is x':>10}{'MiB':>9}"
        f"{'error':>10}"
    )
    rows: list[dict] = []
    for shape in SHAPES[device]:
        ops = providers(device)
        errors = {name: error_of(op, shape, device) for name, op in ops.items()}
        errors["own"] = max(errors["own"], check(shape, device))
        for part, floor, wrap in (
            ("forward", one_product, forward_of),
            ("+backward", three_products, backward_of),
        ):
            calls = {"floor": floor} | {name: wrap(op) for name, op in ops.items()}
            found = take_turns(calls, partial(make_inputs, shape, device), device, repeats)
            for name, measured in found.items():
                row: dict[str, Any] = dict(zip(("tokens", "vocabulary", "hidden"), shape, strict=True))
                row |= {"pass": part, "device": device, "provider": name}
                row |= measured.row(found["own"], found["floor"]) | {
                    "largest_logprob_error": errors.get(name)
                }
                rows.append(row)
                error = f"{errors[name]:10.1e}" if name in errors else f"{'-':>10}"
                print(
                    f"{shape[0]:7}{shape[1]:8}{shape[2]:6}{part:>10}  {name:18}{row['milliseconds']:10.2f}"
                    f"{row['share_of_floor']:10.2f}{row['own_is_faster_by']:10.2f}"
                    f"{of_peak(measured.peak_mebibytes)}{error}"
                )
    return rows


def trials(device: str) -> list[Trial]:
    """The forward for both sizes of a vocabulary; the backward, which takes any of them a stretch at a time, for one."""
    from r1mega_kernels.linear_logprob import kernel

    whole, shard = SHAPES[device][:2]
    found = [
        Trial(
            kernel.PARTIALS,
            partial(check, shape, device),
            partial(make_inputs, shape, device),
            forward_of(only_logprobs(linear_logprob)),
        )
        for shape in (whole, shard)
    ]

    def graph() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs = make_inputs(whole, device)
        return linear_logprob(*inputs)[0].sum(), inputs[:2]

    def gradients(of: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(*of, retain_graph=True)

    return [*found, Trial(kernel.LOGIT_GRADIENT, partial(check, whole, device), graph, gradients)]


if __name__ == "__main__":
    main("linear_logprob", run, __doc__, SHAPES, trials=trials)
