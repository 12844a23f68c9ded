"""`r1mega pipeline configs/tiny`, killed in stages of every kind and started again: its table tells the paper's story."""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, started, succeeded

from r1mega.pipeline_folder import PipelineFolder
from r1mega.stages.pipeline_state import read

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow, pytest.mark.timeout(7200)]

KILLED_IN = ("base", "cold_start", "dev2", "safety", "eval_dev3")
"""Stages of every kind: fine-tuning, data, RL, a reward model, an evaluation."""
SECONDS_INTO_A_STAGE = 10.0
STAGE_SECONDS = 3000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("tiny_pipeline")
    directory = scratch / "run"
    arguments = ("pipeline", "configs/tiny", f"dir={directory}")
    for stage in KILLED_IN:
        with started(*arguments, scratch=scratch) as run:
            run.wait_for(lambda stage=stage: _has_begun(directory, stage), STAGE_SECONDS)
            time.sleep(SECONDS_INTO_A_STAGE)
            known = run.descendants()
            run.signal(signal.SIGKILL)
            run.assert_nothing_left(known)
    with started(*arguments, scratch=scratch) as run:
        finished = run.wait(STAGE_SECONDS)
    assert finished.code == 0, finished.err
    return directory


def _has_begun(directory: Path, stage: str) -> bool:
    """Whether there is work to go on from: a stage that is killed before that begins anew, and counts as begun once."""
    folder = directory / stage
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return bool(names - {"config.py", "error.log", ".lock"})


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    spec = importlib.util.spec_from_file_location(
        "compare_pipelines", ROOT / "tools" / "compare_pipelines.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found: dict[str, Any] = tool.measured(PipelineFolder(folder))
    return found


def test_every_stage_is_finished_and_five_were_begun_twice(folder: Path) -> None:
    records = read(folder)
    assert {record.status for record in records.values()} == {"finished"}
    assert {name for name, record in records.items() if record.attempts > 1} == set(KILLED_IN)


def test_each_stage_does_its_job(measured: dict[str, dict[str, dict[str, float]]]) -> None:
    def value(stage: str, metric: str, suite: str = "bilingual") -> float:
        return measured[stage][suite][metric]

    assert value("zero", "pass@1") > value("base", "pass@1") + 0.2, "RL alone lifts the accuracy"
    assert value("zero", "language") < 0.8, "and mixes languages"
    assert value("dev1", "format") > value("base", "format"), "the cold start lifts the format"
    assert value("dev1", "readable") > value("base", "readable") + 0.1, "and the readability"
    assert value("dev1", "language") > value("zero", "language") + 0.1, "with less mixing than R1-Zero"
    assert value("dev2", "pass@1") > value("dev1", "pass@1"), "RL lifts the accuracy"
    assert value("dev2", "language") > value("dev2_mixed", "language") + 0.1, "the reward keeps one language"
    broader = value("dev3", "pass@1", "small_talk") - value("dev2", "pass@1", "small_talk")
    assert broader > 0.3, "Dev-3 broadens"
    assert value("r1", "pass@1") > value("dev3", "pass@1") - 0.02, "R1 keeps the accuracy"
    assert value("distilled", "pass@1") > value("student_zero", "pass@1"), "distilled beats RL alone"


def test_a_checkpoint_and_a_row_name_the_base_they_come_from(folder: Path, tmp_path: Path) -> None:
    tree = succeeded("lineage", str(folder / "r1" / "hf"), "--json", scratch=tmp_path).out
    assert "model_bilingual" in tree
    assert str(folder / "base" / "hf") in tree
    row = succeeded("lineage", f"{folder}/rejection/data.jsonl:1", "--json", scratch=tmp_path).out
    assert str(folder / "dev2" / "hf") in row
    assert json.loads(row)


def test_the_report_shows_every_stage(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in read(folder))
    assert "To know before reading on" not in page
