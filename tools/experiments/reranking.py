"""Best-of-k by the scores of a response's steps, beside majority vote and oracle, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from r1mega.algorithms.estimators import cons_at_k, interval, pass_at_k

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "mean": lambda scores: sum(scores) / len(scores),
    "last": lambda scores: scores[-1],
}


def reranked(
    k: int,
    steps: Sequence[Sequence[Sequence[float]]],
    right: Sequence[Sequence[bool]],
    votes: Sequence[Sequence[str | None]],
    worked: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Each question's samples in groups of k: accuracy of vote, oracle and best-of-k, and the score of the chosen."""
    count = len(right[0]) // k * k
    groups = [range(first, first + k) for first in range(0, count, k)]

    def mean(value: Callable[[int, range], float]) -> list[float]:
        return [sum(value(q, group) for group in groups) / len(groups) for q in range(len(right))]

    total = len(right) * len(groups)
    vote = mean(lambda q, group: cons_at_k([votes[q][i] for i in group], [right[q][i] for i in group]))
    row: dict[str, Any] = {
        "k": k,
        "cons": share(vote, total),
        "oracle": share([pass_at_k(len(r), sum(r), k) for r in right], total),
    }
    for name, aggregate in AGGREGATES.items():
        values = [[aggregate(scores) for scores in question] for question in steps]
        best = {
            (q, group): max(group, key=lambda i: values[q][i]) for q in range(len(right)) for group in groups
        }
        row[name] = {
            "accuracy": share(mean(lambda q, group: float(right[q][best[q, group]])), total),  # noqa: B023
            "score": round(sum(mean(lambda q, group: values[q][best[q, group]])) / len(right), 4),  # noqa: B023
            "worked": round(sum(mean(lambda q, group: worked[q][best[q, group]])) / len(right), 4),  # noqa: B023
        }
    return row


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a right step scores above a wrong one (a tie counts half); 0.5 where one kind is missing."""
    ranks: dict[float, float] = {}
    ordered = sorted(scores)
    for rank, score in enumerate(ordered):
        ranks.setdefault(score, rank)
    last = {score: rank for rank, score in enumerate(ordered)}
    good = sum(labels)
    bad = len(labels) - good
    if not good or not bad:
        return 0.5
    total = sum((ranks[s] + last[s]) / 2 for s, label in zip(scores, labels, strict=True) if label)
    return (total - good * (good - 1) / 2) / (good * bad)


def share(means: Sequence[float], num_samples: int) -> dict[str, float]:
    low, high = interval(means, num_samples)
    return {
        "value": round(sum(means) / len(means), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "questions": len(means),
    }
