"""fp8_block against an independent formula in numpy: the nearest of the 256 values, ties to the even one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from r1mega_kernels.fp8_block import (
    dequantize_reference,
    dequantize_rows,
    dequantize_weight,
    quantize_reference,
    quantize_rows,
    quantize_weight,
)

HERE = Path(__file__).parent
OPS = torch.ops.r1mega
SHAPES = [(1, 1), (128, 128), (130, 257), (300, 100), (5, 384), (0, 7), (3, 0)]
DTYPES = [torch.float32, torch.bfloat16]


def e4m3_table() -> np.ndarray:
    """Value of each of the 256 bytes: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN."""
    byte = np.arange(256)
    sign, exponent, mantissa = np.where(byte >> 7, -1.0, 1.0), byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where((byte & 127) == 127, np.nan, sign * value)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest value's byte, in float64."""
    positive = e4m3_table()[:127]
    magnitude = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(positive, magnitude), 1, 126)
    low, high = magnitude - positive[above - 1], positive[above] - magnitude
    nearest = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return (nearest | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def quantize_numpy(x: np.ndarray, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Block by block, in float32 as the checkpoint convention has it."""
    rows, columns = x.shape
    scale = np.zeros((-(-rows // block_rows), -(-columns // 128)), np.float32)
    values = np.zeros(x.shape, np.uint8)
    for p in range(scale.shape[0]):
        for q in range(scale.shape[1]):
            place = np.s_[p * block_rows : (p + 1) * block_rows, q * 128 : (q + 1) * 128]
            amax = max(np.abs(x[place]).max(), np.float32(1e-4))
            scale[p, q] = np.float32(amax) / np.float32(448)
            values[place] = to_e4m3(x[place] / scale[p, q])
    return values, scale


def draw(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many sizes, with zeros of both signs; quotients reach e4m3's subnormals."""
    x = torch.randn(shape) * (6 * torch.randn(shape)).exp()
    x[torch.rand(shape) < 0.1] = 0.0
    x[torch.rand(shape) < 0.1] *= -0.0
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_rows", [128, 1])
def test_bytes_and_scales_are_those_of_the_formula(shape, dtype, block_rows):
    x = draw(shape, dtype)
    values, scale = (quantize_weight if block_rows == 128 else quantize_rows)(x)
    expected_values, expected_scale = quantize_numpy(x.float().numpy(), block_rows)
    assert np.array_equal(values.view(torch.uint8).numpy(), expected_values)
    assert np.array_equal(scale.numpy(), expected_scale)
    if x.numel():
        reference = quantize_reference(x, block_rows)
        assert torch.equal(values.view(torch.uint8), reference[0].view(torch.uint8))
        assert torch.equal(scale, reference[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_rows", [128, 1])
def test_numbers_are_those_of_the_formula(shape, dtype, block_rows):
    values, scale = (quantize_weight if block_rows == 128 else quantize_rows)(draw(shape, torch.float32))
    own = (dequantize_weight if block_rows == 128 else dequantize_rows)(values, scale, dtype)
    number = e4m3_table()[values.view(torch.uint8).numpy()].astype(np.float32)
    spread = scale.numpy().repeat(block_rows, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
    assert own.dtype == dtype
    assert torch.equal(own, torch.from_numpy(number * spread).to(dtype))
    assert torch.equal(own, dequantize_reference(values, scale, block_rows, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_read_right(dtype):
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    for factor in (1.0, 2.0**-120, 3e-39, 0.0, float("nan")):
        scale = torch.full((1, 2), factor)
        own, expected = dequantize_rows(values, scale, dtype), dequantize_reference(values, scale, 1, dtype)
        assert torch.equal(own.isnan(), expected.isnan())
        assert torch.equal(own.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(own.signbit()[~own.isnan()], expected.signbit()[~own.isnan()])


def test_ties_go_to_even():
    """Halfway between neighbours, in a block whose scale is 1."""
    positive = torch.from_numpy(e4m3_table()[:127]).float()
    x = torch.cat([(positive[1:] + positive[:-1]) / 2, torch.tensor([448.0, 0.0])]).view(1, 128)
    values, scale = quantize_rows(x)
    assert scale.item() == 1.0
    expected = torch.arange(126)
    assert torch.equal(values.view(torch.uint8)[0, :126].long(), expected + expected % 2)


def test_a_block_of_small_numbers_keeps_the_smallest_scale():
    x = torch.full((128, 128), 1e-6)
    x[5, 5] = -9e-5
    for values, scale in (quantize_weight(x), quantize_rows(x)):
        assert (scale == torch.tensor(1e-4) / 448).all()
        assert np.array_equal(values.view(torch.uint8).numpy(), to_e4m3((x / scale[0, 0]).numpy()))
    values, scale = quantize_weight(torch.zeros(200, 5))
    assert not values.view(torch.uint8).any()
    assert (scale == torch.tensor(1e-4) / 448).all()


def test_a_reciprocal_would_flip_bits():
    """Why the definition divides."""
    x = torch.randn(512, 1024).bfloat16()
    values, scale = quantize_rows(x)
    by_reciprocal = x.float() * (1 / scale).repeat_interleave(128, 1)
    assert (by_reciprocal.to(torch.float8_e4m3fn).view(torch.uint8) != values.view(torch.uint8)).any()


def test_there_and_back_is_within_half_a_step():
    x = torch.randn(200, 300)
    for values, scale in (quantize_weight(x), quantize_rows(x)):
        rows = 128 if len(scale) < 200 else 1
        back = dequantize_reference(values, scale, rows, torch.float32)
        smallest = scale.max() * 2.0**-9
        assert ((back - x).abs() <= x.abs() / 16 + smallest).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fp8_cannot_hold_is_refused(bad, dtype):
    x = torch.ones(130, 130, dtype=dtype)
    x[129, 129] = bad
    for quantize in (quantize_weight, quantize_rows):
        with pytest.raises(ValueError, match="1 of 16900 values are NaN or infinite"):
            quantize(x)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_weight(torch.ones(2, 2).double()), "is torch.float64; it must be torch.float32 or"),
        (lambda: quantize_rows(torch.ones(2)), r"is \[2\]; it must have two dims"),
        (lambda: quantize_rows(torch.ones(3, 2).T), r"has strides \(1, 2\)"),
        (lambda: dequantize_weight(torch.ones(2, 2), torch.ones(1, 1)), "the fp8 matrix is torch.float32"),
        (lambda: dequantize_weight(torch.ones(2, 2).to(FP8), torch.ones(2, 2)), r"need \[1, 1\]"),
        (lambda: dequantize_rows(torch.ones(2, 2).to(FP8), torch.ones(1, 1)), r"1 x 128 need \[2, 1\]"),
        (
            lambda: dequantize_rows(torch.ones(2, 2).to(FP8), torch.ones(2, 1).half()),
            "the scale is torch.float16",
        ),
        (
            lambda: dequantize_rows(torch.ones(2, 2).to(FP8), torch.ones(2, 1), torch.float16),
            "dtype is torch.float16",
        ),
        (
            lambda: dequantize_rows(torch.ones(2, 2).to(FP8), torch.ones(2, 1, device="meta")),
            "values are on cpu, the scale on meta",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_operators_are_registered_as_torch_wants_them():
    values, scale = quantize_weight(torch.randn(130, 5))
    tests = ("test_autograd_registration", "test_faketensor")  # the others calculate, which fp8 cannot
    torch.library.opcheck(OPS.fp8_dequantize, (values, scale, 128, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(OPS.fp8_quantize, (torch.randn(130, 5), 128), test_utils=tests)


def test_triton_kernels_match_the_reference_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreter_checks.py")],
        cwd=HERE.parents[1],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "TRITON_CACHE_DIR": str(tmp_path),
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_compiled_quantisation_looks_at_every_value_for_nan():
    """A GPU's max.f32 passes over NaN, so that each value that a thread holds is compared with itself."""
    pytest.importorskip("triton")
    from r1mega_kernels.aot import binary_of
    from r1mega_kernels.fp8_block.kernel import ahead_of_time as of_blocks
    from r1mega_kernels.moe_permute.kernel import ahead_of_time as of_tokens

    names = (".quantize_kernel", ".permute_fp8_kernel")
    found = [spec for spec in of_blocks() + of_tokens() if any(name in spec.name for name in names)]
    assert len(found) == 6
    for spec in found:
        values = spec.parameters["ROWS"] * 128 if "ROWS" in spec.parameters else spec.parameters["HIDDEN"]
        ptx = binary_of(spec).asm["ptx"]
        assert ptx.count("setp.nan") >= values // (32 * spec.parameters["num_warps"]), spec.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_leaves_no_finite_scale_where_fp8_cannot_hold_a_value(bad, dtype):
    x = torch.ones(130, 130, dtype=dtype, device="cuda")
    x[129, 129] = bad
    for quantize in (quantize_weight, quantize_rows):
        finite = quantize(x)[1].isfinite()
        assert not finite[-1, -1]
        assert finite.sum() == finite.numel() - 1


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; fp8 rounding is wrong in the interpreter"
)
@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (2048, 7168)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_rows", [128, 1])
def test_a_gpu_gives_the_same_bits(shape, dtype, block_rows):
    x = draw(shape, dtype)
    quantize = quantize_weight if block_rows == 128 else quantize_rows
    dequantize = dequantize_weight if block_rows == 128 else dequantize_rows
    values, scale = quantize(x)
    own_values, own_scale = quantize(x.cuda())
    assert torch.equal(own_values.cpu().view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(own_scale.cpu(), scale)
    assert torch.equal(dequantize(own_values, own_scale, dtype).cpu(), dequantize(values, scale, dtype))
