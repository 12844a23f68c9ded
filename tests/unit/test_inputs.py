"""What a stage reads besides what its graph hands it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.stages.command import CommandStage
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.fingerprint import Checksums, fingerprint
from r1mega.stages.graph import Pipeline, Stage
from r1mega.stages.inputs import named_files


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of two suites, seen from the folder around them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/math").mkdir(parents=True)
    (tmp_path / "data/math/math500.jsonl").write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    (tmp_path / "data/mgsm").mkdir()
    (tmp_path / "data/mgsm/mgsm_de.tsv").write_text("Wie viele?\t2\n")
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "1 + 1", "answer": "2"}) + "\n")
    return tmp_path


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    "suite, path",
    [
        ("math500", "data/math/math500.jsonl"),
        ("math500=data/math/math500.jsonl", "data/math/math500.jsonl"),
        ("MATH-500", "data/math/math500.jsonl"),
        ("mgsm", "data/mgsm"),
        ("own.jsonl", "own.jsonl"),
    ],
)
def test_a_suite_s_file_is_what_its_name_stands_for(suite: str, path: str) -> None:
    assert Path(path) in named_files(EvaluationConfig(suites=(suite,), data="data")).values()


@pytest.mark.usefixtures("data")
def test_a_generated_suite_and_one_whose_file_is_missing_have_none() -> None:
    assert named_files(EvaluationConfig(suites=("chain", "gsm8k"), data="data")) == {}


def test_an_evaluation_s_fingerprint_tells_a_changed_suite(data: Path) -> None:
    config = EvaluationConfig(suites=("math500", "mgsm"), data="data")
    pipeline = Pipeline(
        (Stage("evaluation", config), Stage("other", CommandStage(argv=("true",)))), dir="run"
    )

    def now() -> dict[str, str]:
        return fingerprint(pipeline, pipeline["evaluation"], Checksums(data / "sums.json"), {}).inputs

    before = now()
    (data / "data/math/math500.jsonl").write_text(json.dumps({"problem": "1 + 2", "answer": "33"}) + "\n")
    (data / "data/mgsm/mgsm_de.tsv").write_text("Wieviel?\t3\n")
    after = now()
    assert {name for name in after if before[name] != after[name]} == {"data/math/math500.jsonl", "data/mgsm"}
