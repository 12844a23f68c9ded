"""moe_permute as Triton kernels, for NVIDIA GPUs (written for sm_90).

Never run on a GPU so far: checked against the reference in Triton's interpreter (float32) and compiled ahead of time to
sm_90 (r1mega_kernels.aot).

- slots: each program counts the experts in its stretch of pairs; a scan over stretches and one over experts give every
  stretch its first row of each expert; inside a stretch a pair's rank is the number of equal experts before it. No
  slot depends on the order in which programs run.
- permute reads each token once and writes it K times; unpermute reads each row once and writes each token once.

Dims: T tokens, K experts of a token, P = T K pairs, S stretches of pairs, E experts, D hidden, N rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega_kernels.aot import AheadOfTime
from r1mega_kernels.fp8_block.kernel import magnitude, scale_of
from r1mega_kernels.fp8_block.reference import BLOCK, LARGEST, SMALLEST_AMAX
from r1mega_kernels.tuning import Parameters, Tunable, shape_class

INDICES = Tunable(
    "moe_permute.indices",
    tuple(
        {"BLOCK_T": tokens, "num_warps": warps}
        for tokens, warps in ((16, 4), (4, 1), (8, 2), (8, 4), (16, 8), (32, 8))
    ),
)
SLOTS = Tunable(
    "moe_permute.slots",
    tuple(
        {"STRETCH": stretch, "COMPARED": compared, "num_warps": warps}
        for stretch, compared, warps in (
            *((256, 32, 8), (128, 32, 4), (128, 64, 4), (256, 16, 4), (256, 16, 8), (256, 64, 8)),
            *((512, 16, 8), (512, 32, 8), (512, 32, 16)),
        )
    ),
)
"""STRETCH: pairs of one program; COMPARED: as many of them at a time are compared with all the others."""
SCANNED = 1024
COLUMNS: tuple[Parameters, ...] = tuple(
    {"HIDDEN": hidden, "num_warps": warps}
    for hidden, warps in ((1024, 4), (512, 2), (1024, 2), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
)
"""HIDDEN: columns of a row that a program moves at a time; with 1024 and 4 warps 8 bfloat16 (16 bytes) a thread."""
PERMUTE = Tunable("moe_permute.permute", COLUMNS)
PERMUTE_FP8 = Tunable("moe_permute.permute_fp8", COLUMNS)
UNPERMUTE = Tunable("moe_permute.unpermute", COLUMNS)
UNPERMUTE_BACKWARD = Tunable("moe_permute.unpermute_backward", COLUMNS)
FILLED_ROWS = 64
FILLED_COLUMNS = 1024


def candidates() -> tuple[Tunable, ...]:
    return INDICES, SLOTS, PERMUTE, PERMUTE_FP8, UNPERMUTE, UNPERMUTE_BACKWARD


def indices(map_TE: Tensor, num_per_token: int) -> Tensor:
    num_tokens, num_experts = map_TE.shape
    indices_TK = map_TE.new_full((num_tokens, num_per_token), -1, dtype=torch.int32)
    blocks = INDICES.on(map_TE.device, shape_class(E=num_experts))
    if map_TE.numel():
        with torch.cuda.device_of(map_TE):
            indices_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
                map_TE.view(torch.uint8), indices_TK, num_tokens, num_experts,
                K=num_per_token, BLOCK_E=triton.next_power_of_2(num_experts), **blocks,
            )  # fmt: skip
    return indices_TK


def slots(
    indices_TK: Tensor, num_experts: int, multiple: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = indices_TK.numel()
    blocks = SLOTS.on(indices_TK.device, shape_class(E=num_experts))
    stretch = blocks["STRETCH"]
    num_stretches = triton.cdiv(num_pairs, stretch)
    row_of_pair_TK = torch.empty_like(indices_TK, dtype=torch.int32)
    pair_of_row_N = indices_TK.new_full((num_rows,), -1, dtype=torch.int32)
    count_E = indices_TK.new_zeros(num_experts, dtype=torch.int64)
    if num_pairs == 0:
        return row_of_pair_TK, pair_of_row_N, count_E
    count_ES = indices_TK.new_empty(num_experts, num_stretches, dtype=torch.int32)
    start_E = indices_TK.new_empty(num_experts, dtype=torch.int32)
    experts = triton.next_power_of_2(num_experts)
    with torch.cuda.device_of(indices_TK):
        count_kernel[(num_stretches,)](
            indices_TK,
            count_ES,
            num_pairs,
            num_experts,
            num_stretches,
            STRETCH=stretch,
            BLOCK_E=experts,
            num_warps=4,
        )
        scan_kernel[(num_experts,)](count_ES, count_E, num_stretches, BLOCK=SCANNED, num_warps=4)
        start_kernel[(1,)](count_E, start_E, num_experts, multiple, BLOCK_E=experts, num_warps=4)
        slot_kernel[(num_stretches,)](
            indices_TK, count_ES, start_E, row_of_pair_TK, pair_of_row_N, num_pairs, num_experts,
            num_stretches, num_rows,
            **blocks,
        )  # fmt: skip
    return row_of_pair_TK, pair_of_row_N, count_E


def permute(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    (num_tokens, hidden_size), num_rows = tokens_TD.shape, len(pair_of_row_N)
    rows_ND = tokens_TD.new_empty(num_rows, hidden_size)
    if rows_ND.numel() == 0:
        return rows_ND
    with torch.cuda.device_of(tokens_TD):
        if num_tokens:
            permute_kernel[(num_tokens,)](
                tokens_TD,
                row_of_pair_TK,
                rows_ND,
                hidden_size,
                K=row_of_pair_TK.shape[1],
                **PERMUTE.on(tokens_TD.device, shape_class(tokens_TD.dtype, D=hidden_size)),
            )
        _fill_padding(rows_ND, pair_of_row_N, 0.0)
    return rows_ND


def permute_fp8(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> tuple[Tensor, Tensor]:
    (num_tokens, hidden_size), num_rows = tokens_TD.shape, len(pair_of_row_N)
    rows_ND = tokens_TD.new_empty(num_rows, hidden_size, dtype=torch.float8_e4m3fn)
    scale_NQ = tokens_TD.new_empty(num_rows, triton.cdiv(hidden_size, BLOCK), dtype=torch.float32)
    if rows_ND.numel() == 0:
        return rows_ND, scale_NQ
    with torch.cuda.device_of(tokens_TD):
        if num_tokens:
            blocks = PERMUTE_FP8.on(tokens_TD.device, shape_class(tokens_TD.dtype, D=hidden_size))
            permute_fp8_kernel[(num_tokens,)](
                tokens_TD, row_of_pair_TK, rows_ND, scale_NQ, hidden_size, scale_NQ.shape[1],
                K=row_of_pair_TK.shape[1], BLOCK=BLOCK, LARGEST=LARGEST, SMALLEST_AMAX=SMALLEST_AMAX, **blocks,
            )  # fmt: skip
        _fill_padding(rows_ND.view(torch.uint8), pair_of_row_N, 0)
        _fill_padding(scale_NQ, pair_of_row_N, SMALLEST_AMAX / LARGEST)
    return rows_ND, scale_NQ


def unpermute(rows_ND: Tensor, row_of_pair_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    num_tokens, hidden_size = len(row_of_pair_TK), rows_ND.shape[1]
    tokens_TD = rows_ND.new_empty(num_tokens, hidden_size)
    blocks = UNPERMUTE.on(rows_ND.device, shape_class(rows_ND.dtype, D=hidden_size))
    if tokens_TD.numel():
        with torch.cuda.device_of(rows_ND):
            unpermute_kernel[(num_tokens,)](
                rows_ND, row_of_pair_TK, rows_ND if weights_TK is None else weights_TK, tokens_TD, hidden_size,
                K=row_of_pair_TK.shape[1], WEIGHTED=weights_TK is not None, **blocks,
            )  # fmt: skip
    return tokens_TD


def unpermute_backward(
    d_tokens_TD: Tensor, rows_ND: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    num_tokens, hidden_size = d_tokens_TD.shape
    d_rows_ND, d_weights_TK = torch.empty_like(rows_ND), torch.zeros_like(weights_TK)
    blocks = UNPERMUTE_BACKWARD.on(rows_ND.device, shape_class(rows_ND.dtype, D=hidden_size))
    with torch.cuda.device_of(rows_ND):
        if d_tokens_TD.numel():
            unpermute_backward_kernel[(num_tokens,)](
                d_tokens_TD, rows_ND, row_of_pair_TK, weights_TK, d_rows_ND, d_weights_TK, hidden_size,
                K=row_of_pair_TK.shape[1], **blocks,
            )  # fmt: skip
        if rows_ND.numel():
            _fill_padding(d_rows_ND, pair_of_row_N, 0.0)
    return d_rows_ND, d_weights_TK


def _fill_padding(rows_ND: Tensor, pair_of_row_N: Tensor, value: float) -> None:
    num_rows, hidden_size = rows_ND.shape
    fill_kernel[(triton.cdiv(num_rows, FILLED_ROWS),)](
        rows_ND, pair_of_row_N, num_rows, hidden_size, value,
        ROWS=FILLED_ROWS, HIDDEN=FILLED_COLUMNS, num_warps=4,
    )  # fmt: skip


@triton.jit
def indices_kernel(
    routing, indices, T, E, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """indices [T, K] is -1 everywhere before."""
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts_E = tl.arange(0, BLOCK_E)
    at = tokens_T[:, None].to(tl.int64) * E + experts_E[None, :]
    chosen = tl.load(routing + at, mask=(tokens_T[:, None] < T) & (experts_E[None, :] < E), other=0).to(
        tl.int32
    )
    rank = tl.cumsum(chosen, axis=1) - 1
    out = indices + tokens_T[:, None].to(tl.int64) * K + rank
    tl.store(out, tl.zeros_like(rank) + experts_E[None, :], mask=(chosen > 0) & (rank < K))


@triton.jit
def experts_at(indices, pairs, P, E):
    """int32, -1 for none: also for what is no expert, which must not become an address."""
    expert = tl.load(indices + pairs, mask=pairs < P, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit
def count_kernel(indices, counts, P, E, S, STRETCH: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts [E, S]: pairs of each expert in stretch s."""
    stretch = tl.program_id(0)
    pairs_P = stretch * STRETCH + tl.arange(0, STRETCH)
    expert_P = experts_at(indices, pairs_P, P, E)
    count_E = tl.histogram(tl.maximum(expert_P, 0), BLOCK_E, mask=expert_P >= 0)
    experts_E = tl.arange(0, BLOCK_E)
    tl.store(counts + experts_E.to(tl.int64) * S + stretch, count_E, mask=experts_E < E)


