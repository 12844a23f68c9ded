"""What k samples of each question say about a model: pass@k, cons@k, intervals, and a rating from contests.

pass@1 is the mean over the k samples of a question, then over the questions (R1, supplement D.1); pass@k is the unbiased
estimator of Chen et al. 2021 (HumanEval, eq. 1). cons@k is a vote of the k answers. Two things there are ours: answers
vote by equivalence class ("1/2" and "0.5" are one answer), and classes with equally many votes share the win, which
is the expectation of drawing one of them at random, so that no order of the samples can change the number.

Samples of one question are correlated. So intervals count questions, not samples: the spread between the questions'
means is all that enters (a "clustered" standard error).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Answer = TypeVar("Answer", bound=Hashable)

Z95 = 1.959963984540054
ELO_SCALE = 400.0 / math.log(10.0)
"""Rating points of one unit of log-odds."""
ELO_BOUNDS = (-1000.0, 5000.0)
"""Where the likelihood has no maximum (all solved, nothing solved) the rating is a bound, and said to be one."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the chance that k of the n samples, drawn at random, hold a correct one."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {n} samples, {correct} correct: 1 <= k <= n and 0 <= correct <= n are needed"
        )
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# ---------------------------------------------------------------- the vote


def equivalence_classes(
    answers: Sequence[Answer | None], same: Callable[[Answer, Answer], bool]
) -> list[int | None]:
    """The class of each answer; None for no answer, which votes for nothing.

    From the most frequent answer on (of equally many, in the order of their texts), each joins the first class whose
    founder it equals. So the classes do not depend on the order of the samples, even where `same` is no equivalence
    (0.333 is 1/3 and 0.3333 is 1/3), and `same` is asked at most once per distinct answer and class.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    founders: list[Answer] = []
    classes: dict[Answer, int] = {}
    for answer in sorted(counts, key=lambda answer: (-counts[answer], str(answer))):
        found = next((i for i, founder in enumerate(founders) if same(founder, answer)), len(founders))
        if found == len(founders):
            founders.append(answer)
        classes[answer] = found
    return [None if answer is None else classes[answer] for answer in answers]


def cons_at_k(classes: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent class is right, in [0, 1]: a tie is worth the share of the tied classes that are right.

    classes: that of each sample's answer, None for no answer; a sample that was cut has none. Without any answer 0.
    A class is right if any member is: a verdict is wrong for reasons besides the answer (a form that the rule asks for,
    a comparison that timed out), and right only for the answer. Counts and "any" know no order of the samples.
    """
    votes: dict[Hashable, int] = {}
    right: dict[Hashable, bool] = {}
    for label, is_correct in zip(classes, correct, strict=True):
        if label is not None:
            votes[label] = votes.get(label, 0) + 1
            right[label] = right.get(label, False) or is_correct
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [label for label, count in votes.items() if count == most]
    return sum(right[label] for label in tied) / len(tied)


# ---------------------------------------------------------------- intervals


def interval(means: Sequence[float], num_samples: int) -> tuple[float, float]:
    """95 % interval of the mean of per-question values in [0, 1]: Wilson's, with an effective number of trials.

    means: one value per question (its share of correct samples, its pass@k, its vote).
    num_samples: of all questions together; the most that the trials can count for.
    The effective number p(1 - p) / Var(mean), Var from the spread between questions, lies between the questions (the
    samples of each say all the same) and the samples (the questions do not differ). Unlike the normal interval it
    stays inside [0, 1] and is not empty when everything is right.
    """
    n = len(means)
    if n == 0:
        raise ValueError("an interval of no questions")
    p = sum(means) / n
    variance = sum((value - p) ** 2 for value in means) / max(1, n - 1) / n
    trials = p * (1 - p) / variance if variance > 0 else 0.0
    trials = (
        float(n)
        if p in (0.0, 1.0) or n == 1
        else min(max(trials, n), num_samples)
        if variance
        else num_samples
    )
    return wilson(p, trials)


def wilson(p: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share p of `trials`, which need not be whole."""
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------- ratings


@dataclass(frozen=True)
class Rating:
    rating: float
    error: float
    """Standard error from the curvature of the likelihood; infinite at a bound."""
    bounded: bool
    """The likelihood has no maximum: everything was solved, or nothing, and `rating` is one of ELO_BOUNDS."""


def win_probability(rating: float, opponent: float) -> float:
    """Elo's: 1 / (1 + 10^((opponent - rating) / 400)). A problem's rating is an opponent's."""
    return 1.0 / (1.0 + math.exp(min(700.0, (opponent - rating) / ELO_SCALE)))


def elo(results: Sequence[tuple[float, bool]]) -> Rating:
    """Maximum-likelihood rating from (rating of the problem or opponent, solved or won).

    At the maximum the expected number of wins is the actual one: sum_i P(win_i) = wins.
    """
    wins = sum(won for _, won in results)
    if not results:
        raise ValueError("a rating of no results")
    if wins in (0, len(results)):
        return Rating(ELO_BOUNDS[bool(wins)], math.inf, bounded=True)
    rating = _root(lambda r: sum(win_probability(r, opponent) for opponent, _ in results) - wins)
    return Rating(rating, _error(rating, [opponent for opponent, _ in results]), bounded=rating in ELO_BOUNDS)


def contest_results(rank: int, opponents: Sequence[float]) -> list[tuple[float, bool]]:
    """A place among opponents (1 is best) as a result against each, for `elo`: rank - 1 were ahead. Which ones, the
    likelihood does not ask.

    The rating found is the one whose expected place, 1 + sum_j P(j beats r), is the actual one, as Codeforces seeds its
    contests and CodeElo (Quan et al. 2025) rates models contest by contest. Results of several contests go into one `elo`
    together: a first or a last place, which alone has no finite rating, then counts with the others.
    """
    if not opponents or not 1 <= rank <= len(opponents) + 1:
        raise ValueError(
            f"rank {rank} among {len(opponents)} opponents: it must lie in 1..{len(opponents) + 1}"
        )
    return [(opponent, ahead >= rank - 1) for ahead, opponent in enumerate(opponents)]


def _error(rating: float, opponents: Sequence[float]) -> float:
    information = sum(p * (1 - p) for p in (win_probability(rating, opponent) for opponent in opponents))
    return ELO_SCALE / math.sqrt(information) if information > 0 else math.inf


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function crosses 0 within ELO_BOUNDS, to a hundred-thousandth of a point."""
    low, high = ELO_BOUNDS
    if rising(low) > 0 or rising(high) < 0:
        return low if rising(low) > 0 else high
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
