"""grpo_loss's two passes over logits as Triton kernels, for NVIDIA GPUs (written for sm_90).

Never run on a GPU so far: checked against the definition in Triton's interpreter (float32) and compiled ahead of time
to sm_90 (r1mega_kernels.aot). The three matrix products are the library's (one_pass.py): float32 results of
bfloat16 operands. What is left is bound by memory: one read of the logits for the softmax, one read and half
a write for the gradient.

Dims: R rows of a chunk, K of them with a gradient, V vocabulary rows of this shard.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega_kernels.aot import AheadOfTime
from r1mega_kernels.grpo_loss.logit_rows import logit_gradient_rows, softmax_rows
from r1mega_kernels.tuning import Parameters, Tunable, shape_class

BLOCKS: tuple[Parameters, ...] = (
    {"BLOCK_V": 2048, "num_warps": 8},
    {"BLOCK_V": 1024, "num_warps": 4},
    {"BLOCK_V": 1024, "num_warps": 8},
    {"BLOCK_V": 2048, "num_warps": 4},
    {"BLOCK_V": 2048, "num_warps": 16},
    {"BLOCK_V": 4096, "num_warps": 8},
    {"BLOCK_V": 4096, "num_warps": 16},
    {"BLOCK_V": 8192, "num_warps": 16},
)
SOFTMAX_ROWS = Tunable("grpo_loss.softmax_rows", BLOCKS)
LOGIT_GRADIENT_ROWS = Tunable("grpo_loss.logit_gradient_rows", BLOCKS)


def candidates() -> tuple[Tunable, ...]:
    return SOFTMAX_ROWS, LOGIT_GRADIENT_ROWS


@softmax_rows.register_kernel("cuda")
def launch_softmax_rows(logits_RV: Tensor, targets_R: Tensor, inverse_temperature: float) -> Tensor:
    num_chunk, num_rows = logits_RV.shape
    partials_4R = torch.empty(4, num_chunk, dtype=torch.float32, device=logits_RV.device)
    if num_chunk:
        with torch.cuda.device_of(logits_RV):
            softmax_rows_kernel[(num_chunk,)](
                logits_RV,
                targets_R,
                partials_4R,
                num_chunk,
                num_rows,
                logits_RV.stride(0),
                inverse_temperature,
                **SOFTMAX_ROWS.on(logits_RV.device, shape_class(V=num_rows)),
            )
    return partials_4R


@logit_gradient_rows.register_kernel("cuda")
def launch_logit_gradient_rows(
    logits_RV: Tensor,
    rows_K: Tensor,
    targets_K: Tensor,
    coefficients_4K: Tensor,
    inverse_temperature: float,
    with_entropy: bool,
    d_logits_KV: Tensor,
) -> None:
    num_alive, num_rows = d_logits_KV.shape
    blocks = LOGIT_GRADIENT_ROWS.on(logits_RV.device, shape_class(d_logits_KV.dtype, V=num_rows))
    num_blocks = triton.cdiv(num_rows, blocks["BLOCK_V"])
    if num_alive and num_blocks:
        with torch.cuda.device_of(logits_RV):
            logit_gradient_rows_kernel[(num_alive * num_blocks,)](
                logits_RV,
                rows_K,
                targets_K,
                coefficients_4K,
                d_logits_KV,
                num_alive,
                num_rows,
                logits_RV.stride(0),
                d_logits_KV.stride(0),
                inverse_temperature,
                WITH_ENTROPY=with_entropy,
                **blocks,
            )


@triton.jit
def softmax_rows_kernel(
    logits, targets, partials, R, V, stride, inverse_temperature, BLOCK_V: tl.constexpr
):  # fmt: skip
    """One program a row. Every lane keeps softmax quantities of its own columns; they are merged at the end."""
    row = tl.program_id(0)
    z = logits + tl.cast(row, tl.int64) * stride
    lanes_V = tl.arange(0, BLOCK_V)
    max_V = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
    sum_V = tl.zeros((BLOCK_V,), dtype=tl.float32)
    moment_V = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        columns_V = start + lanes_V
        z_V = tl.load(z + columns_V, mask=columns_V < V, other=float("-inf")) * inverse_temperature
        new_max_V = tl.maximum(max_V, z_V)
        # -inf is a lane that has met no column, or one past the end: neither may become NaN
        old_V = tl.where(max_V == float("-inf"), 0.0, max_V - new_max_V)
        new_V = tl.where(columns_V < V, z_V - new_max_V, 0.0)
        factor_V = tl.exp(old_V)
        exp_V = tl.where(columns_V < V, tl.exp(new_V), 0.0)
        moment_V = (moment_V + sum_V * old_V) * factor_V + exp_V * new_V
        sum_V = sum_V * factor_V + exp_V
        max_V = new_max_V
    largest = tl.max(max_V, axis=0)
    shift_V = tl.where(max_V == float("-inf"), 0.0, max_V - largest)
    factor_V = tl.exp(shift_V)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    target_z = tl.load(z + target, mask=inside, other=0.0) * inverse_temperature
    out = partials + row
    tl.store(out, largest)
    tl.store(out + R, tl.sum(sum_V * factor_V, axis=0))
    tl.store(out + 2 * R, tl.sum((moment_V + sum_V * shift_V) * factor_V, axis=0))
    tl.store(out + 3 * R, target_z)


@triton.jit
def logit_gradient_rows_kernel(
    logits, rows, targets, coefficients, d_logits, K, V, stride, out_stride, inverse_temperature,
    WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row and block of columns, by rows.LogitGradient's formula."""
    num_blocks = tl.cdiv(V, BLOCK_V)
    k = tl.program_id(0) // num_blocks
    columns_V = (tl.program_id(0) % num_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.load(rows + k)
    lse = tl.load(coefficients + k)
    at_target = tl.load(coefficients + K + k)
    softmax = tl.load(coefficients + 2 * K + k)
    z_V = tl.load(logits + row * stride + columns_V, mask=columns_V < V, other=0.0)
    logprobs_V = z_V * inverse_temperature - lse
    if WITH_ENTROPY:
        entropy = tl.load(coefficients + 3 * K + k)
        gradient_V = tl.exp(logprobs_V) * (softmax - entropy * logprobs_V)
    else:
        gradient_V = tl.exp(logprobs_V) * softmax
    gradient_V += tl.where(columns_V == tl.load(targets + k), at_target, 0.0)
    out = d_logits + tl.cast(k, tl.int64) * out_stride + columns_V
    tl.store(out, gradient_V.to(d_logits.dtype.element_ty), mask=columns_V < V)


def ahead_of_time(every_candidate: bool = False) -> list[AheadOfTime]:
    """For vocabularies that are multiples of 16, as DeepSeek-V3's shards are."""
    common = {
        "logits": "*fp32",
        "targets": "*i64",
        "V": "i32",
        "stride": "i32",
        "inverse_temperature": "fp32",
    }
    softmax = [
        AheadOfTime(
            name="grpo_loss.softmax_rows_kernel",
            kernel=softmax_rows_kernel,
            types=common | {"partials": "*fp32", "R": "i32"},
            constants={},
            parameters=parameters,
            divisible_by_16=("logits", "targets", "partials", "V", "stride"),
            tensor_cores=False,
        )
        for parameters in SOFTMAX_ROWS.listed(every_candidate)
    ]
    gradients = [
        AheadOfTime(
            name=f"grpo_loss.logit_gradient_rows_kernel[{dtype}{', entropy' if with_entropy else ''}]",
            kernel=logit_gradient_rows_kernel,
            types=common
            | {
                "rows": "*i64",
                "coefficients": "*fp32",
                "d_logits": f"*{dtype}",
                "K": "i32",
                "out_stride": "i32",
            },
            constants={"WITH_ENTROPY": with_entropy},
            parameters=parameters,
            divisible_by_16=(
                "logits",
                "rows",
                "targets",
                "coefficients",
                "d_logits",
                "V",
                "stride",
                "out_stride",
            ),
            tensor_cores=False,
        )
        for parameters in LOGIT_GRADIENT_ROWS.listed(every_candidate)
        for dtype in ("bf16", "fp16", "fp32")
        for with_entropy in (False, True)
    ]
    return softmax + gradients
