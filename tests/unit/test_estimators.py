"""Estimators against brute force: enumeration, simulation, a grid over the likelihood."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from r1mega.algorithms.estimators import (
    ELO_BOUNDS,
    cons_at_k,
    contest_results,
    elo,
    equivalence_classes,
    interval,
    pass_at_k,
    wilson,
    win_probability,
)


@pytest.mark.parametrize("seed", range(40))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    k, correct = rng.randint(1, n), rng.randint(0, n)
    subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_equals_the_binomials() -> None:
    for n, correct, k in ((200, 3, 100), (200, 199, 1), (64, 1, 64), (1000, 0, 10)):
        exact = 1 - math.comb(n - correct, k) / math.comb(n, k)
        assert pass_at_k(n, correct, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_refuses_more_than_the_samples() -> None:
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize("seed", range(20))
def test_equivalence_classes_partition_as_the_relation_does(seed: int) -> None:
    rng = random.Random(seed)
    answers = [rng.choice([None, *range(12)]) for _ in range(rng.randint(1, 20))]
    classes = equivalence_classes(answers, lambda a, b: a % 4 == b % 4)
    for (a, first), (b, second) in itertools.product(zip(answers, classes, strict=True), repeat=2):
        if a is None or b is None:
            assert (a is None) == (first is None)
        else:
            assert (first == second) == (a % 4 == b % 4)


@pytest.mark.parametrize("seed", range(30))
def test_a_vote_is_the_mean_over_random_tie_breaks(seed: int) -> None:
    rng = random.Random(seed)
    reference = rng.randrange(4)
    answers = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(1, 8))]
    counts = {a: answers.count(a) for a in answers if a is not None}
    winners = [a for a in counts if counts[a] == max(counts.values())]
    expected = sum(a == reference for a in winners) / len(winners) if winners else 0.0
    correct = [a == reference for a in answers]
    assert cons_at_k(answers, correct) == expected
    order = rng.sample(range(len(answers)), len(answers))
    assert cons_at_k([answers[i] for i in order], [correct[i] for i in order]) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_the_samples_changes_a_vote(seed: int) -> None:
    """Verdicts differ within a class (a right answer in a wrong form), and "equal" is no equivalence (a tolerance)."""
    rng = random.Random(seed)
    samples = [(rng.choice([None, *range(8)]), rng.random() < 0.5) for _ in range(12)]

    def voted() -> float:
        answers, correct = zip(*samples, strict=True)
        return cons_at_k(equivalence_classes(answers, lambda a, b: abs(a - b) <= 1), correct)

    votes = set()
    for _ in range(20):
        rng.shuffle(samples)
        votes.add(voted())
    assert len(votes) == 1


def test_a_class_is_right_though_its_first_member_was_cut() -> None:
    assert cons_at_k(["5"] * 4, [False, True, True, True]) == 1.0
    assert cons_at_k(["5"] * 4, [True, True, True, False]) == 1.0


def test_wilson_is_where_the_score_test_turns() -> None:
    for p, trials in ((0.0, 20.0), (0.3, 50.0), (1.0, 7.0), (0.5, 1000.0)):
        for bound in wilson(p, trials):
            if 0 < bound < 1:
                assert abs(p - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(
                    1.96, abs=1e-3
                )


def covered(questions: int, k: int, spread: float, rounds: int = 400) -> tuple[float, float]:
    """How often the interval, and one that takes all samples for independent, hold the true mean 0.6."""
    rng = np.random.default_rng(questions * k)
    clustered = naive = 0
    for _ in range(rounds):
        chances = rng.beta(0.6 * spread, 0.4 * spread, questions)
        means = (rng.binomial(k, chances) / k).tolist()
        low, high = interval(means, questions * k)
        clustered += low <= 0.6 <= high
        low, high = wilson(sum(means) / questions, questions * k)
        naive += low <= 0.6 <= high
    return clustered / rounds, naive / rounds


@pytest.mark.parametrize(
    "questions, k, spread", [(30, 64, 0.7), (200, 8, 1.0), (50, 1, 1.0), (100, 16, 50.0)]
)
def test_intervals_of_correlated_samples_cover_as_they_say(questions: int, k: int, spread: float) -> None:
    ours, naive = covered(questions, k, spread)
    assert 0.92 <= ours <= 0.985
    if k > 1 and spread <= 1:
        assert naive < 0.75


def test_an_interval_stays_inside_and_is_never_empty() -> None:
    for means, samples in (([1.0] * 5, 40), ([0.0] * 5, 5), ([0.5] * 5, 40), ([0.3], 10), ([1.0, 0.0], 2)):
        low, high = interval(means, samples)
        assert 0 <= low < high <= 1
        assert low <= sum(means) / len(means) <= high


@pytest.mark.parametrize("seed", range(10))
def test_elo_maximises_the_likelihood(seed: int) -> None:
    rng = np.random.default_rng(seed)
    opponents = rng.uniform(800, 2800, 25)
    won = rng.random(25) < [win_probability(1700, o) for o in opponents]
    won[:2] = True, False
    found = elo(list(zip(opponents.tolist(), won.tolist(), strict=True)))
    grid = np.arange(-1000.0, 5000.0, 1.0)
    chances = 1 / (1 + 10 ** ((opponents[None] - grid[:, None]) / 400))
    likelihood = np.log(np.where(won[None], chances, 1 - chances)).sum(1)
    assert abs(found.rating - grid[likelihood.argmax()]) <= 1.0
    assert not found.bounded


def test_elo_recovers_a_rating_within_its_error() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        opponents = rng.uniform(800, 2800, 60)
        results = [(float(o), bool(rng.random() < win_probability(1900, o))) for o in opponents]
        found = elo(results)
        inside += abs(found.rating - 1900) < 1.96 * found.error
    assert 0.9 <= inside / 200 <= 0.99


def test_a_rating_from_places_expects_them_in_their_sum() -> None:
    rng = random.Random(0)
    contests = [[rng.uniform(800, 2400) for _ in range(size)] for size in (200, 50, 120)]
    for ranks in ((2, 3, 5), (17, 1, 40), (201, 10, 1), (199, 51, 119)):
        results = [
            one for rank, each in zip(ranks, contests, strict=True) for one in contest_results(rank, each)
        ]
        found = elo(results)
        places = sum(1 + sum(win_probability(o, found.rating) for o in each) for each in contests)
        assert not found.bounded
        assert places == pytest.approx(sum(ranks), abs=1e-3)
    assert elo(contest_results(10, contests[0])).rating > elo(contest_results(20, contests[0])).rating


def test_a_rating_without_a_maximum_says_so() -> None:
    assert elo([(1500.0, True), (1600.0, True)]) == elo([(1000.0, True)])
    assert elo([(1500.0, True)]).rating == ELO_BOUNDS[1]
    assert elo([(1500.0, False)]).bounded
    assert elo(contest_results(1, [1500.0])).bounded
