"""moe_permute beside Megatron's permutation, Transformer Engine's where installed, and a copy of the same bytes.

    python -m r1mega_kernels.moe_permute.bench_moe_permute [--device cpu|cuda] [--json FILE]

Correctness first: results and gradients are compared with Megatron's in float32 before anything is timed. Providers take
turns on fresh random data. The floor is a copy that reads and writes together as many bytes as the operation must. On CPU
the unit is CPU time, which other work on the machine disturbs less, and the best of all turns counts; on a GPU the
median.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from r1mega_kernels.bench import Trial, main, seconds
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
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CHECKED_TOKENS = 300
"""By --tune: with several experts each more pairs than a program takes, and no multiple."""


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


def check(shape: tuple[int, int, int, int], device: str) -> float:
    """Largest difference from Megatron's results and gradients in float32, 0 on a CPU; -1 without Megatron."""
    if importlib.util.find_spec("megatron") is None:
        return -1.0
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


def with_backward(
    whole: Callable[[dict[str, Any]], tuple[Tensor, Tensor]],
) -> Callable[[dict[str, Any]], None]:
    def provider(inputs: dict[str, Any]) -> None:
        tokens_TD, probs_TE = (inputs[name].detach().requires_grad_() for name in ("tokens_TD", "probs_TE"))
        results = whole(inputs | {"tokens_TD": tokens_TD, "probs_TE": probs_TE})
        torch.autograd.backward(results, [x.detach() for x in results])

    return provider


def megatron_unpermute(inputs: dict[str, Any]) -> None:
    from megatron.core.transformer.moe import moe_utils

    moe_utils.unpermute(inputs["rows_ND"], inputs["order_N"], inputs["tokens_TD"].shape)


def copy_of(num_bytes: int, device: str) -> Callable[[dict[str, Any]], None]:
    """Reads and writes `num_bytes` together."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda inputs: target.copy_(source)  # type: ignore[return-value]


def operations(
    shape: tuple[int, int, int, int], device: str
) -> dict[str, dict[str, Callable[[dict[str, Any]], Any]]]:
    """Operation -> provider -> call."""
    num_tokens, num_per_token, _, hidden_size = shape
    token = hidden_size * DTYPES[device].itemsize
    moved = num_tokens * token * (1 + num_per_token)
    quantised = num_tokens * (token + num_per_token * (hidden_size + hidden_size // 128 * 4))
    table: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
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
        },
        "map to rows and back, +backward": {
            "floor": copy_of(4 * moved, device),
            "own": with_backward(whole_of_own),
        },
    }
    if importlib.util.find_spec("megatron") is not None:
        table["unpermute"]["Megatron"] = megatron_unpermute
        table["map to rows and back, +backward"]["Megatron"] = with_backward(whole_of_megatron)
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        from transformer_engine.pytorch.permutation import moe_permute as te_permute

        table["permute"]["Transformer Engine, map included"] = lambda x: te_permute(
            x["tokens_TD"], x["map_TE"], num_out_tokens=len(x["rows_ND"]), map_type="mask"
        )
    return table


def run(device: str, repeats: int = 9) -> list[dict]:
    """Prints the table and returns its rows."""
    print(f"moe_permute on {device}, {DTYPES[device]}, {torch.get_num_threads()} threads; milliseconds")
    print(f"{'T x K, E, D':24}{'operation':34}{'own':>9}{'floor':>9}{'floor/own':>11}  peers (ratio to own)")
    rows = []
    for shape in SHAPES[device]:
        error = check(shape, device)
        table = operations(shape, device)
        times: dict[tuple[str, str], list[float]] = {}
        for repeat in range(repeats + 1):  # the first turn warms up
            inputs = make_inputs(shape, device, DTYPES[device])
            for operation, providers in table.items():
                for name, call in providers.items():
                    start = seconds(device)
                    call(inputs)
                    if repeat:
                        times.setdefault((operation, name), []).append(1e3 * (seconds(device) - start))
        for operation, providers in table.items():
            summary = min if device == "cpu" else statistics.median
            found = {name: summary(times[operation, name]) for name in providers}
            floor = found.pop("floor", None)
            own = found.pop("own")
            row = {"shape": shape, "operation": operation, "device": device, "own_milliseconds": own}
            row |= {
                "floor_milliseconds": floor,
                "peers_milliseconds": found,
                "difference_from_megatron": error,
            }
            if device == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            rows.append(row)
            text = "".join(f"  {name} {t:.2f} ({t / own:.2f}x)" for name, t in found.items())
            of_floor = f"{floor:9.2f}{floor / own:11.2f}" if floor else " " * 20
            print(
                f"{f'{shape[0]} x {shape[1]}, {shape[2]}, {shape[3]}':24}{operation:34}{own:9.2f}{of_floor}{text}"
            )
        print(f"{'':24}largest difference from Megatron in float32: {error:.1e}")
    return rows


def check_definition(shape: tuple[int, int, int, int], device: str) -> None:
    """Every operation against reference.py on the first tokens, in the benchmark's dtype; raises AssertionError."""
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
    main(run, __doc__, SHAPES, trials=trials)