@triton.jit
def scan_kernel(counts, totals, S, BLOCK: tl.constexpr):
    """Row e of counts [E, S] becomes the number of its pairs in the stretches before; totals [E]."""
    row = counts + tl.program_id(0).to(tl.int64) * S
    before = 0
    for start in range(0, S, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count_S = tl.load(row + at, mask=at < S, other=0)
        tl.store(row + at, before + tl.cumsum(count_S, axis=0) - count_S, mask=at < S)
        before += tl.sum(count_S, axis=0)
    tl.store(totals + tl.program_id(0), tl.cast(before, tl.int64))


@triton.jit
def start_kernel(totals, starts, E, multiple, BLOCK_E: tl.constexpr):
    """starts [E]: the first row of each expert."""
    experts_E = tl.arange(0, BLOCK_E)
    total_E = tl.load(totals + experts_E, mask=experts_E < E, other=0).to(tl.int32)
    size_E = (total_E + multiple - 1) // multiple * multiple
    tl.store(starts + experts_E, tl.cumsum(size_E, axis=0) - size_E, mask=experts_E < E)


@triton.jit
def slot_kernel(
    indices, counts, starts, row_of_pair, pair_of_row, P, E, S, N, STRETCH: tl.constexpr, COMPARED: tl.constexpr
):  # fmt: skip
    stretch = tl.program_id(0)
    pairs_P = stretch * STRETCH + tl.arange(0, STRETCH)
    expert_P = experts_at(indices, pairs_P, P, E)
    rank_P = tl.zeros((STRETCH,), tl.int32)
    for start in range(0, STRETCH, COMPARED):
        others_C = stretch * STRETCH + start + tl.arange(0, COMPARED)
        other_C = experts_at(indices, others_C, P, E)
        equal = (expert_P[:, None] == other_C[None, :]) & (others_C[None, :] < pairs_P[:, None])
        rank_P += tl.sum(equal.to(tl.int32), axis=1)
    real = expert_P >= 0
    first_P = tl.load(starts + expert_P, mask=real, other=0)
    before_P = tl.load(counts + expert_P.to(tl.int64) * S + stretch, mask=real, other=0)
    row_P = first_P + before_P + rank_P
    real = real & (row_P < N)
    tl.store(row_of_pair + pairs_P, tl.where(real, row_P, -1), mask=pairs_P < P)
    tl.store(pair_of_row + row_P, pairs_P, mask=real)


@triton.jit
def permute_kernel(tokens, row_of_pair, rows, D, K: tl.constexpr, HIDDEN: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, D, HIDDEN):
        at_D = start + tl.arange(0, HIDDEN)
        x_D = tl.load(tokens + token * D + at_D, mask=at_D < D, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(row_of_pair + token * K + k).to(tl.int64)
            tl.store(rows + row * D + at_D, x_D, mask=(at_D < D) & (row >= 0))


@triton.jit
def permute_fp8_kernel(
    tokens, row_of_pair, rows, scale, D, Q, K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HIDDEN // BLOCK
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, Q, GROUPS):
        groups_G = first + tl.arange(0, GROUPS)
        at_GC = groups_G[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x_GC = tl.load(tokens + token * D + at_GC, mask=at_GC < D, other=0.0).to(tl.float32)
        scale_G = scale_of(tl.max(magnitude(x_GC), axis=1), LARGEST, SMALLEST_AMAX)
        value_GC = tl.div_rn(x_GC, tl.broadcast_to(scale_G[:, None], (GROUPS, BLOCK))).to(
            rows.dtype.element_ty
        )
        for k in tl.static_range(K):
            row = tl.load(row_of_pair + token * K + k).to(tl.int64)
            tl.store(rows + row * D + at_GC, value_GC, mask=(at_GC < D) & (row >= 0))
            tl.store(scale + row * Q + groups_G, scale_G, mask=(groups_G < Q) & (row >= 0))


@triton.jit
def fill_kernel(rows, pair_of_row, N, D, value, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
    """Rows without a pair become `value`."""
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.min(tl.load(pair_of_row + rows_R, mask=rows_R < N, other=0), axis=0) < 0:
        for i in range(ROWS):
            row = tl.program_id(0).to(tl.int64) * ROWS + i
            if tl.load(pair_of_row + row, mask=row < N, other=0) < 0:
                for start in range(0, D, HIDDEN):
                    at_D = start + tl.arange(0, HIDDEN)
                    filling_D = (tl.zeros((HIDDEN,), tl.float32) + value).to(rows.dtype.element_ty)
                    tl.store(rows + row * D + at_D, filling_D, mask=at_D < D)


@triton.jit
def unpermute_kernel(
    rows, row_of_pair, weights, tokens, D, K: tl.constexpr, HIDDEN: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, D, HIDDEN):
        at_D = start + tl.arange(0, HIDDEN)
        sum_D = tl.zeros((HIDDEN,), tl.float32)
        for k in tl.static_range(K):
            row = tl.load(row_of_pair + token * K + k).to(tl.int64)
            x_D = tl.load(rows + row * D + at_D, mask=(at_D < D) & (row >= 0), other=0.0).to(tl.float32)
            if WEIGHTED:
                x_D *= tl.load(weights + token * K + k).to(tl.float32)
            sum_D += x_D
        tl.store(tokens + token * D + at_D, sum_D.to(tokens.dtype.element_ty), mask=at_D < D)


@triton.jit
def unpermute_backward_kernel(
    d_tokens, rows, row_of_pair, weights, d_rows, d_weights, D, K: tl.constexpr, HIDDEN: tl.constexpr
):  # fmt: skip
    """Of the weighted sum; d_weights [T, K] is zero where a token has no k-th expert."""
    token = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(K):
        row = tl.load(row_of_pair + token * K + k).to(tl.int64)
        if row >= 0:
            weight = tl.load(weights + token * K + k).to(tl.float32)
            product_D = tl.zeros((HIDDEN,), tl.float32)
            for start in range(0, D, HIDDEN):
                at_D = start + tl.arange(0, HIDDEN)
                d_D = tl.load(d_tokens + token * D + at_D, mask=at_D < D, other=0.0).to(tl.float32)
                x_D = tl.load(rows + row * D + at_D, mask=at_D < D, other=0.0).to(tl.float32)
                product_D += d_D * x_D
                tl.store(d_rows + row * D + at_D, (d_D * weight).to(d_rows.dtype.element_ty), mask=at_D < D)
            tl.store(d_weights + token * K + k, tl.sum(product_D, axis=0).to(d_weights.dtype.element_ty))


def ahead_of_time(every_candidate: bool = False) -> list[AheadOfTime]:
    """Every kernel for DeepSeek-V3: 256 experts, 8 of them a token, a hidden size that is a multiple of 16."""
    pairs = {"row_of_pair": "*i32", "pair_of_row": "*i32"}
    counts = {"counts": "*i32", "S": "i32"}
    indices, slots = INDICES.listed(every_candidate), SLOTS.listed(every_candidate)
    stretches = {s: {"STRETCH": s, "num_warps": 4} for s in (blocks["STRETCH"] for blocks in slots)}
    fixed = ({"num_warps": 4},)
    specifications = [
        *_ahead(indices_kernel, {"routing": "*u8", "indices": "*i32", "T": "i32", "E": "i32"},
                {"K": 8, "BLOCK_E": 256}, indices),
        *_ahead(count_kernel, {"indices": "*i64", **counts, "P": "i32", "E": "i32"}, {"BLOCK_E": 256},
                tuple(stretches.values()), wide_loads=False),
        *_ahead(scan_kernel, {**counts, "totals": "*i64"}, {"BLOCK": SCANNED}, fixed, wide_loads=False),
        *_ahead(start_kernel, {"totals": "*i64", "starts": "*i32", "E": "i32", "multiple": "i32"},
                {"BLOCK_E": 256}, fixed),
        *_ahead(slot_kernel, {"indices": "*i64", **counts, "starts": "*i32", **pairs, "P": "i32", "E": "i32",
                "N": "i32"},
                {}, slots, wide_loads=False),
    ]  # fmt: skip
    for dtype in ("bf16", "fp32"):
        matrices = dict.fromkeys(("tokens", "rows", "d_tokens", "d_rows"), f"*{dtype}")
        rest = {"D": "i32", "N": "i32", "value": "fp32", "weights": "*fp32", "d_weights": "*fp32"}
        types = {**pairs, **matrices, **rest}
        columns, eight = PERMUTE.listed(every_candidate), {"K": 8}
        fp8 = {"K": 8, "BLOCK": BLOCK, "LARGEST": LARGEST, "SMALLEST_AMAX": SMALLEST_AMAX}
        filled = {"ROWS": FILLED_ROWS, "HIDDEN": FILLED_COLUMNS}
        specifications += [
            *_ahead(permute_kernel, types, eight, columns, dtype),
            *_ahead(fill_kernel, types, filled, fixed, dtype, wide_loads=False),
            *_ahead(unpermute_kernel, types, eight | {"WEIGHTED": False}, columns, dtype),
            *_ahead(unpermute_kernel, types, eight | {"WEIGHTED": True}, columns, f"{dtype}, weighted"),
            *_ahead(unpermute_backward_kernel, types, eight, columns, dtype),
            *_ahead(
                permute_fp8_kernel,
                types | {"rows": "*fp8e4nv", "scale": "*fp32", "Q": "i32"},
                fp8,
                columns,
                dtype,
            ),
        ]
    return specifications


def _ahead(
    kernel: object,
    types: dict[str, str],
    constants: dict,
    candidates: tuple[Parameters, ...],
    what: str = "",
    wide_loads: bool = True,
) -> list[AheadOfTime]:
    """wide_loads: false for those that read integers here and there, or only write."""
    names = set(kernel.arg_names) - set(constants) - set(candidates[0])  # type: ignore[attr-defined]
    return [
        AheadOfTime(
            name=f"moe_permute.{kernel.__name__}{f'[{what}]' if what else ''}",  # type: ignore[attr-defined]
            kernel=kernel,
            types={name: types[name] for name in names},
            constants=constants,
            parameters=parameters,
            divisible_by_16=tuple(
                name for name in names if types[name].startswith("*") or name in ("D", "E")
            ),
            tensor_cores=False,
            wide_loads=wide_loads,
        )
        for parameters in candidates
    ]
