"""linear_logprob as Triton kernels, for NVIDIA GPUs (written for sm_90).

Never run on a GPU so far: checked against the reference in Triton's interpreter (float32) and compiled
ahead of time to sm_90 for bfloat16, float16 and float32 (r1mega_kernels.aot).

- forward: one program per block of tokens and stretch of the vocabulary multiplies tile by tile and keeps
  per-row softmax partials in registers; rows.SoftmaxPartials merges the stretches. No logit reaches memory.
- backward: a stretch of the vocabulary at a time, logits are recomputed and turned into d_logits in one
  kernel; two library matrix products turn those into d_hidden (accumulated in float32 over stretches) and
  the stretch's rows of d_weight, each written once. No atomics: results are deterministic.
  d_logits pass through memory in the inputs' dtype, like the gradient of any bfloat16 matrix product.

Products of bfloat16 are exact in float32 and accumulate there; logits are never rounded to bfloat16.
Dims: T packed tokens, V rows of this vocabulary shard, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega_kernels.aot import AheadOfTime
from r1mega_kernels.linear_logprob.rows import LogitGradient, SoftmaxPartials
from r1mega_kernels.tuning import Parameters, Tunable, shape_class

WORKSPACE_BYTES = 2**30
"""d_logits held at once in the backward: at 32,768 tokens, 16,384 columns of the vocabulary in bfloat16."""


def _tiling(t: int, v: int, d: int, group_t: int, num_warps: int, num_stages: int) -> Parameters:
    """GROUP_T: token blocks that run side by side on the same weight tile, to find it in L2."""
    blocks = {"BLOCK_T": t, "BLOCK_V": v, "BLOCK_D": d, "GROUP_T": group_t}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


TILINGS = (
    _tiling(128, 128, 64, 16, 8, 4),
    _tiling(128, 128, 64, 8, 8, 4),
    _tiling(128, 128, 64, 32, 8, 4),
    _tiling(128, 128, 64, 16, 8, 3),
    _tiling(128, 128, 128, 16, 8, 3),
    _tiling(128, 128, 64, 16, 16, 4),
    _tiling(64, 256, 64, 16, 8, 4),
    _tiling(64, 128, 64, 16, 4, 4),
)
PARTIALS = Tunable(
    "linear_logprob.partials",
    (*(tiling | {"TILES": 8} for tiling in TILINGS), TILINGS[0] | {"TILES": 4}, TILINGS[0] | {"TILES": 16}),
)
"""TILES: vocabulary tiles one forward program walks through: 16 bytes of partials per row for that many."""
LOGIT_GRADIENT = Tunable("linear_logprob.logit_gradient", TILINGS)
FLOAT32 = _tiling(64, 64, 32, 16, num_warps=8, num_stages=2)
"""Exact float32 products run on the ordinary cores, for tests and small models: not tuned."""
FLOAT32_PARTIALS = FLOAT32 | {"TILES": 8}

KEEPS_NOTHING: list = []


def candidates() -> tuple[Tunable, ...]:
    return PARTIALS, LOGIT_GRADIENT


def forward(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float, *, keep: bool
) -> tuple[SoftmaxPartials, list]:
    """This shard's partials [T]; nothing is ever kept for the backward.

    targets_T count from the shard's first row; those outside [0, V) belong to other shards.
    """
    num_tokens, num_rows, dtype = len(hidden_TD), len(weight_VD), hidden_TD.dtype
    tiling = FLOAT32_PARTIALS
    if dtype != torch.float32:
        tiling = PARTIALS.on(hidden_TD.device, shape_class(dtype, V=num_rows))
    num_parts = triton.cdiv(num_rows, tiling["BLOCK_V"] * tiling["TILES"])
    partials_4PT = torch.empty(4, max(1, num_parts), num_tokens, dtype=torch.float32, device=hidden_TD.device)
    if num_tokens == 0 or num_parts == 0:
        partials_4PT.zero_()[0].fill_(-torch.inf)
        return SoftmaxPartials(*partials_4PT[:, 0].unbind(0)), KEEPS_NOTHING
    with torch.cuda.device_of(hidden_TD):
        partials_kernel[(triton.cdiv(num_tokens, tiling["BLOCK_T"]) * num_parts,)](
            hidden_TD,
            weight_VD,
            targets_T,
            partials_4PT,
            num_tokens,
            num_rows,
            hidden_TD.shape[1],
            1.0 / temperature,
            EVEN_D=hidden_TD.shape[1] % tiling["BLOCK_D"] == 0,
            **tiling,
        )
    return SoftmaxPartials(*partials_4PT.unbind(0)).merged_parts(), KEEPS_NOTHING


def backward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    gradient: LogitGradient,
    kept: list,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """This shard's d_hidden [T, D] and d_weight [V, D] in the inputs' dtypes; None where not needed."""
    num_tokens, num_rows = len(hidden_TD), len(weight_VD)
    d_hidden_TD = torch.zeros_like(hidden_TD, dtype=torch.float32) if needs_hidden else None
    d_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
    tiling = FLOAT32
    if hidden_TD.dtype != torch.float32:
        tiling = LOGIT_GRADIENT.on(hidden_TD.device, shape_class(hidden_TD.dtype))
    stretch = _stretch_rows(num_tokens, hidden_TD.element_size(), tiling["BLOCK_V"])
    for start in range(0, num_rows if num_tokens else 0, stretch):
        part_VD = weight_VD[start : start + stretch]
        d_logits_TV = _logit_gradient(hidden_TD, part_VD, targets_T - start, temperature, gradient, tiling)
        if d_hidden_TD is not None:
            _add_product(d_hidden_TD, d_logits_TV, part_VD)
        if d_weight_VD is not None:
            d_weight_VD[start : start + stretch] = _product(d_logits_TV.T, hidden_TD)
    return None if d_hidden_TD is None else d_hidden_TD.to(hidden_TD.dtype), d_weight_VD


def _logit_gradient(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    gradient: LogitGradient,
    tiling: Parameters,
) -> Tensor:
    """d loss / d (hidden @ weight.T) [T, V] of a stretch of the vocabulary, in hidden's dtype."""
    num_tokens, num_rows = len(hidden_TD), len(weight_VD)
    d_logits_TV = hidden_TD.new_empty(num_tokens, num_rows)
    zeros_T = torch.zeros_like(gradient.lse_T) if gradient.entropy_T is None else gradient.entropy_T
    coefficients_4T = torch.stack([gradient.lse_T, gradient.target_T, gradient.softmax_T, zeros_T])
    grid = (triton.cdiv(num_tokens, tiling["BLOCK_T"]) * triton.cdiv(num_rows, tiling["BLOCK_V"]),)
    with torch.cuda.device_of(hidden_TD):
        logit_gradient_kernel[grid](
            hidden_TD,
            weight_VD,
            targets_T,
            coefficients_4T,
            d_logits_TV,
            num_tokens,
            num_rows,
            hidden_TD.shape[1],
            1.0 / temperature,
            EVEN_D=hidden_TD.shape[1] % tiling["BLOCK_D"] == 0,
            **tiling,
        )
    return d_logits_TV


