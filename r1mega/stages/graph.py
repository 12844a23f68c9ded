"""A pipeline as a value: stages, what each takes from which, and what must hold before anything starts.

`configs/<name>/pipeline.py` binds `pipeline` to a `Pipeline`. A stage's folder is <pipeline's dir>/<stage>; what it
leaves there are its artefacts ("hf", "data.jsonl"), and another stage takes one by naming it:
`Stage("dev1", config, inputs={"model.path": "base/hf"})`. The graph of the R1 paper (figure 2) is such a value.

A stage's config is a RunConfig or another frozen dataclass with a field `dir` and two attributes that are no fields:
`command`, the `r1mega` command that takes its config file, and `artefacts`, names or patterns of what it leaves.
A method `check()` may raise ConfigError before the pipeline starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from r1mega import checks, overrides
from r1mega.config import ConfigError, RunConfig

FILE = "pipeline.py"
COMMON = ("results.json", "lineage.json", "metrics.jsonl", "checkpoints/*")
RUN_ARTEFACTS = {
    "rl": ("hf", "samples.jsonl", "report.html", *COMMON),
    "sft": ("hf", *COMMON),
    "reward_model": ("hf", *COMMON),
    "preference_pairs": ("pairs.jsonl", "votes.jsonl", *COMMON[:2]),
}
"""What `r1mega run` leaves, by `RunConfig.stage`."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PIPELINE_SETTINGS = ("dir", "seed")
"""Overrides of the whole pipeline; every other begins with a stage's name."""


@dataclass(frozen=True)
class Stage:
    name: str
    """Also the name of its folder."""
    config: Any
    inputs: dict[str, str] = field(default_factory=dict)
    """Setting -> "stage/artefact"; when the stage runs, the setting is the artefact's path."""
    title: str = ""
    """One line for `--show` and the report."""

    @property
    def command(self) -> str:
        return "run" if isinstance(self.config, RunConfig) else self.config.command

    @property
    def artefacts(self) -> tuple[str, ...]:
        if isinstance(self.config, RunConfig):
            return RUN_ARTEFACTS[self.config.stage]
        return tuple(self.config.artefacts)

    @property
    def kind(self) -> str:
        return self.config.stage if isinstance(self.config, RunConfig) else self.command

    @property
    def parents(self) -> tuple[str, ...]:
        """Stages it takes something from, each once."""
        return tuple(dict.fromkeys(source.partition("/")[0] for source in self.inputs.values()))

    def makes(self, artefact: str) -> bool:
        first = artefact.partition("/")[0]
        return any(fnmatchcase(artefact, made) or first == made for made in self.artefacts)


@dataclass(frozen=True)
class Pipeline:
    stages: tuple[Stage, ...]
    dir: str = ""
    """Empty means runs/<folder of the pipeline's file>."""
    title: str = ""

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    def folder(self, name: str) -> Path:
        return Path(self.dir) / name

    def path(self, source: str) -> Path:
        """Where the artefact "stage/artefact" lies."""
        return Path(self.dir) / source

    def resolved(self, stage: Stage) -> Any:
        """The stage's config with its folder and the paths of its inputs."""
        config = overrides.replace(stage.config, "dir", str(self.folder(stage.name)))
        for setting, source in stage.inputs.items():
            config = overrides.replace(config, overrides.full_name(config, setting), str(self.path(source)))
        return config

    def used(self, name: str) -> list[str]:
        """Artefacts of a stage that other stages take, as "stage/artefact"."""
        sources = (source for stage in self.stages for source in stage.inputs.values())
        return sorted({source for source in sources if source.partition("/")[0] == name})

    def after(self, name: str) -> set[str]:
        """The stage and all that take from it, directly or not."""
        found = {name}
        for stage in order(self):
            if found & set(stage.parents):
                found.add(stage.name)
        return found


