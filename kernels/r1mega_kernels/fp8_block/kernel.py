"""fp8_block as Triton kernels, for NVIDIA GPUs (written for sm_90).

Never run on a GPU so far: the arithmetic that the interpreter can do is checked in float32, and every kernel is
compiled ahead of time to sm_90. Divisions are IEEE ones (div_rn): Triton's `/` is an approximation on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega_kernels.aot import AheadOfTime
from r1mega_kernels.fp8_block.reference import BLOCK, LARGEST, SMALLEST_AMAX
from r1mega_kernels.tuning import Tunable, shape_class

OF_WEIGHTS = Tunable("fp8_block.weights", tuple({"ROWS": BLOCK, "num_warps": warps} for warps in (8, 4, 16)))
OF_ROWS = Tunable(
    "fp8_block.rows",
    tuple(
        {"ROWS": rows, "num_warps": warps}
        for rows, warps in ((16, 4), (8, 2), (32, 4), (32, 8), (64, 8), (128, 16))
    ),
)
"""ROWS: rows of a matrix that one program takes; of a weight those of a block."""
_DIVISIBLE = ("matrix", "values", "scale", "num_columns")


def candidates() -> tuple[Tunable, ...]:
    return OF_WEIGHTS, OF_ROWS


def quantize(matrix_OI: Tensor, values_OI: Tensor, scale_PQ: Tensor, block_rows: int) -> None:
    """Writes values_OI and scale_PQ."""
    _launch(quantize_kernel, matrix_OI, values_OI, scale_PQ, block_rows)


def dequantize(values_OI: Tensor, scale_PQ: Tensor, out_OI: Tensor, block_rows: int) -> None:
    """Writes out_OI."""
    _launch(dequantize_kernel, out_OI, values_OI, scale_PQ, block_rows)


def _launch(kernel: object, matrix_OI: Tensor, values_OI: Tensor, scale_PQ: Tensor, block_rows: int) -> None:
    if matrix_OI.numel() == 0:
        return
    rows, columns = matrix_OI.shape
    column_blocks = triton.cdiv(columns, BLOCK)
    operation = kernel.__name__.partition("_")[0]  # type: ignore[attr-defined]
    tunable = OF_WEIGHTS if block_rows > 1 else OF_ROWS
    blocks = tunable.on(matrix_OI.device, shape_class(operation, matrix_OI.dtype))
    grid = (triton.cdiv(rows, blocks["ROWS"]) * column_blocks,)
    with torch.cuda.device_of(matrix_OI):
        kernel[grid](  # type: ignore[index]
            matrix_OI, values_OI, scale_PQ, rows, columns, column_blocks,
            BLOCK_ROWS=block_rows, BLOCK=BLOCK, LARGEST=LARGEST, SMALLEST_AMAX=SMALLEST_AMAX, **blocks,
        )  # fmt: skip


@triton.jit
def magnitude(x):
    """|x|; NaN counts as infinity, because a GPU's maximum passes over NaN."""
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr):
    return tl.div_rn(tl.maximum(amax, SMALLEST_AMAX), tl.full(amax.shape, LARGEST, tl.float32))


@triton.jit
def quantize_kernel(
    matrix, values, scale, num_rows, num_columns, Q, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one column block: one scale for all of them, or one each where BLOCK_ROWS is 1."""
    row_block, q = tl.program_id(0) // Q, tl.program_id(0) % Q
    rows_R = row_block * ROWS + tl.arange(0, ROWS)
    columns_C = q * BLOCK + tl.arange(0, BLOCK)
    at = rows_R[:, None].to(tl.int64) * num_columns + columns_C[None, :]
    inside = (rows_R[:, None] < num_rows) & (columns_C[None, :] < num_columns)
    x = tl.load(matrix + at, mask=inside, other=0.0).to(tl.float32)
    amax_R = tl.max(magnitude(x), axis=1)
    if BLOCK_ROWS > 1:
        amax_R = tl.zeros((ROWS,), tl.float32) + tl.max(amax_R, axis=0)
    scale_R = scale_of(amax_R, LARGEST, SMALLEST_AMAX)
    rounded = tl.div_rn(x, tl.broadcast_to(scale_R[:, None], (ROWS, BLOCK)))
    tl.store(values + at, rounded.to(values.dtype.element_ty), mask=inside)
    first = (rows_R < num_rows) & (rows_R % BLOCK_ROWS == 0)
    tl.store(scale + (rows_R // BLOCK_ROWS).to(tl.int64) * Q + q, scale_R, mask=first)


@triton.jit
def dequantize_kernel(
    matrix, values, scale, num_rows, num_columns, Q, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr,
):  # fmt: skip
    row_block, q = tl.program_id(0) // Q, tl.program_id(0) % Q
    rows_R = row_block * ROWS + tl.arange(0, ROWS)
    columns_C = q * BLOCK + tl.arange(0, BLOCK)
    at = rows_R[:, None].to(tl.int64) * num_columns + columns_C[None, :]
    inside = (rows_R[:, None] < num_rows) & (columns_C[None, :] < num_columns)
    scale_R = tl.load(scale + (rows_R // BLOCK_ROWS).to(tl.int64) * Q + q, mask=rows_R < num_rows, other=0.0)
    x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * scale_R[:, None]
    tl.store(matrix + at, x.to(matrix.dtype.element_ty), mask=inside)


def ahead_of_time(every_candidate: bool = False) -> list[AheadOfTime]:
    """Both kernels for weights and for rows, bfloat16 and float32."""
    return [
        AheadOfTime(
            name=f"fp8_block.{kernel.__name__}[{dtype}, {rows} x {BLOCK}]",
            kernel=kernel,
            types={
                "matrix": f"*{dtype}",
                "values": "*fp8e4nv",
                "scale": "*fp32",
                "num_rows": "i32",
                "num_columns": "i32",
                "Q": "i32",
            },
            constants={
                "BLOCK_ROWS": rows,
                "BLOCK": BLOCK,
                "LARGEST": LARGEST,
                "SMALLEST_AMAX": SMALLEST_AMAX,
            },
            parameters=parameters,
            divisible_by_16=_DIVISIBLE,
            tensor_cores=False,
        )
        for kernel in (quantize_kernel, dequantize_kernel)
        for dtype in ("bf16", "fp32")
        for rows, tunable in ((BLOCK, OF_WEIGHTS), (1, OF_ROWS))
        for parameters in tunable.listed(every_candidate)
    ]
