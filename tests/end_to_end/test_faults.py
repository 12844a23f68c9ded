"""Processes that are killed or stopped while a run goes on: it ends as an undisturbed one, bit for bit."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import WholeRun, metrics_of, partial_files, started, sums, whole_run, write_jsonl
from test_resume import repeatable

from r1mega import checks, overrides
from r1mega.data.prompts import read_prompts
from r1mega.rewards.scoring import Scorer
from r1mega.samples import Prompt, Rollout
from r1mega.stages.console import Console
from r1mega.stages.recovery import GivenUp, with_restarts
from r1mega.stages.rl import ReinforcementLearning
from r1mega.stages.run_directory import RunDirectory
from r1mega.stages.tokenizer import load_tokenizer

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

Fault = Callable[["FaultyRun"], None]


class FaultyRun(ReinforcementLearning):
    """A run to which things happen, each once: {(step, phase): fault}. In "generate" after the first output."""

    faults: dict[tuple[int, str], Fault]
    again = False
    """Each happens at every attempt."""

    async def _generate(self, prompts: list[Prompt]) -> AsyncIterator[Rollout]:
        first = True
        async for rollout in super()._generate(prompts):
            yield rollout
            if first:
                self._suffer("generate")
            first = False

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if name != "generate":
            self._suffer(name)
        with super()._timed(name):
            yield

    def _suffer(self, phase: str) -> None:
        here = (self.step, phase)
        fault = self.faults.get(here) if self.again else self.faults.pop(here, None)
        if fault is not None:
            fault(self)


def engine(index: int, how: signal.Signals) -> Fault:
    return lambda run: os.kill(run.engines.group.engines[index]._pid, how)  # type: ignore[attr-defined]


def trainer(rank: int, how: signal.Signals) -> Fault:
    return lambda run: os.kill(run.policy.workers[rank]._pid, how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ended:
    rows: list[dict[str, Any]]
    said: str
    results: dict[str, Any]


Runner = Callable[..., Ended]


@pytest.fixture(scope="module")
def run_with(ray_cluster: None, sft_run: WholeRun, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A whole run of two trainer ranks and two engines, with faults."""
    data = write_jsonl(tmp_path_factory.mktemp("faults") / "sums.jsonl", sums())

    def run(faults: dict[tuple[int, str], Fault], *settings: str, again: bool = False) -> Ended:
        path = tmp_path_factory.mktemp("faults") / "run"
        config = overrides.load(
            "configs/tiny/r1_zero.py",
            [
                f"model={sft_run.directory / 'hf'}", f"data={data}", f"dir={path}", "num_steps=4",
                "grpo.group_size=4", "grpo.questions_per_step=8", "rollout.max_tokens=40",
                "data.eval_size=8", "optimizer.warmup_steps=0", "checkpoint.every=2", *settings,
            ],
        )  # fmt: skip
        checks.check(config)
        prompts = read_prompts(config.data, load_tokenizer(config.model), seed=config.seed)
        console = Console(io.StringIO())

        async def whole(directory: RunDirectory) -> None:
            async with Scorer(config.rewards) as scorer:
                job = FaultyRun(config, directory, prompts, scorer, console)
                job.faults, job.again = dict(faults), again
                try:
                    await with_restarts(job.attempt, directory, console)
                finally:
                    await job.stop()
                assert not job.faults, "not every fault happened"

        with RunDirectory(path, config) as directory:
            directory.begin()
            asyncio.run(whole(directory))
            assert partial_files(path) == []
            return Ended(metrics_of(path), console.stream.getvalue(), directory.results())  # type: ignore[attr-defined]

    return run


@pytest.fixture(scope="module")
def undisturbed(run_with: Runner) -> Ended:
    return run_with({})


SAMPLED_ANEW = ("logprob_mismatch_mean", "logprob_mismatch_max", "rollout_kl")
"""Compare the engine's log-probs with the trainer's; the last bits depend on which outputs share a batch."""


def differences(ended: Ended, undisturbed: Ended) -> dict[int, dict[str, tuple[Any, Any]]]:
    """{step: {metric: both values}} where they are not the same bits."""
    assert [row["step"] for row in ended.rows] == [row["step"] for row in undisturbed.rows]
    found: dict[int, dict[str, tuple[Any, Any]]] = {}
    for ours, theirs in zip(repeatable(ended.rows), repeatable(undisturbed.rows), strict=True):
        for name in (ours.keys() | theirs.keys()) - {"engines_replaced"}:
            if ours.get(name) != theirs.get(name):
                found.setdefault(ours["step"], {})[name] = (ours.get(name), theirs.get(name))
    return found