def identity(path: str | Path) -> str:
    """The name that a pipeline's folder is kept under: of its file's folder, and of the file if it is not pipeline.py."""
    file = _file(path).resolve()
    return file.parent.name if file.name == FILE else f"{file.parent.name}/{file.stem}"


def _file(path: str | Path) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _present(path: str | Path) -> Path:
    """The pipeline's file; FileNotFoundError with the nearest folder that holds one."""
    if _file(path).is_file():
        return _file(path)
    wanted = Path(path).parent if Path(path).suffix == ".py" else Path(path)
    around = next((parent for parent in wanted.parents if parent.is_dir()), Path())
    folders = {
        file.parent.name: file.parent for root in (Path("configs"), around) for file in root.glob(f"*/{FILE}")
    }
    near = [str(folders[name]) for name in difflib.get_close_matches(wanted.name, folders, n=1)]
    what = f"no {FILE} in the folder {path}" if Path(path).is_dir() else f"no pipeline {path}"
    hint = f"did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(f"{what}; {hint}a pipeline is a folder with {FILE}, or such a file")


def load(path: str | Path, texts: Sequence[str] = ()) -> Pipeline:
    """The checked pipeline of a folder or file, with `dir=`, `seed=` and `stage.section.field=value` overrides.

    `seed` goes to every stage that has one. An override of an input's setting takes the place of the input, so
    that a stage can start from any path. Raises FileNotFoundError or ConfigError, one line each.
    """
    pipeline = overrides.bound(_present(path), "pipeline", Pipeline)
    if not pipeline.dir:
        pipeline = dataclasses.replace(pipeline, dir=str(Path("runs") / identity(path)))
    check(pipeline)
    pipeline = _with_overrides(pipeline, texts)
    check_configs(pipeline)
    return pipeline


# ---- overrides ----------------------------------------------------------------------------------------


def _with_overrides(pipeline: Pipeline, texts: Sequence[str]) -> Pipeline:
    of_stage: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        stage, dot, _ = name.strip().partition(".")
        if not equals:
            raise ConfigError(
                f"{text!r} is not NAME=VALUE; an override looks like seed=2 or STAGE.num_steps=5"
            )
        if not dot and stage == "dir":
            pipeline = dataclasses.replace(pipeline, dir=value.strip())
        elif not dot and stage == "seed":
            pipeline = dataclasses.replace(
                pipeline, stages=tuple(_seeded(entry, text) for entry in pipeline.stages)
            )
        elif dot and stage in pipeline.names:
            of_stage.setdefault(stage, []).append(text.strip().removeprefix(f"{stage}."))
        else:
            raise ConfigError(
                f"{text}: {did_you_mean(stage, [*pipeline.names, *PIPELINE_SETTINGS])}"
                f"an override of a pipeline is dir=, seed= or STAGE.section.field=, STAGE one of {', '.join(pipeline.names)}"
            )
    stages = tuple(_overridden(stage, of_stage.get(stage.name, [])) for stage in pipeline.stages)
    return dataclasses.replace(pipeline, stages=stages)


def _seeded(stage: Stage, text: str) -> Stage:
    if not hasattr(stage.config, "seed"):
        return stage
    return dataclasses.replace(stage, config=overrides.apply(stage.config, [text]))


def _overridden(stage: Stage, texts: list[str]) -> Stage:
    try:
        config = overrides.apply(stage.config, texts)
        names = {overrides.full_name(config, text.partition("=")[0].strip()) for text in texts}
        kept = {
            name: source
            for name, source in stage.inputs.items()
            if overrides.full_name(config, name) not in names
        }
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name}: {error}") from None
    return dataclasses.replace(stage, config=config, inputs=kept)


# ---- checks -------------------------------------------------------------------------------------------


def check(pipeline: Pipeline) -> None:
    """Raise ConfigError with the first thing that makes the value no pipeline."""
    for complaint in (*_names(pipeline), *_kinds(pipeline)):
        raise ConfigError(complaint)
    for stage in pipeline.stages:
        for complaint in _inputs(pipeline, stage):
            raise ConfigError(f"stage {stage.name}: {complaint}")
    order(pipeline)