def _stretch_rows(num_tokens: int, element_size: int, block_v: int) -> int:
    """Vocabulary rows whose d_logits fit the workspace, in whole tiles."""
    rows = WORKSPACE_BYTES // (max(1, num_tokens) * element_size)
    return max(1, rows // block_v) * block_v


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: exact products, float32 sums, also across the library's splits of the inner dim."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, torch.float32, out=total)


@triton.jit
def block_of(pid, num_t_blocks, num_v_blocks, GROUP_T: tl.constexpr):
    """(token block, vocabulary block): GROUP_T token blocks take turns on one vocabulary block."""
    group = pid // (GROUP_T * num_v_blocks)
    first_t = group * GROUP_T
    group_size = tl.minimum(num_t_blocks - first_t, GROUP_T)
    place = pid % (GROUP_T * num_v_blocks)
    return first_t + place % group_size, place // group_size


@triton.jit
def product_tile(
    hidden, weight, rows_T, columns_V, T, V, D,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[columns].T in float32. Rows and columns past the end repeat the last one."""
    d = tl.arange(0, BLOCK_D)
    rows_T = tl.minimum(rows_T, T - 1).to(tl.int64)
    columns_V = tl.minimum(columns_V, V - 1).to(tl.int64)
    hidden_TD = hidden + rows_T[:, None] * D + d[None, :]
    weight_DV = weight + columns_V[None, :] * D + d[:, None]
    total_TV = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(hidden_TD)
            b = tl.load(weight_DV)
        else:
            a = tl.load(hidden_TD, mask=d[None, :] < D - start, other=0.0)
            b = tl.load(weight_DV, mask=d[:, None] < D - start, other=0.0)
        total_TV = tl.dot(a, b, total_TV, input_precision="ieee")
        hidden_TD += BLOCK_D
        weight_DV += BLOCK_D
    return total_TV


@triton.jit
def partials_kernel(
    hidden, weight, targets, partials, T, V, D, inverse_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TILES: tl.constexpr, GROUP_T: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """partials [4, P, T]: max, sum, moment and target logit of each row in stretch p of TILES tiles."""
    num_parts = tl.cdiv(V, BLOCK_V * TILES)
    t_block, part = block_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), num_parts, GROUP_T)
    rows_T = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    targets_T = tl.load(targets + rows_T, mask=rows_T < T, other=-1)
    max_T = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    sum_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    moment_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    first = part * TILES
    for tile in range(first, tl.minimum(first + TILES, tl.cdiv(V, BLOCK_V))):
        columns_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside_V = columns_V < V
        logits_TV = product_tile(
            hidden, weight, rows_T, columns_V, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D
        ) * inverse_temperature  # fmt: skip
        logits_TV = tl.where(inside_V[None, :], logits_TV, float("-inf"))
        new_max_T = tl.maximum(max_T, tl.max(logits_TV, axis=1))
        shift_T = tl.where(max_T == float("-inf"), 0.0, max_T - new_max_T)
        factor_T = tl.exp(shift_T)
        moment_T = (moment_T + sum_T * shift_T) * factor_T
        sum_T *= factor_T
        # a target of the next shard may equal a column past the end of this one
        at_target = (columns_V[None, :].to(tl.int64) == targets_T[:, None]) & inside_V[None, :]
        target_T += tl.sum(tl.where(at_target, logits_TV, 0.0), axis=1)
        shifted_TV = logits_TV - new_max_T[:, None]
        exp_TV = tl.exp(shifted_TV)
        sum_T += tl.sum(exp_TV, axis=1)
        moment_T += tl.sum(tl.where(inside_V[None, :], exp_TV * shifted_TV, 0.0), axis=1)
        max_T = new_max_T
    stride = tl.cast(num_parts, tl.int64) * T  # num_parts is a constant where V is 1
    out = partials + tl.cast(part, tl.int64) * T + rows_T
    tl.store(out, max_T, mask=rows_T < T)
    tl.store(out + stride, sum_T, mask=rows_T < T)
    tl.store(out + 2 * stride, moment_T, mask=rows_T < T)
    tl.store(out + 3 * stride, target_T, mask=rows_T < T)


@triton.jit
def logit_gradient_kernel(
    hidden, weight, targets, coefficients, d_logits, T, V, D, inverse_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """d_logits [T, V] by rows.LogitGradient's formula; coefficients [4, T]: lse, target, softmax, entropy."""
    t_block, v_block = block_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)
    rows_T = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    columns_V = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_TV = product_tile(
        hidden, weight, rows_T, columns_V, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D
    ) * inverse_temperature  # fmt: skip
    in_T = rows_T < T
    lse_T = tl.load(coefficients + rows_T, mask=in_T, other=0.0)
    target_T = tl.load(coefficients + T + rows_T, mask=in_T, other=0.0)
    softmax_T = tl.load(coefficients + 2 * T + rows_T, mask=in_T, other=0.0)
    entropy_T = tl.load(coefficients + 3 * T + rows_T, mask=in_T, other=0.0)
    targets_T = tl.load(targets + rows_T, mask=in_T, other=-1)
    logprobs_TV = logits_TV - lse_T[:, None]
    d_logits_TV = tl.exp(logprobs_TV) * (softmax_T[:, None] - entropy_T[:, None] * logprobs_TV)
    at_target = columns_V[None, :].to(tl.int64) == targets_T[:, None]
    d_logits_TV += tl.where(at_target, target_T[:, None], 0.0)
    out = d_logits + rows_T[:, None].to(tl.int64) * V + columns_V[None, :]
    tl.store(out, d_logits_TV.to(d_logits.dtype.element_ty), mask=in_T[:, None] & (columns_V[None, :] < V))


def ahead_of_time(every_candidate: bool = False) -> list[AheadOfTime]:
    """Every kernel in every dtype it serves, for DeepSeek-V3's hidden size (a multiple of every block)."""
    specifications = []
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {"hidden": f"*{dtype}", "weight": f"*{dtype}", "targets": "*i64"}
        sizes = {"T": "i32", "V": "i32", "D": "i32", "inverse_temperature": "fp32"}
        gradient = {"coefficients": "*fp32", "d_logits": f"*{dtype}"}
        for kernel, tunable, float32, arrays in (
            (partials_kernel, PARTIALS, FLOAT32_PARTIALS, {"partials": "*fp32"}),
            (logit_gradient_kernel, LOGIT_GRADIENT, FLOAT32, gradient),
        ):
            for parameters in (float32,) if dtype == "fp32" else tunable.listed(every_candidate):
                specifications.append(
                    AheadOfTime(
                        name=f"linear_logprob.{kernel.__name__}[{dtype}]",
                        kernel=kernel,
                        parameters=parameters,
                        types=pointers | arrays | sizes,
                        constants={"EVEN_D": True},
                        divisible_by_16=("D", *pointers, *arrays),
                        tensor_cores=dtype != "fp32",
                    )
                )
    return specifications
