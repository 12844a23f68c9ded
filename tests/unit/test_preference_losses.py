"""Reward-model losses: the formulas, their gradients, and what the accuracy claims."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.algorithms.losses import combine
from r1mega.algorithms.preference_losses import (
    accuracy,
    binary_cross_entropy,
    bradley_terry,
    summarise,
    wilson,
)


def pairs(seed: int, count: int = 7) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_bradley_terry_is_minus_log_sigmoid_of_the_difference():
    scores = pairs(0)
    loss, metrics = bradley_terry(scores, torch.full((7,), 1 / 7))
    chosen, rejected = scores.detach().double().unbind(1)
    expected = -torch.log(1 / (1 + torch.exp(rejected - chosen))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss"].item() == loss.item()


def test_bradley_terry_pushes_the_two_scores_apart_by_equal_forces():
    scores = pairs(1)
    bradley_terry(scores, torch.ones(7))[0].backward()
    probability = torch.sigmoid(scores.detach()[:, 0] - scores.detach()[:, 1])
    torch.testing.assert_close(scores.grad[:, 0], probability - 1)
    torch.testing.assert_close(scores.grad[:, 0], -scores.grad[:, 1])


def test_scores_that_say_nothing_cost_log_2_and_are_half_right():
    _, metrics = bradley_terry(torch.zeros(4, 2), torch.full((4,), 0.25))
    values = summarise({name: float(value) for name, value in metrics.items()})
    assert values["loss"] == pytest.approx(math.log(2))
    assert (values["accuracy"], values["margin"], values["score"]) == (0.5, 0.0, 0.0)


def test_binary_cross_entropy_matches_torch():
    scores, labels = pairs(2).flatten(), torch.tensor([1.0, 0] * 7)
    weights = torch.rand(14, generator=torch.Generator().manual_seed(3))
    loss, metrics = binary_cross_entropy(scores, labels, weights)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, weights, reduction="sum")
    torch.testing.assert_close(loss, expected)
    right = (scores > 0) == (labels > 0)
    assert float(metrics["accuracy"]) == float(right.sum())


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_scores_keep_loss_and_gradient_finite(extreme):
    scores = torch.tensor([[extreme, 0.0]], requires_grad=True)
    loss, _ = bradley_terry(scores, torch.ones(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_no_examples_are_a_zero_with_a_zero_gradient():
    """A rank with padding alone runs the same backward pass as the others."""
    values_T = torch.randn(5, requires_grad=True)
    none = values_T[torch.zeros(5, dtype=torch.bool)]
    for loss, metrics in (
        bradley_terry(none.view(-1, 2), torch.zeros(0)),
        binary_cross_entropy(none, torch.zeros(0), torch.zeros(0)),
    ):
        values_T.grad = None
        loss.backward(retain_graph=True)
        assert loss.item() == 0
        assert torch.equal(values_T.grad, torch.zeros(5))
        assert float(metrics["examples"]) == 0


@settings(deadline=None)
@given(st.integers(1, 6))
def test_parts_of_a_batch_add_up_to_the_batch(border):
    scores, weights = pairs(5).detach(), torch.full((7,), 1 / 7)
    whole = bradley_terry(scores, weights)[1]
    parts = combine(
        [
            bradley_terry(scores[:border], weights[:border])[1],
            bradley_terry(scores[border:], weights[border:])[1],
        ]
    )
    for name, value in whole.items():
        assert float(parts[name]) == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.9, 50, 0.7864, 0.9565)],
)
def test_wilson_has_the_textbook_values(share, n, low, high):
    assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(2000):
        seen = float((torch.rand(80, generator=rng) < 0.6).double().mean())
        low, high = wilson(seen, 80)
        hits += low <= 0.6 <= high
    assert 0.93 < hits / 2000 < 0.97


def test_accuracy_counts_ties_half_and_refuses_nan():
    result = accuracy([1.0, -1.0, 0.0, 2.0])
    assert (result.accuracy, result.n, result.margin) == (0.625, 4, 0.5)
    assert result.low < 0.625 < result.high
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="margins"):
            accuracy(bad)
