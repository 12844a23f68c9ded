"""The Triton kernels against the reference in float64, in Triton's interpreter, on CPU and float32.

test_linear_logprob.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before
Triton is imported. The interpreter runs programs one after another and cannot show races.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

from r1mega_kernels.linear_logprob import kernel, linear_logprob_reference  # noqa: E402
from r1mega_kernels.linear_logprob.rows import LogitGradient  # noqa: E402

SHAPES = [(1, 1, 1), (3, 5, 7), (65, 64, 32), (70, 130, 40), (9, 600, 16)]
"""T, V, D: below, at and beyond the 64 x 64 x 32 blocks; 600 columns are two forward stretches."""


def make_inputs(num_tokens, num_rows, hidden_size):
    hidden_TD = torch.randn(num_tokens, hidden_size)
    weight_VD = torch.randn(num_rows, hidden_size) * 2 / math.sqrt(hidden_size)
    return hidden_TD, weight_VD, torch.randint(0, num_rows, (num_tokens,))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("workspace", [2**30, 1])
def test_results_and_gradients_match_float64(shape, temperature, workspace, monkeypatch):
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", workspace)  # 1: one tile of the vocabulary at a time
    hidden_TD, weight_VD, targets_T = make_inputs(*shape)
    a_T, b_T = torch.randn(shape[0]), torch.randn(shape[0])
    exact_hidden_TD = hidden_TD.double().requires_grad_()
    exact_weight_VD = weight_VD.double().requires_grad_()
    exact_logprobs_T, exact_entropy_T = linear_logprob_reference(
        exact_hidden_TD, exact_weight_VD, targets_T, temperature=temperature
    )
    ((a_T * exact_logprobs_T).sum() + (b_T * exact_entropy_T).sum()).backward()

    partials, _ = kernel.forward(hidden_TD, weight_VD, targets_T, temperature, keep=True)
    logprobs_T, entropy_T, lse_T = partials.finish()
    gradient = LogitGradient.of(a_T, b_T, lse_T, entropy_T, temperature)
    d_hidden_TD, d_weight_VD = kernel.backward(
        hidden_TD, weight_VD, targets_T, temperature, gradient, [], True, True
    )
    for own, expected in (
        (logprobs_T, exact_logprobs_T),
        (entropy_T, exact_entropy_T),
        (d_hidden_TD, exact_hidden_TD.grad),
        (d_weight_VD, exact_weight_VD.grad),
    ):
        assert own is not None
        assert expected is not None
        torch.testing.assert_close(own.double(), expected.detach(), rtol=1e-5, atol=2e-5)


def test_a_loss_without_entropy_has_the_plain_cross_entropy_gradient():
    hidden_TD, weight_VD, targets_T = make_inputs(20, 70, 8)
    partials, _ = kernel.forward(hidden_TD, weight_VD, targets_T, 1.0, keep=False)
    _, entropy_T, lse_T = partials.finish()
    gradient = LogitGradient.of(-torch.ones(20), None, lse_T, entropy_T, 1.0)
    d_hidden_TD, d_weight_VD = kernel.backward(
        hidden_TD, weight_VD, targets_T, 1.0, gradient, [], True, False
    )
    exact_TD = hidden_TD.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact_TD @ weight_VD.double().T, targets_T, reduction="sum").backward()
    assert d_hidden_TD is not None
    assert d_weight_VD is None
    torch.testing.assert_close(d_hidden_TD.double(), exact_TD.grad, rtol=1e-5, atol=2e-5)


def test_shards_merge_and_foreign_targets_are_left_out():
    hidden_TD, weight_VD, targets_T = make_inputs(20, 90, 8)
    whole, _ = kernel.forward(hidden_TD, weight_VD, targets_T, 1.0, keep=False)
    parts = [
        kernel.forward(hidden_TD, weight_VD[start:end], targets_T - start, 1.0, keep=False)[0]
        for start, end in ((0, 0), (0, 7), (7, 90))
    ]
    stacked = kernel.SoftmaxPartials(
        *(torch.stack([getattr(part, name) for part in parts]) for name in vars(whole))
    )
    for own, expected in zip(stacked.merged_parts().finish(), whole.finish()):
        torch.testing.assert_close(own, expected)


def test_logits_a_thousand_apart_stay_finite():
    weight_VD = torch.tensor([[1000.0], [0.0], [-1000.0]])
    partials, _ = kernel.forward(torch.ones(3, 1), weight_VD, torch.tensor([0, 1, 2]), 1.0, keep=False)
    logprobs_T, entropy_T, _ = partials.finish()
    assert logprobs_T.tolist() == [0.0, -1000.0, -2000.0]
    assert entropy_T.tolist() == [0.0, 0.0, 0.0]


def test_no_tokens_give_empty_results():
    hidden_TD, weight_VD, targets_T = make_inputs(0, 5, 3)
    partials, _ = kernel.forward(hidden_TD, weight_VD, targets_T, 1.0, keep=True)
    logprobs_T, entropy_T, lse_T = partials.finish()
    assert logprobs_T.shape == entropy_T.shape == (0,)
    gradient = LogitGradient.of(logprobs_T, entropy_T, lse_T, entropy_T, 1.0)
    d_hidden_TD, d_weight_VD = kernel.backward(hidden_TD, weight_VD, targets_T, 1.0, gradient, [], True, True)
    assert d_hidden_TD is not None
    assert d_weight_VD is not None
    assert d_hidden_TD.shape == (0, 3)
    assert not d_weight_VD.any()


@pytest.mark.parametrize("forward", kernel.PARTIALS.candidates, ids=str)
def test_every_tiling_of_the_forward_gives_the_default_s_results(forward, monkeypatch):
    hidden_TD, weight_VD, targets_T = make_inputs(150, 1100, 40)
    expected, _ = kernel.forward(hidden_TD, weight_VD, targets_T, 0.7, keep=False)
    monkeypatch.setattr(kernel, "FLOAT32_PARTIALS", forward)
    for own, one in zip(
        kernel.forward(hidden_TD, weight_VD, targets_T, 0.7, keep=False)[0].finish(), expected.finish()
    ):
        torch.testing.assert_close(own, one, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backward", kernel.LOGIT_GRADIENT.candidates, ids=str)
def test_every_tiling_of_the_backward_gives_the_default_s_gradients(backward, monkeypatch):
    hidden_TD, weight_VD, targets_T = make_inputs(150, 300, 40)
    partials, _ = kernel.forward(hidden_TD, weight_VD, targets_T, 0.7, keep=False)
    _, entropy_T, lse_T = partials.finish()
    gradient = LogitGradient.of(torch.randn(150), torch.randn(150), lse_T, entropy_T, 0.7)
    arguments: Any = (hidden_TD, weight_VD, targets_T, 0.7, gradient, [], True, True)
    expected = kernel.backward(*arguments)
    monkeypatch.setattr(kernel, "FLOAT32", backward)
    for own, one in zip(kernel.backward(*arguments), expected):
        torch.testing.assert_close(own, one, rtol=1e-5, atol=2e-5)
