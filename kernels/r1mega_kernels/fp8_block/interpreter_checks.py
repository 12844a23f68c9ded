"""The Triton kernels' float32 arithmetic in Triton's interpreter, on CPU.

The interpreter's rounding to fp8 and to bfloat16 is wrong, so that fp8 values are only checked on a GPU
(test_fp8_block.py); here values stay float32. test_fp8_block.py runs this file in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

from r1mega_kernels.fp8_block import dequantize_reference, kernel, quantize_reference  # noqa: E402

SHAPES = [(1, 1), (128, 128), (130, 257), (33, 100)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_rows", [128, 1])
def test_scales_and_quotients_are_those_of_the_definition(shape, block_rows):
    matrix_OI = torch.randn(shape) * torch.randn(shape).exp()
    matrix_OI[0, 0] = 0.0
    _, scale_PQ = quantize_reference(matrix_OI, block_rows)
    quotient_OI, own_PQ = torch.empty_like(matrix_OI), torch.empty_like(scale_PQ)
    kernel.quantize(matrix_OI, quotient_OI, own_PQ, block_rows)
    assert torch.equal(own_PQ, scale_PQ)
    spread_OI = dequantize_reference(torch.ones_like(matrix_OI), scale_PQ, block_rows, torch.float32)
    assert torch.equal(quotient_OI, matrix_OI / spread_OI)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_rows", [128, 1])
def test_dequantised_values_are_those_of_the_definition(shape, block_rows):
    values_OI, scale_PQ = quantize_reference(torch.randn(shape), block_rows)
    out_OI = torch.empty(shape)
    kernel.dequantize(values_OI.float(), scale_PQ, out_OI, block_rows)
    assert torch.equal(out_OI, dequantize_reference(values_OI, scale_PQ, block_rows, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block_rows", [128, 1])
def test_what_fp8_cannot_hold_leaves_its_block_without_a_finite_scale(bad, block_rows):
    matrix_OI = torch.randn(130, 257)
    matrix_OI[129, 3] = bad
    _, scale_PQ = quantize_reference(matrix_OI, block_rows)
    own_PQ = torch.empty_like(scale_PQ)
    kernel.quantize(matrix_OI, torch.empty_like(matrix_OI), own_PQ, block_rows)
    assert not own_PQ[-1, 0].isfinite()
    own_PQ[-1, 0] = scale_PQ[-1, 0] = 0.0
    assert torch.equal(own_PQ, scale_PQ)


@pytest.mark.parametrize("blocks", kernel.OF_WEIGHTS.candidates + kernel.OF_ROWS.candidates, ids=str)
def test_every_candidate_gives_the_definition(blocks):
    tunable, rows = (
        (kernel.OF_WEIGHTS, 128) if blocks in kernel.OF_WEIGHTS.candidates else (kernel.OF_ROWS, 1)
    )
    with tunable.forced(blocks) as asked:
        test_scales_and_quotients_are_those_of_the_definition((130, 257), rows)
        test_dequantised_values_are_those_of_the_definition((130, 257), rows)
    assert asked == {"quantize float32", "dequantize float32"}
