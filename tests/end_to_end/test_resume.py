"""A run that is killed, interrupted, repeated or started twice."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import WholeRun, metrics_of, partial_files, r1mega, started

pytestmark = pytest.mark.end_to_end

TIMED = ("time", "tokens_per_second", "samples_per_second", "peak_memory_gib")


def repeatable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that do not depend on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMED and not k.startswith("time/")} for line in lines]


def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(rl_run: WholeRun, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = (*rl_run.arguments, f"dir={directory}")
    with started(*arguments, scratch=tmp_path) as run:
        run.wait_for(lambda: (directory / "checkpoints/step-00000002").exists())
        time.sleep(random.Random().random() * 2)
        known = run.descendants()
        assert len(known) > 4, "driver, watcher, Ray, trainer and engine"
        run.signal(signal.SIGKILL)
        run.assert_nothing_left(known)
    with started(*arguments, scratch=tmp_path) as run:
        finished = run.wait()
        run.assert_nothing_left()
    assert finished.code == 0, finished.err
    resumed = re.search(r"resuming from \S+/step-0000000\d \(step (\d)\)", finished.out)
    assert resumed, finished.out
    assert int(resumed[1]) in (2, 4, 5)
    assert repeatable(metrics_of(directory)) == repeatable(metrics_of(rl_run.directory))
    assert partial_files(directory) == []


@pytest.mark.parametrize("how, within_seconds", [(signal.SIGINT, 15.0), (signal.SIGTERM, 1.0)])
def test_an_interrupted_run_ends_with_one_line_and_no_process(
    how: signal.Signals, within_seconds: float, rl_run: WholeRun, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    with started(*rl_run.arguments, "num_steps=1000", f"dir={directory}", scratch=tmp_path) as run:
        run.wait_for(lambda: run.says("starting 1 trainer"))
        time.sleep(random.Random().random() * within_seconds)
        known = run.descendants()
        run.signal(how, to_group=how == signal.SIGINT)  # as Ctrl-C does
        finished = run.wait(seconds=60)
        run.assert_nothing_left(known)
    assert finished.code == 130
    assert finished.message == "r1mega: interrupted; the same command continues from the last checkpoint"
    assert not (directory / "error.log").exists()


def test_a_finished_run_says_so(rl_run: WholeRun, tmp_path: Path) -> None:
    again = r1mega(*rl_run.arguments, f"dir={rl_run.directory}", scratch=tmp_path)
    assert again.code == 0
    assert f"{rl_run.directory} is finished (5 steps)" in again.out
    assert "dir=PATH" in again.out


def test_another_setting_in_the_same_directory_is_refused(rl_run: WholeRun, tmp_path: Path) -> None:
    before = (rl_run.directory / "config.json").read_bytes()
    finished = r1mega(*rl_run.arguments, f"dir={rl_run.directory}", "optimizer.lr=1e-4", scratch=tmp_path)
    assert finished.code == 2
    assert re.search(r"holds a run with optimizer\.lr=0\.0003, now 0\.0001: .*dir=PATH", finished.message)
    assert (rl_run.directory / "config.json").read_bytes() == before


def test_more_steps_continue_a_finished_run(rl_run: WholeRun, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(rl_run.directory, directory)
    with started(*rl_run.arguments, f"dir={directory}", "num_steps=6", scratch=tmp_path) as run:
        run.wait_for(lambda: run.says("resuming from"))
        run.signal(signal.SIGSTOP)  # it must still run when the second one looks
        second = r1mega(*rl_run.arguments, f"dir={directory}", "num_steps=6", scratch=tmp_path)
        run.signal(signal.SIGCONT)
        assert second.code == 2, second.err
        assert "another run is using this directory" in second.message
        finished = run.wait()
        run.assert_nothing_left()
    assert finished.code == 0, finished.err
    assert f"resuming from {directory}/checkpoints/step-00000005 (step 5)" in finished.out
    lines = metrics_of(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:5] == metrics_of(rl_run.directory), "earlier lines stay as they are"
