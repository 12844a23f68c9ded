"""The definition of blockwise fp8, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
"""Of e4m3."""
SMALLEST_AMAX = 1e-4
"""A block of zeros has this largest value: its scale is small and not zero."""


def scale_shape(matrix_OI: Tensor, block_rows: int) -> tuple[int, int]:
    """(row blocks, column blocks)."""
    return -(-matrix_OI.shape[0] // block_rows), -(-matrix_OI.shape[1] // BLOCK)


def quantize_reference(matrix_OI: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn like matrix_OI, float32 scale [row blocks, column blocks])."""
    padded_OI = torch.nn.functional.pad(matrix_OI.float(), _padding(matrix_OI, block_rows))
    blocks_PRQC = padded_OI.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, block_rows))
    scale_PQ = blocks_PRQC.abs().amax(dim=(1, 3)).clamp(min=SMALLEST_AMAX) / LARGEST
    values_OI = matrix_OI.float() / _spread(scale_PQ, matrix_OI, block_rows)
    return values_OI.to(torch.float8_e4m3fn), scale_PQ


def dequantize_reference(
    values_OI: Tensor, scale_PQ: Tensor, block_rows: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return (values_OI.float() * _spread(scale_PQ, values_OI, block_rows)).to(dtype)


def _spread(scale_PQ: Tensor, matrix_OI: Tensor, block_rows: int) -> Tensor:
    """The scale of each element."""
    rows, columns = matrix_OI.shape
    return scale_PQ.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def _padding(matrix_OI: Tensor, block_rows: int) -> tuple[int, int, int, int]:
    rows, columns = matrix_OI.shape
    return 0, -columns % BLOCK, 0, -rows % block_rows
