"""The Triton kernels against the CPU's operators in float64, in Triton's interpreter, on CPU and float32.

test_grpo_loss.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before
Triton is imported. The interpreter's bfloat16 is wrong, so only float32 is checked; it runs programs one after
another and cannot show races.
"""

from __future__ import annotations

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

from r1mega_kernels.grpo_loss import kernel  # noqa: E402
from r1mega_kernels.grpo_loss.logit_rows import logit_gradient_rows, softmax_rows  # noqa: E402

SHAPES = [(1, 1), (3, 7), (5, 64), (4, 65), (6, 300)]
"""R, V: below, at and beyond blocks of 64 columns."""


@pytest.fixture(autouse=True)
def small_blocks():
    with (
        kernel.SOFTMAX_ROWS.forced({"BLOCK_V": 64}),
        kernel.LOGIT_GRADIENT_ROWS.forced({"BLOCK_V": 64}),
    ):
        yield


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_softmax_quantities_match_float64(shape, shift):
    logits_RV = 3 * torch.randn(shape) + shift
    targets_R = torch.randint(-3, shape[1] + 3, shape[:1])
    expected = softmax_rows(logits_RV.double(), targets_R, 0.7)
    own = kernel.launch_softmax_rows(logits_RV, targets_R, 0.7)
    torch.testing.assert_close(
        own.double(), expected, rtol=3e-4 if shift else 1e-5, atol=1e-3 if shift else 1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradients_of_some_rows_match_float64(shape, with_entropy):
    logits_RV = 3 * torch.randn(shape)
    rows_K = torch.arange(0, shape[0], 2)
    targets_K = torch.randint(-3, shape[1] + 3, rows_K.shape)
    coefficients_4K = torch.randn(4, len(rows_K))
    coefficients_4K[0] = logits_RV.logsumexp(dim=1)[rows_K]
    own, expected = (
        torch.full((len(rows_K), shape[1]), torch.nan),
        torch.empty(len(rows_K), shape[1]).double(),
    )
    kernel.launch_logit_gradient_rows(logits_RV, rows_K, targets_K, coefficients_4K, 0.7, with_entropy, own)
    logit_gradient_rows(
        logits_RV.double(), rows_K, targets_K, coefficients_4K.double(), 0.7, with_entropy, expected
    )
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)


def test_logits_a_thousand_apart_stay_finite():
    logits_RV = torch.tensor([[1000.0, 0.0, -1000.0]])
    largest, total, moment, target = kernel.launch_softmax_rows(logits_RV, torch.tensor([2]), 1.0)
    assert (largest.item(), total.item(), moment.item(), target.item()) == (1000.0, 1.0, 0.0, -1000.0)


def test_a_shard_without_columns_has_no_partials():
    partials_4R = kernel.launch_softmax_rows(torch.empty(3, 0), torch.tensor([0, 1, 2]), 1.0)
    assert partials_4R[0].tolist() == [-torch.inf] * 3
    assert not partials_4R[1:].any()


@pytest.mark.parametrize("blocks", kernel.BLOCKS, ids=str)
def test_every_size_of_blocks_gives_the_operators_results(blocks):
    with kernel.SOFTMAX_ROWS.forced(blocks), kernel.LOGIT_GRADIENT_ROWS.forced(blocks):
        test_softmax_quantities_match_float64((2, 9000), 0.0)
        test_gradients_of_some_rows_match_float64((3, 9000), True)
