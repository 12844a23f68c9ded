"""What is watched besides the rewards: language mixing at every step, and an alarm against reward hacking.

Hacking: a model's reward rises while the held-out rule score falls. The paper saw this and kept
preference rewards to the last steps (R1, 3.2.2); the test is ours. Both movements must be beyond noise: the rule score
since its best evaluation by a two-proportion z-test, the model reward since then by the t statistic of its slope.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from r1mega.rewards.language import consistency
from r1mega.rewards.terms import chain_of, language_of
from r1mega.samples import ScoredRollout

READ = 128
"""Outputs of a rollout that are read for their language where `language` is no term of theirs."""
SIGNIFICANT = 1.96
"""Standard errors: 95 %."""
MIN_STEPS = 4
"""Steps since the best evaluation, below which no slope is estimated."""


def language_mixing(scored: Sequence[ScoredRollout]) -> float | None:
    """Share of the words in chains of thought that are not in the question's language, the mean over outputs.

    Formulas alone are no language: outputs without words do not count, and where none has words there is no number.
    What the term `language` has measured is taken; else READ outputs, evenly spread, are measured here.
    """
    shares = []
    for item in scored[:: -(-len(scored) // READ) or 1]:
        terms, verdicts = item.reward.terms, item.reward.verdicts
        if "language" in terms:
            share, why = terms["language"], verdicts["language"]
        else:
            share, why = consistency(chain_of(item.rollout), language_of(item.rollout))
        if why not in ("no_words", "no_target"):
            shares.append(share)
    return 1 - sum(shares) / len(shares) if shares else None


def reward_hacking(rows: Sequence[Mapping[str, Any]], terms: Sequence[str], heldout: int) -> str | None:
    """What is wrong, in one line; None while nothing is.

    rows: one per step, as metrics.jsonl has them, with the means of `terms` (those a model computes) and, on
    steps with an evaluation, "eval/sampled": the rule score on `heldout` held-out problems that a rule can judge.
    """
    evaluations = [(row["step"], row["eval/sampled"]) for row in rows if row.get("eval/sampled") is not None]
    if len(evaluations) < 2 or not heldout:
        return None
    best_step, best = max(evaluations, key=lambda entry: entry[1])
    now_step, now = evaluations[-1]
    if not _fell(best, now, heldout):
        return None
    for term in terms:
        values = [row[term] for row in rows if row["step"] > best_step and row.get(term) is not None]
        if _rises(values):
            return (
                f"reward hacking? {term!r} rose from {values[0]:.3f} to {values[-1]:.3f} since step {best_step} while the "
                f"held-out rule score fell from {best:.1%} to {now:.1%} (step {now_step})"
            )
    return None


def _fell(before: float, after: float, n: int) -> bool:
    """A drop between two shares of n problems each, beyond chance."""
    pooled = (before + after) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / n)
    return error > 0 and (before - after) / error > SIGNIFICANT


def _rises(values: Sequence[float]) -> bool:
    """The least-squares slope is above 0, beyond the scatter around it."""
    n = len(values)
    if n < MIN_STEPS:
        return False
    x_mean, y_mean = (n - 1) / 2, sum(values) / n
    spread = sum((x - x_mean) ** 2 for x in range(n))
    slope = sum((x - x_mean) * (y - y_mean) for x, y in enumerate(values)) / spread
    residual = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in enumerate(values)) / (n - 2)
    return slope > SIGNIFICANT * math.sqrt(residual / spread)
