"""The losses of reward models (R1 section 3.1) as pure functions of scores.

The paper says "pairwise" for the helpful model and "point-wise" for the safety model and gives no formula.
Taken here: Bradley-Terry for pairs, binary cross-entropy for labelled responses.

A loss is a *sum*: every pair or response carries its weight in the global batch, so the trainer only adds, over
micro-batches and ranks. Metrics are float64 sums over the examples; `summarise` divides.
Dims: P pairs, N responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega.algorithms.losses import Metrics, total

SUMS = ("examples", "tokens", "loss")
"""Metrics that are not means over the examples."""
Z_95 = 1.959964
"""Half-width of a 95 % interval in standard deviations of a normal distribution."""


def bradley_terry(scores_P2: Tensor, weights_P: Tensor) -> tuple[Tensor, Metrics]:
    """-log sigmoid(chosen - rejected), summed with weights. scores_P2: float32, chosen first.

    No pair gives a zero that still carries a (zero) gradient: every rank runs the same backward pass.
    """
    margin_P = scores_P2[:, 0] - scores_P2[:, 1]
    loss = -(weights_P * F.logsigmoid(margin_P)).sum()
    metrics = {
        "examples": total(torch.ones_like(margin_P)),
        "loss": loss.detach().double(),
        "accuracy": total(rightness(margin_P)),
        "margin": total(margin_P),
        "score": total(scores_P2) / 2,
    }
    return loss, metrics


def binary_cross_entropy(scores_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Metrics]:
    """-log sigmoid(score) of safe responses, -log sigmoid(-score) of unsafe ones, summed with weights.

    labels_N: float32, 1 safe, 0 unsafe. The margin is the score on the label's side.
    """
    margin_N = scores_N * (2 * labels_N - 1)
    loss = -(weights_N * F.logsigmoid(margin_N)).sum()
    metrics = {
        "examples": total(torch.ones_like(margin_N)),
        "loss": loss.detach().double(),
        "accuracy": total(rightness(margin_N)),
        "margin": total(margin_N),
        "score": total(scores_N),
    }
    return loss, metrics


def rightness(margins: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where it is negative; a tie is half right, as a guess would be."""
    return (margins > 0).to(margins.dtype) + 0.5 * (margins == 0)


def summarise(totals: dict[str, float]) -> dict[str, float]:
    """Sums over a global batch as the numbers to log: counts and the loss as they are, the others per example."""
    count = max(totals["examples"], 1.0)
    return {name: value if name in SUMS else value / count for name, value in totals.items()}


@dataclass(frozen=True)
class Accuracy:
    """Share of examples on the right side, ties counted half, with Wilson's 95 % interval."""

    accuracy: float
    low: float
    high: float
    n: int
    margin: float
    """Mean margin."""


def accuracy(margins: Sequence[float]) -> Accuracy:
    """What held-out margins show: chosen - rejected of each pair, or the score on the label's side.

    Raises ValueError for no margins, and for a NaN among them.
    """
    n = len(margins)
    if n == 0 or any(math.isnan(margin) for margin in margins):
        raise ValueError(f"{n} margins, {sum(math.isnan(margin) for margin in margins)} of them NaN")
    share = sum(1.0 if margin > 0 else 0.5 * (margin == 0) for margin in margins) / n
    low, high = wilson(share, n)
    return Accuracy(share, low, high, n, sum(margins) / n)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n independent examples."""
    z2 = Z_95 * Z_95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
