"""moe_permute beside Megatron's permutation, Transformer Engine's where installed, and a copy of the same bytes.

    python -m r1mega_kernels.moe_permute.bench_moe_permute [--device cpu|cuda] [--json FILE]

Correctness first: every operation is compared with its definition in the benchmark's dtype, and results and gradients with
Megatron's in float32 where Megatron is there. Providers take turns on fresh random data. The floor is a copy that reads and
writes together as many bytes as the operation must.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from r1mega_kernels.bench import Trial, compiled, main, of_peak, peers, take_turns
from r1mega_kernels.fp8_block import quantize_reference
from r1mega_kernels.moe_permute import (
    indices_of,
    permute,
    permute_fp8,
    permute_values,
    reference,
    sort_by_expert,
    unpermute,
)

SHAPES = {
    "cpu": [(512, 3, 8, 64), (4096, 4, 16, 128), (4096, 8, 64, 512)],
    "cuda": [(4096, 8, 256, 7168), (32768, 8, 256, 7168)],
}
"""T, K, E, D. cuda: DeepSeek-V3's layer."""
WHOLE = "map to rows and back, +backward"
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CHECKED_TOKENS = 300
"""With several experts each more pairs than a program takes, and no multiple."""
Call = Callable[[dict[str, Any]], Any]


def make_inputs(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    num_tokens, num_per_token, num_experts, hidden_size = shape
    chosen_TK = torch.rand(num_tokens, num_experts, device=device).topk(num_per_token, dim=1).indices
    map_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=device).scatter_(
        1, chosen_TK, True
    )
    indices_TK = indices_of(map_TE, num_per_token)
    return {
        "map_TE": map_TE,
        "indices_TK": indices_TK,
        "permutation": sort_by_expert(indices_TK, num_experts),
        "probs_TE": torch.rand(num_tokens, num_experts, device=device) * map_TE,
        "tokens_TD": torch.randn(num_tokens, hidden_size, device=device).to(dtype),
        "rows_ND": torch.randn(num_tokens * num_per_token, hidden_size, device=device).to(dtype),
        "order_N": (chosen_TK.new_tensor(range(num_tokens))[:, None] + torch.zeros_like(chosen_TK)).flatten()[
            indices_TK.flatten().long().argsort(stable=True)
        ],
    }


def check(shape: tuple[int, int, int, int], device: str) -> float | None:
    """Largest difference from Megatron's results and gradients in float32, 0 on a CPU; None without Megatron."""
    if importlib.util.find_spec("megatron") is None:
        return None
    inputs = make_inputs((min(shape[0], 256), *shape[1:]), device, torch.float32)
    found = []
    for whole in (whole_of_megatron, whole_of_own):
        tokens_TD, probs_TE = (inputs[name].clone().requires_grad_() for name in ("tokens_TD", "probs_TE"))
        results = whole(inputs | {"tokens_TD": tokens_TD, "probs_TE": probs_TE})
        torch.autograd.backward(results, [2 * x.detach() for x in results])
        found.append([*(x.detach() for x in results), tokens_TD.grad, probs_TE.grad])
    error = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    assert error <= 1e-4 * max(float(x.abs().max()) for x in found[0]), f"off by {error}"
    return error