def _names(pipeline: Pipeline) -> Iterator[str]:
    if not pipeline.stages:
        yield "the pipeline has no stages; give it at least one Stage(name, config)"
    seen: set[str] = set()
    for name in pipeline.names:
        if not NAME.fullmatch(name) or name in PIPELINE_SETTINGS:
            yield (
                f"stage {name!r}: a stage's name is letters, digits, - and _, and none of {', '.join(PIPELINE_SETTINGS)}"
            )
        if name in seen:
            yield f"two stages are called {name}; each needs a name, and so a folder, of its own"
        seen.add(name)


def _kinds(pipeline: Pipeline) -> Iterator[str]:
    for stage in pipeline.stages:
        config, name = stage.config, type(stage.config).__name__
        known = isinstance(config, RunConfig) or (hasattr(config, "command") and hasattr(config, "artefacts"))
        if not dataclasses.is_dataclass(config) or not known or not hasattr(config, "dir"):
            yield (
                f"stage {stage.name}: a {name} is no stage's config; it must be a RunConfig, or a dataclass with "
                "`dir`, `command` and `artefacts`"
            )
        elif isinstance(config, RunConfig) and config.stage not in RUN_ARTEFACTS:
            near = did_you_mean(config.stage, RUN_ARTEFACTS)
            yield f"stage {stage.name}: stage={config.stage}: {near}it is one of {', '.join(RUN_ARTEFACTS)}"


def _inputs(pipeline: Pipeline, stage: Stage) -> Iterator[str]:
    settings: dict[str, str] = {}
    for setting, source in stage.inputs.items():
        parent, _, artefact = source.partition("/")
        if parent not in pipeline.names:
            yield (
                f"input {setting} takes {source!r}, and there is no stage {parent!r}; {did_you_mean(parent, pipeline.names)}"
                f"the stages are {', '.join(pipeline.names)}"
            )
        elif not artefact or ".." in Path(artefact).parts:
            yield f"input {setting} takes {source!r}; an input looks like {parent}/{pipeline[parent].artefacts[0]}"
        elif not pipeline[parent].makes(artefact):
            made = pipeline[parent].artefacts
            yield (
                f"input {setting} takes {source!r}, which {parent} ({pipeline[parent].kind}) does not make; "
                f"{did_you_mean(artefact, made)}it makes {', '.join(made)}"
            )
        try:
            name = overrides.full_name(stage.config, setting)
        except ConfigError as error:
            yield f"inputs: {error}"
            continue
        if name in settings:
            yield f"inputs {settings[name]} and {setting} are one setting; keep one"
        settings[name] = setting


def check_configs(pipeline: Pipeline) -> None:
    """Every stage's own checks, before the first begins."""
    for stage in pipeline.stages:
        config = pipeline.resolved(stage)
        try:
            if isinstance(config, RunConfig):
                checks.check(config)
            elif hasattr(config, "check"):
                config.check()
        except ValueError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error


def order(pipeline: Pipeline) -> list[Stage]:
    """Stages such that each follows what it takes from, otherwise as written. ConfigError names a cycle."""
    done: dict[str, Stage] = {}
    while len(done) < len(pipeline.stages):
        ready = (s for s in pipeline.stages if s.name not in done and set(s.parents) <= done.keys())
        stage = next(ready, None)
        if stage is None:
            raise ConfigError(
                f"the stages take from each other in a circle: {' <- '.join(_cycle(pipeline, done))}"
            )
        done[stage.name] = stage
    return list(done.values())


def _cycle(pipeline: Pipeline, done: Mapping[str, Stage]) -> list[str]:
    walk = [next(name for name in pipeline.names if name not in done)]
    while len(set(walk)) == len(walk):
        walk.append(next(parent for parent in pipeline[walk[-1]].parents if parent not in done))
    return walk[walk.index(walk[-1]) :]


def did_you_mean(text: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(text, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
