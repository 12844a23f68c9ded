"""The alarm against reward hacking."""

from __future__ import annotations

import asyncio
import io
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.config import RewardConfig, RunConfig
from r1mega.rewards.watch import reward_hacking
from r1mega.samples import Prompt
from r1mega.stages.console import Console
from r1mega.stages.evaluate import Evaluation, Score
from r1mega.stages.rl import ReinforcementLearning
from r1mega.stages.run_directory import RunDirectory
from r1mega.training.metrics import Recorder

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


class Trained(ReinforcementLearning):
    """At the end of its steps, with neither engines nor a trainer: its last evaluation is given."""

    def __init__(self, directory: RunDirectory, last: Evaluation, console: Console):
        async def nothing(*_: object) -> None: ...

        self.config, self.directory, self.console, self.last = directory.config, directory, console, last
        self.prompts = SimpleNamespace(heldout=[Prompt("q", "q", "a", "math", "q", ())] * HELDOUT)  # type: ignore[assignment]
        self.policy, self.step = SimpleNamespace(call=nothing), 20  # type: ignore[assignment]

    async def _evaluate(self, when: str) -> Evaluation:
        return self.last


def evaluation(accuracy: float) -> Evaluation:
    score = Score(accuracy, 0.0, 1.0, 10.0, 0.0, HELDOUT)
    return Evaluation(score, score, [])


@pytest.mark.parametrize("last, alarms", [(0.40, 1), (0.62, 0)])
def test_the_last_evaluation_is_watched_as_well(last: float, alarms: int, tmp_path: Path) -> None:
    """It is no multiple of eval.every, and the only one after preference rewards have done their work."""
    console, config = Console(io.StringIO()), RunConfig(rewards=RewardConfig(helpful_model="m"))
    with RunDirectory(tmp_path, config) as directory:
        directory.begin()
        with Recorder(tmp_path) as recorder:
            for row in run(0.05, {5: 0.60}):
                recorder.log(row.pop("step"), row)
        directory.add_results(before=evaluation(0.5).as_dict())
        for _ in range(2):  # the second time as after a kill on the way
            asyncio.run(Trained(directory, evaluation(last), console)._finish())
        results = directory.results()
    assert results["finished"]
    assert len(results.get("alarms", [])) == alarms
    assert all("from 60.0% to 40.0% (step 20)" in alarm for alarm in results.get("alarms", []))