def whole_of_megatron(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """From the router's map to sorted rows and back."""
    from megatron.core.transformer.moe import moe_utils

    tokens_TD, map_TE = inputs["tokens_TD"], inputs["map_TE"]
    rows_ND, probs_N, order_N = moe_utils.permute(
        tokens_TD, map_TE, inputs["probs_TE"], len(inputs["rows_ND"])
    )
    return moe_utils.unpermute(rows_ND, order_N, tokens_TD.shape, routing_map=map_TE), probs_N


def whole_of_own(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    indices_TK = indices_of(inputs["map_TE"], inputs["indices_TK"].shape[1])
    permutation = sort_by_expert(indices_TK, inputs["map_TE"].shape[1])
    probs_N = permute_values(inputs["probs_TE"].gather(1, indices_TK.long()), permutation)
    return unpermute(permute(inputs["tokens_TD"], permutation), permutation), probs_N


def plain_unpermute(rows_ND: Tensor, row_of_pair_TK: Tensor) -> Tensor:
    """What one writes in torch, once a token's rows are known."""
    rows_TKD = rows_ND.index_select(0, row_of_pair_TK.flatten()).unflatten(0, row_of_pair_TK.shape)
    return rows_TKD.sum(dim=1, dtype=torch.float32).to(rows_ND.dtype)


def plain_permute_fp8(tokens_TD: Tensor, order_N: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_reference(tokens_TD.index_select(0, order_N), 1)


def whole_of_plain(
    tokens_TD: Tensor, probs_TE: Tensor, map_TE: Tensor, num_per_token: int
) -> tuple[Tensor, Tensor]:
    """Without a look at the values: each token's experts are the largest of its row of the map."""
    expert_TK = map_TE.to(torch.int8).topk(num_per_token, dim=1).indices.sort(dim=1).values
    pair_N = expert_TK.flatten().argsort(stable=True)
    row_of_pair_TK = pair_N.argsort().view_as(expert_TK)
    rows_ND = tokens_TD.index_select(0, pair_N // num_per_token)
    return plain_unpermute(rows_ND, row_of_pair_TK), probs_TE.gather(1, expert_TK).flatten()[pair_N]


def plain_whole_of(function: Callable) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor]]:
    return lambda x: function(x["tokens_TD"], x["probs_TE"], x["map_TE"], x["indices_TK"].shape[1])


def with_backward(whole: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]) -> Call:
    def provider(inputs: dict[str, Any]) -> Any:
        leaves = [inputs[name].detach().requires_grad_() for name in ("tokens_TD", "probs_TE")]
        results = whole(inputs | dict(zip(("tokens_TD", "probs_TE"), leaves, strict=True)))
        return torch.autograd.grad(results, leaves, [x.detach() for x in results])

    return provider


def megatron_permute(inputs: dict[str, Any]) -> Any:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.permute(inputs["tokens_TD"], inputs["map_TE"], None, len(inputs["rows_ND"]))


def megatron_unpermute(inputs: dict[str, Any]) -> Tensor:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.unpermute(inputs["rows_ND"], inputs["order_N"], inputs["tokens_TD"].shape)


def transformer_engine() -> dict[str, Call]:
    """Operation -> its fused kernels. Both permutes include the map of rows, unpermute does not."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.permutation import moe_permute, moe_unpermute
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        amax_epsilon=1e-4,
        force_pow_2_scales=False,
        block_scaling_dim=1,
    )

    def permuted(x: dict[str, Any], tokens_TD: Any) -> tuple[Any, Tensor]:
        return moe_permute(tokens_TD, x["map_TE"], num_out_tokens=len(x["rows_ND"]), map_type="mask")

    def unpermuted(x: dict[str, Any], rows_ND: Tensor, row_id_map: Tensor) -> Tensor:
        return moe_unpermute(rows_ND, row_id_map, restore_shape=x["tokens_TD"].shape, map_type="mask")

    def whole(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
        from transformer_engine.pytorch.permutation import moe_permute_with_probs

        rows_ND, probs_N, row_id_map = moe_permute_with_probs(
            x["tokens_TD"], x["probs_TE"], x["map_TE"], num_out_tokens=len(x["rows_ND"])
        )
        return unpermuted(x, rows_ND, row_id_map), probs_N

    return {
        "permute": lambda x: permuted(x, x["tokens_TD"]),
        "permute + fp8": lambda x: permuted(x, quantizer(x["tokens_TD"])),
        "unpermute": lambda x: unpermuted(x, x["rows_ND"], x["te_map"]),
        WHOLE: with_backward(whole),
    }


def copy_of(num_bytes: int, device: str) -> Call:
    """Reads and writes `num_bytes` together."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda inputs: target.copy_(source)  # type: ignore[return-value]


def operations(shape: tuple[int, int, int, int], device: str) -> dict[str, dict[str, Call]]:
    """Operation -> provider -> call."""
    num_tokens, num_per_token, _, hidden_size = shape
    token = hidden_size * DTYPES[device].itemsize
    moved = num_tokens * token * (1 + num_per_token)
    quantised = num_tokens * (token + num_per_token * (hidden_size + hidden_size // 128 * 4))
    table: dict[str, dict[str, Call]] = {
        "slots": {"own": lambda x: sort_by_expert(x["indices_TK"], x["map_TE"].shape[1])},
        "permute": {
            "floor": copy_of(moved, device),
            "own": lambda x: permute(x["tokens_TD"], x["permutation"]),
            "index_select": lambda x: x["tokens_TD"].index_select(0, x["order_N"]),
        },
        "permute + fp8": {
            "floor": copy_of(quantised, device),
            "own": lambda x: permute_fp8(x["tokens_TD"], x["permutation"]),
        },
        "unpermute": {
            "floor": copy_of(moved, device),
            "own": lambda x: unpermute(x["rows_ND"], x["permutation"]),
            "plain": lambda x: plain_unpermute(x["rows_ND"], x["permutation"].row_of_pair_TK),
        },
        WHOLE: {
            "floor": copy_of(4 * moved, device),
            "own": with_backward(whole_of_own),
            "plain": with_backward(plain_whole_of(whole_of_plain)),
        },
    }
    if hidden_size % 128 == 0:
        table["permute + fp8"]["plain"] = lambda x: plain_permute_fp8(x["tokens_TD"], x["order_N"])
    if importlib.util.find_spec("megatron") is not None:
        table["permute"]["megatron, map included"] = megatron_permute
        table["unpermute"]["megatron"] = megatron_unpermute
        table[WHOLE]["megatron"] = with_backward(whole_of_megatron)
    if device == "cuda":
        quick = [compiled(function) for function in (plain_permute_fp8, plain_unpermute, whole_of_plain)]
        table["permute + fp8"]["compiled"] = lambda x: quick[0](x["tokens_TD"], x["order_N"])
        table["unpermute"]["compiled"] = lambda x: quick[1](x["rows_ND"], x["permutation"].row_of_pair_TK)
        table[WHOLE]["compiled"] = with_backward(plain_whole_of(quick[2]))
        if importlib.util.find_spec("transformer_engine") is not None:
            for operation, call in transformer_engine().items():
                table[operation]["transformer engine"] = call
    return table


def inputs_of_turn(shape: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    inputs = make_inputs(shape, device, DTYPES[device])
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        from transformer_engine.pytorch.permutation import moe_permute

        rows = {"num_out_tokens": len(inputs["rows_ND"]), "map_type": "mask"}
        inputs["te_map"] = moe_permute(inputs["tokens_TD"], inputs["map_TE"], **rows)[1]
    return inputs


def run(device: str, repeats: int = 9) -> list[dict]:
    """Prints the table and returns its rows."""
    print(f"moe_permute on {device}, {DTYPES[device]}, {torch.get_num_threads()} threads, {peers()}")
    print(
        f"{'T x K, E, D':22}{'operation':33}{'provider':24}{'ms':>9}{'of floor':>10}{'own is x':>10}{'MiB':>9}{'error':>10}"
    )
    rows: list[dict] = []
    for shape in SHAPES[device]:
        errors = check_definition(shape, device)
        from_megatron = check(shape, device)
        for operation, providers in operations(shape, device).items():
            found = take_turns(providers, partial(inputs_of_turn, shape, device), device, repeats)
            for name, measured in found.items():
                row: dict[str, Any] = {
                    "shape": shape,
                    "operation": operation,
                    "device": device,
                    "provider": name,
                }
                row |= measured.row(found["own"], found.get("floor"))
                if name == "own":
                    row |= {"largest_error": errors[operation], "difference_from_megatron": from_megatron}
                rows.append(row)
                of_floor = f"{row['share_of_floor']:10.2f}" if "floor" in found else f"{'-':>10}"
                error = f"{errors[operation]:10.1e}" if name == "own" else f"{'-':>10}"
                print(
                    f"{f'{shape[0]} x {shape[1]}, {shape[2]}, {shape[3]}':22}{operation:33}{name:24}"
                    f"{row['milliseconds']:9.2f}{of_floor}{row['own_is_faster_by']:10.2f}"
                    f"{of_peak(measured.peak_mebibytes)}{error}"
                )
        if from_megatron is not None:
            print(f"{'':22}largest difference from Megatron in float32: {from_megatron:.1e}")
    return rows


def check_definition(shape: tuple[int, int, int, int], device: str) -> dict[str, float]:
    """Every operation against reference.py on the first tokens, in the benchmark's dtype; raises AssertionError.

    Operation -> largest difference from the definition, in float64 where sums round.
    """
    inputs = make_inputs((CHECKED_TOKENS, *shape[1:]), device, DTYPES[device])
    tokens_TD, rows_ND, indices_TK = inputs["tokens_TD"], inputs["rows_ND"], inputs["indices_TK"]
    permutation = inputs["permutation"]
    places = permutation.row_of_pair_TK, permutation.pair_of_row_N
    weights_TK = torch.rand(indices_TK.shape, device=device)
    slots = (indices_TK, shape[2], 1, indices_TK.numel())
    backward = (tokens_TD, rows_ND, permutation.row_of_pair_TK, permutation.pair_of_row_N, weights_TK)
    for own, expected in (
        (indices_TK, reference.indices(inputs["map_TE"], shape[1])),
        ((*places, permutation.tokens_per_expert_E), reference.slots(*slots)),
        (permute(tokens_TD, permutation), reference.permute(tokens_TD, *places)),
        (
            _as_numbers(permute_fp8(tokens_TD, permutation)),
            _as_numbers(reference.permute_fp8(tokens_TD, *places)),
        ),
    ):
        torch.testing.assert_close(own, expected, rtol=0, atol=0)
    for weights in (None, weights_TK):
        own, expected = (
            unpermute(rows_ND, permutation, weights),
            reference.unpermute(rows_ND, places[0], weights),
        )
        torch.testing.assert_close(own, expected)
    own, expected = (
        torch.ops.r1mega.moe_unpermute_backward(*backward),
        reference.unpermute_backward(*backward),
    )
    torch.testing.assert_close(own[0], expected[0])
    torch.testing.assert_close(own[1], expected[1], rtol=1e-4, atol=1e-3)
    exact_TD = reference.unpermute(rows_ND.double(), places[0], None)
    rounding = float((unpermute(rows_ND, permutation).double() - exact_TD).abs().max())
    all_of_it_TD = tokens_TD.double() * shape[1]
    there_and_back = float((whole_of_own(inputs)[0].double() - all_of_it_TD).abs().max())
    return {"slots": 0.0, "permute": 0.0, "permute + fp8": 0.0, "unpermute": rounding, WHOLE: there_and_back}


def _as_numbers(quantised: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return quantised[0].view(torch.uint8), quantised[1]


def trials(device: str) -> list[Trial]:
    """Every kernel for the largest shape."""
    from r1mega_kernels.moe_permute import kernel

    shape = SHAPES[device][-1]
    right = partial(check_definition, shape, device)
    make = partial(make_inputs, shape, device, DTYPES[device])

    def weighted_backward(x: dict[str, Any]) -> None:
        places = x["permutation"].row_of_pair_TK, x["permutation"].pair_of_row_N
        weights_TK = x["probs_TE"][:, : shape[1]].contiguous()
        torch.ops.r1mega.moe_unpermute_backward(x["tokens_TD"], x["rows_ND"], *places, weights_TK)

    calls: list[tuple[Any, Callable[[dict[str, Any]], Any]]] = [
        (kernel.INDICES, lambda x: indices_of(x["map_TE"], shape[1])),
        (kernel.SLOTS, lambda x: sort_by_expert(x["indices_TK"], shape[2])),
        (kernel.PERMUTE, lambda x: permute(x["tokens_TD"], x["permutation"])),
        (kernel.PERMUTE_FP8, lambda x: permute_fp8(x["tokens_TD"], x["permutation"])),
        (kernel.UNPERMUTE, lambda x: unpermute(x["rows_ND"], x["permutation"])),
        (kernel.UNPERMUTE_BACKWARD, weighted_backward),
    ]
    return [Trial(tunable, right, make, call) for tunable, call in calls]


if __name__ == "__main__":
    main("moe_permute", run, __doc__, SHAPES, trials=trials)
