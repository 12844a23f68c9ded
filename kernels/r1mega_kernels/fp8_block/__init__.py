"""fp8_block: e4m3 values with one float32 scale per block, as DeepSeek-V3's checkpoints and activations have them.

Source: DeepSeek-V3, section 3.3.2: weights in blocks of 128 x 128, activations in groups of 1 x 128. For a block b:

    scale_b = max(max |x|, 1e-4) / 448        value = e4m3(x / scale_b)        x ~ value * scale_b

Both are divisions: a product with the reciprocal rounds some values to the neighbour. The last block of a row or
column may be smaller.

- reference.py: the definition, in plain torch. On CPU csrc/fp8_block does the same, to the bit; on a GPU kernel.py.

Dims: O rows and I columns of a matrix; P = ceil(O / 128), Q = ceil(I / 128) blocks; T tokens.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from r1mega_kernels.fp8_block.reference import BLOCK, dequantize_reference, quantize_reference, scale_shape

__all__ = [
    "BLOCK",
    "dequantize_reference",
    "dequantize_rows",
    "dequantize_weight",
    "quantize_reference",
    "quantize_rows",
    "quantize_weight",
]

FP8 = torch.float8_e4m3fn
NUMPYS = {FP8: np.uint8, torch.bfloat16: np.uint16, torch.float32: np.float32}


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """weight_OI float32 or bfloat16 -> (values_OI float8_e4m3fn, scale_PQ float32: a checkpoint's weight_scale_inv).

    Raises ValueError for another dtype, shape or layout, and on CPU for NaN and infinity (on a GPU that check would
    wait for the device: there the block's scale is then infinite).
    """
    return _quantize(weight_OI, BLOCK)


def quantize_rows(rows_TI: Tensor) -> tuple[Tensor, Tensor]:
    """rows_TI float32 or bfloat16 -> (values_TI float8_e4m3fn, scale_TQ float32). Errors as in quantize_weight."""
    return _quantize(rows_TI, 1)


def dequantize_weight(values_OI: Tensor, scale_PQ: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """values * scale in float32, rounded to `dtype` (bfloat16 or float32). Raises ValueError where shapes or dtypes
    do not fit."""
    return _dequantize(values_OI, scale_PQ, BLOCK, dtype)


def dequantize_rows(values_TI: Tensor, scale_TQ: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same for groups of 1 x 128."""
    return _dequantize(values_TI, scale_TQ, 1, dtype)


def _quantize(matrix_OI: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    _check_matrix("the matrix to quantise", matrix_OI, (torch.float32, torch.bfloat16))
    return torch.ops.r1mega.fp8_quantize(matrix_OI, block_rows)


def _dequantize(values_OI: Tensor, scale_PQ: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    _check_matrix("the fp8 matrix", values_OI, (FP8,))
    _check_matrix("the scale", scale_PQ, (torch.float32,))
    expected = scale_shape(values_OI, block_rows)
    if tuple(scale_PQ.shape) != expected:
        raise ValueError(
            f"the scale is {list(scale_PQ.shape)}; values {list(values_OI.shape)} in blocks of "
            f"{block_rows} x {BLOCK} need {list(expected)}"
        )
    if scale_PQ.device != values_OI.device:
        raise ValueError(f"values are on {values_OI.device}, the scale on {scale_PQ.device}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; it must be torch.bfloat16 or torch.float32")
    return torch.ops.r1mega.fp8_dequantize(values_OI, scale_PQ, block_rows, dtype)


def _check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} is {list(tensor.shape)}; it must have two dims")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; pass a contiguous one")


@torch.library.custom_op("r1mega::fp8_quantize", mutates_args=())
def _fp8_quantize(matrix_OI: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    values_OI, scale_PQ = _empty_quantized(matrix_OI, block_rows)
    if matrix_OI.device.type != "cpu":
        from r1mega_kernels.fp8_block import kernel  # Triton is absent where there is no GPU

        kernel.quantize(matrix_OI, values_OI, scale_PQ, block_rows)
        return values_OI, scale_PQ
    import r1mega_kernels._C as compiled

    if not compiled.fp8_quantize(_array(matrix_OI), _array(values_OI), _array(scale_PQ), block_rows):
        count = int((~matrix_OI.isfinite()).sum())
        raise ValueError(
            f"{count} of {matrix_OI.numel()} values are NaN or infinite; fp8 has no place for them"
        )
    return values_OI, scale_PQ


@_fp8_quantize.register_fake
def _empty_quantized(matrix_OI: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    scale_PQ = matrix_OI.new_empty(scale_shape(matrix_OI, block_rows), dtype=torch.float32)
    return torch.empty_like(matrix_OI, dtype=FP8), scale_PQ


@torch.library.custom_op("r1mega::fp8_dequantize", mutates_args=())
def _fp8_dequantize(values_OI: Tensor, scale_PQ: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    out_OI = torch.empty_like(values_OI, dtype=dtype)
    if values_OI.device.type != "cpu":
        from r1mega_kernels.fp8_block import kernel

        kernel.dequantize(values_OI, scale_PQ, out_OI, block_rows)
        return out_OI
    import r1mega_kernels._C as compiled

    compiled.fp8_dequantize(_array(values_OI), _array(scale_PQ), _array(out_OI), block_rows)
    return out_OI


@_fp8_dequantize.register_fake
def _empty_dequantized(values_OI: Tensor, scale_PQ: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values_OI, dtype=dtype)


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory, while the tensor lives: fp8 as its bytes, bfloat16 as its 16 bits.

    Tensor.numpy() would bar the storage from being resized, which a pipeline does to free rows that were sent.
    """
    memory = (ctypes.c_byte * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memoryview(memory), NUMPYS[tensor.dtype]).reshape(tensor.shape)
