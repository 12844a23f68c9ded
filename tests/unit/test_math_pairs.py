"""Labelled pairs of answers: collected ones where shared data is at hand, generated ones everywhere."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from r1mega.bench.reward_math import grade
from r1mega.bench.reward_math_pairs import PERTURBATIONS, REWRITES, generated_pairs, invented_golds
from r1mega.rewards.workers import WorkerPool

SHARED = Path(os.environ.get("R1MEGA_SHARED", Path(__file__).resolve().parents[3] / "shared"))
OPEN = SHARED / "data/math_pairs/open.jsonl"


@pytest.mark.skipif(not OPEN.exists(), reason=f"no shared data at {SHARED}")
def test_collected_pairs_are_judged_as_labelled() -> None:
    report = grade(OPEN)
    assert report.accuracy >= 0.985, report.wrong
    assert len(report.false_accepts) <= 1, report.false_accepts


def test_rewritten_answers_are_equal_and_perturbed_ones_are_not() -> None:
    seed = random.randrange(10**6)
    pairs = list(generated_pairs(invented_golds(120, seed), seed))
    with WorkerPool(1) as pool:
        futures = [pool.submit("math", rf"\boxed{{{p.gold}}}", rf"\boxed{{{p.pred}}}") for p in pairs]
        verdicts = [future.result(timeout=240) for future in futures]
    wrong = [(seed, p, verdict) for p, verdict in zip(pairs, verdicts) if (verdict == "equal") != p.equal]
    assert len(pairs) > 500
    assert not wrong


def test_every_kind_of_pair_occurs() -> None:
    kinds = {pair.kind for pair in generated_pairs(invented_golds(400, 1), 1)}
    rare = {"neg:other unit", "neg:word", "no dollar", "sign in den", "degrees"}
    assert set(REWRITES) | set(PERTURBATIONS) <= kinds | rare
