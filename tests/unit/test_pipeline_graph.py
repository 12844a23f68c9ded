"""A pipeline as a value: what is one and what is not, overrides, the order, the drawing."""

from __future__ import annotations

import xml.etree.ElementTree
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from r1mega.config import ConfigError, DataConfig, ModelConfig, RunConfig, SFTConfig
from r1mega.stages import graph_drawing
from r1mega.stages.command import CommandStage
from r1mega.stages.graph import Pipeline, Stage, check, identity, load, order

SFT = RunConfig(
    stage="sft", model=ModelConfig(path="m"), data=DataConfig(path="d"), sft=SFTConfig(max_length=8192)
)
SAMPLES = CommandStage(argv=("sample", "{model}", "{out}/data.jsonl"), makes=("data.jsonl", "shards/*.jsonl"))


def diamond(**stages: Stage) -> Pipeline:
    """Written last to first: the order follows from the inputs."""
    usual = {
        "dev3": Stage("dev3", SFT, {"model": "base/hf", "data.path": "rows/data.jsonl"}, "Dev-3 <&>"),
        "rows": Stage("rows", SAMPLES, {"paths.model": "dev1/hf"}),
        "dev1": Stage("dev1", SFT, {"model.path": "base/hf"}),
        "base": Stage("base", SFT),
    }
    return Pipeline(tuple((usual | stages).values()), dir="there", title="Diamond")


def test_a_stage_follows_what_it_takes_from() -> None:
    assert [stage.name for stage in order(diamond())] == ["base", "dev1", "rows", "dev3"]
    assert diamond().after("dev1") == {"dev1", "rows", "dev3"}


def test_a_resolved_stage_has_the_paths_of_its_inputs_and_its_folder() -> None:
    pipeline = diamond()
    config = pipeline.resolved(pipeline["dev3"])
    assert (config.model.path, config.data.path, config.dir) == (
        "there/base/hf",
        "there/rows/data.jsonl",
        "there/dev3",
    )
    assert pipeline.resolved(pipeline["rows"]).words(Path("o")) == ["sample", "there/dev1/hf", "o/data.jsonl"]


