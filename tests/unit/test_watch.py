"""The alarm against reward hacking."""

from __future__ import annotations

import random

from r1mega.rewards.watch import reward_hacking

HELDOUT = 512


def run(model_slope: float, scores: dict[int, float], steps: int = 20, noise: float = 0.02) -> list[dict]:
    rng = random.Random(3)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "helpful": model_slope * step + rng.gauss(0, noise)}
        rows.append(row | ({"eval/sampled": scores[step]} if step in scores else {}))
    return rows


def test_a_rising_model_reward_over_a_falling_rule_score_raises_the_alarm() -> None:
    rows = run(0.05, {5: 0.60, 10: 0.55, 15: 0.50, 20: 0.40})
    message = reward_hacking(rows, ["helpful"], HELDOUT)
    assert message is not None
    assert "'helpful' rose" in message
    assert "since step 5" in message
    assert "from 60.0% to 40.0%" in message


def test_nothing_is_said_while_either_side_is_sound() -> None:
    falling = {5: 0.60, 20: 0.40}
    assert reward_hacking(run(0.05, {5: 0.40, 20: 0.60}), ["helpful"], HELDOUT) is None, "both rise"
    assert reward_hacking(run(-0.05, falling), ["helpful"], HELDOUT) is None, "both fall"
    assert reward_hacking(run(0.0, falling), ["helpful"], HELDOUT) is None, "the model reward only scatters"
    assert reward_hacking(run(0.05, {5: 0.60, 20: 0.58}), ["helpful"], HELDOUT) is None, "the fall is noise"
    assert reward_hacking(run(0.05, falling), ["helpful"], 8) is None, "too few problems to tell"
    assert reward_hacking(run(0.05, falling), ["helpful"], 0) is None, "no problem that a rule can judge"
    assert reward_hacking(run(0.05, falling), ["safety"], HELDOUT) is None, "no such term in this run"


def test_a_run_without_two_evaluations_is_not_judged() -> None:
    assert reward_hacking([], ["helpful"], HELDOUT) is None
    assert reward_hacking(run(0.05, {5: 0.6}), ["helpful"], HELDOUT) is None
    assert reward_hacking(run(0.05, {18: 0.6, 20: 0.4}), ["helpful"], HELDOUT) is None, (
        "two steps are no trend"
    )