def replaced(ended: Ended) -> list[float]:
    return [row.get("engines_replaced", 0.0) for row in ended.rows]


def test_a_killed_engine_and_a_killed_trainer_rank_change_nothing(
    run_with: Runner, undisturbed: Ended
) -> None:
    """The engine dies in step 2 while it samples, the rank in step 4; the newest checkpoint is then of step 2."""
    ended = run_with({(1, "generate"): engine(1, signal.SIGKILL), (3, "train"): trainer(1, signal.SIGKILL)})
    assert replaced(ended) == [0, 1, 0, 0]
    assert "engine 1 died: " in ended.said
    assert "; a fresh engine takes its place" in ended.said
    assert len(ended.results["restarts"]) == 1
    assert "trainer rank 1 died: " in ended.results["restarts"][0]
    assert "step-00000002 (step 2)" in ended.said
    found = differences(ended, undisturbed)
    for name, (ours, theirs) in found.pop(2, {}).items():
        assert name in SAMPLED_ANEW
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-8)
    assert found == {}
    assert ended.results["after"] == undisturbed.results["after"]


@pytest.mark.slow
def test_a_stopped_trainer_rank_is_named_and_the_run_goes_on(run_with: Runner, undisturbed: Ended) -> None:
    ended = run_with({(2, "train"): trainer(1, signal.SIGSTOP)}, "sync.timeout_seconds=20")
    (why,) = ended.results["restarts"]
    assert re.fullmatch(
        r"trainer rank 1 hung in rl_update for \d\d s: it does not answer; "
        r"trainer rank 0 waited in \w+ over data parallel .+",
        why,
    ), why
    assert differences(ended, undisturbed) == {}


@pytest.mark.slow
def test_a_stopped_engine_is_replaced(run_with: Runner, undisturbed: Ended) -> None:
    """It is missing at the next weight sync."""
    ended = run_with({(2, "sync"): engine(0, signal.SIGSTOP)}, "sync.timeout_seconds=20")
    assert replaced(ended) == [0, 1, 0, 0]
    assert "engine 0 does not answer; a fresh engine takes its place" in ended.said
    assert "restarts" not in ended.results
    assert differences(ended, undisturbed) == {}


@pytest.mark.slow
def test_a_trainer_that_dies_before_its_first_checkpoint_begins_again(
    run_with: Runner, undisturbed: Ended
) -> None:
    ended = run_with({(1, "sync"): trainer(0, signal.SIGKILL), (1, "pack"): trainer(1, signal.SIGKILL)})
    assert ["trainer rank 0 died" in why for why in ended.results["restarts"]] == [True, False]
    assert "resuming from" not in ended.said
    assert differences(ended, undisturbed) == {}


@pytest.mark.slow
def test_a_trainer_that_always_dies_ends_the_run_by_name(run_with: Runner) -> None:
    with pytest.raises(GivenUp, match=r"trainer rank 1 died: .* \(after 3 recoveries that gained nothing\)"):
        run_with({(0, "pack"): trainer(1, signal.SIGKILL)}, again=True)


@pytest.mark.slow
def test_sft_survives_a_killed_rank(sft_run: WholeRun, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = (*sft_run.arguments, "parallel.data=2")
    (tmp_path / "whole").mkdir()
    whole = whole_run(arguments, tmp_path / "whole")
    with started(*arguments, f"dir={directory}", scratch=tmp_path) as run:
        run.wait_for(lambda: (directory / "checkpoints/step-00000010").exists())
        os.kill(run.pids_of("ray::_Worker")[0], signal.SIGKILL)
        finished = run.wait()
        run.assert_nothing_left()
    assert finished.code == 0, finished.err
    assert re.search(r"trainer rank \d died: .*; the trainer starts again", finished.out)
    assert repeatable(metrics_of(directory)) == repeatable(metrics_of(whole.directory))
    for file in sorted((whole.directory / "hf").iterdir()):
        assert (directory / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
    assert partial_files(directory) == []