@dataclass(frozen=True)
class NoStage:
    dir: str = ""


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage("x", SFT, {"model": "bsae/hf"}), "no stage 'bsae'; did you mean 'base'? the stages are dev3,"),
        (Stage("x", SFT, {"model": "base"}), "an input looks like base/hf"),
        (Stage("x", SFT, {"model": "base/../../etc"}), "an input looks like base/hf"),
        (Stage("x", SFT, {"model": "base/samples.jsonl"}), "which base (sft) does not make; "),
        (Stage("x", SFT, {"data": "rows/dta.jsonl"}), "rows (command) does not make; did you mean 'data.jsonl'?"),
        (Stage("x", SFT, {"model.pth": "base/hf"}), "stage x: inputs: unknown setting 'model.pth'; did you mean 'model.path'?"),
        (Stage("x", SFT, {"sft": "base/hf"}), "'sft' is a section"),
        (Stage("x", SFT, {"model": "base/hf", "model.path": "dev1/hf"}), "inputs model and model.path are one setting"),
        (Stage("x", NoStage()), "a NoStage is no stage's config"),
        (Stage("x", replace(SFT, stage="stf")), "stage=stf: did you mean 'sft'?"),
        (Stage("base", SFT), "two stages are called base"),
        (Stage("a.b", SFT), "a stage's name is letters"),
        (Stage("seed", SFT), "a stage's name is letters"),
        (Stage("x", SFT, {"model": "x/hf"}), "in a circle: x <- x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_pipeline_is_told_in_one_line(stage: Stage, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(diamond(another=stage))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_circle_is_named_stage_by_stage() -> None:
    with pytest.raises(ConfigError, match=r"circle: rows <- dev1 <- rows$"):
        check(diamond(dev1=Stage("dev1", SFT, {"data": "rows/data.jsonl"})))


def test_an_empty_pipeline_is_none() -> None:
    with pytest.raises(ConfigError, match="no stages"):
        check(Pipeline(()))


@pytest.mark.parametrize("artefact", ["hf", "checkpoints/step-000003", "shards/a.jsonl", "hf/config.json"])
def test_an_artefact_may_be_a_pattern_or_lie_in_a_folder(artefact: str) -> None:
    makers = [Stage("x", SFT), Stage("y", SAMPLES)]
    assert any(stage.makes(artefact) for stage in makers)


PIPELINE = """
from dataclasses import replace
from test_pipeline_graph import diamond, SFT
from r1mega.stages.graph import Stage
pipeline = replace(diamond(base=Stage("base", replace(SFT, num_steps=3))), dir="")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/pipeline.py").write_text(PIPELINE)
    return tmp_path / "mine"


def test_a_folder_names_its_pipeline_and_its_run_directory(folder: Path) -> None:
    assert load(folder).dir == "runs/mine"
    assert load(folder / "pipeline.py", ["dir=elsewhere"]).dir == "elsewhere"
    assert (identity(folder), identity(folder / "pipeline.py")) == ("mine", "mine")
    assert identity(folder / "small.py") == "mine/small"


def test_a_seed_goes_to_every_stage_that_has_one_and_a_stage_s_own_wins(folder: Path) -> None:
    pipeline = load(folder, ["dev1.seed=9", "seed=7", "base.optimizer.lr=1e-4"])
    seeds = {stage.name: getattr(stage.config, "seed", None) for stage in pipeline.stages}
    assert seeds == {"base": 7, "dev1": 9, "dev3": 7, "rows": None}
    assert pipeline["base"].config.optimizer.lr == 1e-4
    assert pipeline["dev1"].config.optimizer.lr == RunConfig().optimizer.lr


def test_a_path_of_one_s_own_takes_the_place_of_an_input(folder: Path) -> None:
    pipeline = load(folder, ["dev1.model=/some/hf", "rows.paths.model=/other"])
    assert pipeline["dev1"].inputs == pipeline["rows"].inputs == {}
    assert pipeline.resolved(pipeline["dev1"]).model.path == "/some/hf"
    assert pipeline.resolved(pipeline["rows"]).paths == {"model": "/other"}
    assert pipeline["dev3"].inputs["model"] == "base/hf"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_steps=3", "an override of a pipeline is dir=, seed= or STAGE.section.field="),
        ("dev2.num_steps=3", "did you mean 'dev3'?"),
        ("dev3.num_stps=3", "stage dev3: unknown setting 'num_stps'; did you mean 'num_steps'?"),
        ("dev3.num_steps=many", "stage dev3: num_steps=many: num_steps takes a whole number"),
        ("seed=x", "seed takes a whole number"),
        ("dev3", "is not NAME=VALUE"),
        ("dev3.sft.batch_size=0", "stage dev3: sft.batch_size=0: it must be more than 0"),
        ("rows.argv=", "stage rows: argv=: give the program"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(folder: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, [override])
    assert words in str(caught.value)


def test_a_missing_or_wrong_file_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no pipeline {tmp_path}/none; a pipeline is a folder"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=rf"no pipeline .*; did you mean {folder}\?"):
        load(str(folder)[:-1])
    with pytest.raises(FileNotFoundError, match=rf"no pipeline .*; did you mean {folder}\?"):
        load(folder / "pipelin.py")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no pipeline\.py in the folder"):
        load(tmp_path / "empty")
    (folder / "pipeline.py").write_text("config = 1\n")
    with pytest.raises(ConfigError, match="binds no name `pipeline`"):
        load(folder)


def test_the_terminal_shows_the_graph() -> None:
    assert graph_drawing.text(diamond(), {"base": "finished"}).splitlines() == [
        "Diamond",
        "●    base             sft      finished",
        "├─●  dev1             sft                <- base/hf",
        "│ ●  rows             command            <- dev1/hf",
        "└─●  dev3  Dev-3 <&>  sft                <- base/hf, rows/data.jsonl",
    ]


def test_the_picture_is_svg_with_every_stage_and_edge() -> None:
    tree = xml.etree.ElementTree.fromstring(graph_drawing.svg(diamond(), {"base": "finished"}))
    space = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f"{space}circle")) == 4
    assert len(tree.findall(f"{space}path")) == 4
    assert "Dev-3 <&>" in "".join(tree.itertext())
