"""Files and folders that a config names: what a stage reads besides what its graph hands it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega import overrides
from r1mega.data.suites import named_suites
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.graph import Stage

WRITTEN = {"dir", "cache", "offload"}
"""Settings that name what a stage writes."""
READ = {
    "path", "paths", "eval_path", "tokenizer", "helpful_model", "safety_model", "few_shot", "direct", "human", "general",
    "decontaminate", "generations", "contests",
}  # fmt: skip
"""Settings that name what a stage reads."""


def missing_inputs(stage: Stage, pipeline_dir: Path) -> Iterator[tuple[str, str]]:
    """(setting, path) of what a stage is to read and is not there, but for what other stages make."""
    config = stage.config
    from_graph = {overrides.full_name(config, setting) for setting in stage.inputs}
    evaluates = isinstance(config, EvaluationConfig)
    for setting, value in overrides.settings(config).items():
        if setting.rpartition(".")[2] not in READ and not (evaluates and setting == "model"):
            continue
        for name, text, _ in _texts(setting, value):
            made = name in from_graph or Path(text).resolve().is_relative_to(pipeline_dir.resolve())
            if text and not made and not text.startswith("generated:") and not Path(text).exists():
                yield name, text
    if evaluates and not config.generations:
        for name in config.suites:
            try:
                named_suites([name], config.data, operations=config.operations)
            except FileNotFoundError:
                yield "suites" if "=" in name or Path(name).suffix else "data", f"{config.data}, suite {name}"


def named_files(config: Any) -> dict[str, Path]:
    """Setting -> path, for every text setting that is the path of something that exists.

    Only a text with a slash in it, or a setting called path or paths, counts as a path: `task="math"` is none, whatever
    lies in the working directory. Among the words of a list only files count. An evaluation's suites are the files (of
    MGSM the folder) that their names stand for.
    """
    found: dict[str, Path] = {}
    for setting, value in overrides.settings(config).items():
        leaf = setting.rpartition(".")[2]
        if leaf in WRITTEN:
            continue
        for name, text, listed in _texts(setting, value):
            is_path = "/" in text or (leaf.endswith(("path", "paths")) and text)
            if is_path and (Path(text).is_file() or (not listed and Path(text).is_dir())):
                found[name] = Path(text)
    if isinstance(config, EvaluationConfig):
        found |= _suite_files(config)
    return found


def _suite_files(config: EvaluationConfig) -> dict[str, Path]:
    """Those that the names of its suites stand for, where they are there; generated suites have none."""
    found: dict[str, Path] = {}
    for name in config.suites:
        try:
            ((suite, path),) = named_suites([name], config.data, operations=config.operations)
        except FileNotFoundError:
            continue  # `missing_inputs` tells of it
        if suite.file or path.is_file():
            found[f"suites.{suite.name}"] = path
    return found


def _texts(setting: str, value: Any) -> Iterator[tuple[str, str, bool]]:
    if isinstance(value, str):
        yield setting, value, False
    elif isinstance(value, dict):
        yield from ((f"{setting}.{key}", item, False) for key, item in value.items() if isinstance(item, str))
    elif isinstance(value, list | tuple):
        yield from ((f"{setting}.{i}", item, True) for i, item in enumerate(value) if isinstance(item, str))
