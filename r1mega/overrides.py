"""From a config file and the command line to a RunConfig, and back to text.

A config file is Python that binds `config`; every other change is `section.field=value`, parsed by the
type that the dataclass declares. Nothing here has defaults of its own: they live in config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import runpy
import shlex
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config import PRESETS, ConfigError, RunConfig, Schedule, TaskWeights, Weights

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that the file at `path` binds, with `section.field=value` overrides applied in order.

    A section's name alone sets its path: `model=DIR` is `model.path=DIR`.
    Raises FileNotFoundError for a missing file, ConfigError (one line) for everything else that a user
    can mend.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}{_similar_files(path)}")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(
            f"{path}{_line_in(path, error)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if "config" not in names:
        raise ConfigError(f"{path}: binds no name `config`; end it with config = RunConfig(...)")
    config = names["config"]
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: `config` is a {type(config).__name__}, it must be a RunConfig")
    for override in overrides:
        config = _override(config, override)
    return config


def settings(config: RunConfig) -> dict[str, Any]:
    """Every leaf of the config by its dotted name, in the order of config.py."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            values |= {
                f"{entry.name}.{leaf.name}": getattr(value, leaf.name) for leaf in dataclasses.fields(value)
            }
        else:
            values[entry.name] = value
    return values


def changed(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ from the defaults: dotted name -> (value, default)."""
    defaults = settings(RunConfig())
    return {
        name: (value, defaults[name]) for name, value in settings(config).items() if value != defaults[name]
    }


def describe(config: RunConfig) -> str:
    """The resolved run as text, one valid override a line, with the default where it differs."""
    differs = changed(config)
    lines = {name: shlex.quote(f"{name}={format_value(value)}") for name, value in settings(config).items()}
    width = max((len(lines[name]) for name in differs), default=0)
    text: list[str] = []
    section = ""
    for name, line in lines.items():
        if name.partition(".")[0] != section and "." in name:
            section = name.partition(".")[0]
            text.append("")
        if name in differs:
            line = f"{line:<{width}}  # default {format_value(differs[name][1]) or 'empty'}"
        text.append(line)
    return "\n".join(text)


def format_value(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        nested = any(isinstance(item, dict) for item in value.values())
        return json.dumps(value) if nested else ",".join(f"{name}:{item}" for name, item in value.items())
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON-ready dicts and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The config that `to_dict` wrote; absent settings take their defaults. ConfigError on unknown ones."""
    config = RunConfig()
    for name, value in values.items():
        leaves = (
            {f"{name}.{leaf}": item for leaf, item in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
        for leaf, item in leaves.items():
            _hint_of(leaf)
            config = _replace(config, leaf, _tuples(item))
    return config


# ---- one override -------------------------------------------------------------------------------------


def _override(config: RunConfig, override: str) -> RunConfig:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals:
        raise ConfigError(f"{override!r} is not NAME=VALUE; an override looks like grpo.group_size=16")
    section = getattr(config, name) if name in typing.get_type_hints(RunConfig) else None
    if dataclasses.is_dataclass(section):
        if not hasattr(section, "path"):
            first = dataclasses.fields(section)[0].name
            raise ConfigError(
                f"{name!r} is a section, not a setting; set one of its fields, as in {name}.{first}=..."
            )
        name = f"{name}.path"
    return _replace(config, name, _parse(name, _hint_of(name), text.strip()))


def _replace(config: RunConfig, name: str, value: Any) -> RunConfig:
    section, dot, leaf = name.partition(".")
    if not dot:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{leaf: value})}
    )


def _hint_of(name: str) -> Any:
    """The declared type of a dotted setting; ConfigError with the nearest names when there is none."""
    hints = type_hints()
    if name in hints:
        return hints[name]
    same_leaf = [known for known in hints if known.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, hints, n=1, cutoff=0.6)
    near_leaf = {known.rpartition(".")[2]: known for known in hints}
    by_leaf = [
        near_leaf[leaf]
        for leaf in difflib.get_close_matches(name.rpartition(".")[2], near_leaf, n=1, cutoff=0.8)
    ]
    sections = [entry.name for entry in dataclasses.fields(RunConfig) if f"{entry.name}.path" in hints]
    by_section = difflib.get_close_matches(name, sections, n=1, cutoff=0.6)
    guesses = same_leaf or near or by_section or by_leaf
    mend = f"did you mean {' or '.join(map(repr, guesses))}?" if guesses else "--show lists all settings"
    raise ConfigError(f"unknown setting {name!r}; {mend}")


def type_hints() -> dict[str, Any]:
    """Declared type of every leaf by its dotted name."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            hints |= {f"{name}.{leaf}": leaf_hint for leaf, leaf_hint in typing.get_type_hints(hint).items()}
        else:
            hints[name] = hint
    return hints


# ---- parsing by type ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Type:
    """How one declared type reads its text, and how it is called and exemplified in an error."""

    parse: Callable[[str], Any]
    called: str
    example: str


def _parse_bool(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(text)
    return BOOLEANS[text.lower()]


def _parse_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _parse_schedule(text: str) -> Schedule:
    """A plain number, or first_step:value pairs."""
    if ":" not in text:
        return ((0, int(text)),)
    pairs = [pair.split(":") for pair in text.split(",")]
    return tuple((int(first), int(value)) for first, value in pairs)


def _parse_weights(text: str) -> Weights:
    """name:weight pairs, or the name of a preset."""
    if text in PRESETS:
        return dict(PRESETS[text])
    pairs = [pair.split(":") for pair in text.split(",") if text]
    return {name.strip(): _parse_float(weight) for name, weight in pairs}


def _parse_task_weights(text: str) -> TaskWeights:
    """A JSON object of objects of numbers."""
    tasks = json.loads(text) if text else {}
    if not isinstance(tasks, dict) or not all(isinstance(row, dict) for row in tasks.values()):
        raise ValueError(text)
    return {
        task: {name: _parse_float(str(weight)) for name, weight in row.items()} for task, row in tasks.items()
    }


TYPES: dict[Any, _Type] = {
    bool: _Type(_parse_bool, "true or false", "true"),
    int: _Type(int, "a whole number", "16"),
    float: _Type(_parse_float, "a number", "1e-6"),
    str: _Type(str, "text", "name"),
    Schedule: _Type(
        _parse_schedule, "a whole number or a schedule first_step:value,...", "0:32768,8200:65536"
    ),
    Weights: _Type(
        _parse_weights, f"a list of term:weight, or one of {', '.join(PRESETS)}", "accuracy:1,format:1"
    ),
    TaskWeights: _Type(
        _parse_task_weights, "a JSON object task -> term -> weight", """'{"general": {"helpful": 1}}'"""
    ),
}


def _type_of(hint: Any) -> _Type:
    if hint in TYPES:
        return TYPES[hint]
    item, *rest = typing.get_args(hint)
    assert (typing.get_origin(hint), rest) == (tuple, [...]), f"no parser for {hint}"
    inner = TYPES[item]
    return _Type(
        lambda text: tuple(inner.parse(part) for part in text.split(",")) if text else (),
        f"a comma-separated list, each {inner.called}",
        f"{inner.example},{inner.example}",
    )


def _parse(name: str, hint: Any, text: str) -> Any:
    kind = _type_of(hint)
    try:
        return kind.parse(text)
    except ValueError:
        raise ConfigError(
            f"{name}={text}: {name} takes {kind.called}, for example {name}={kind.example}"
        ) from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# ---- one-line errors ----------------------------------------------------------------------------------


def _similar_files(path: Path) -> str:
    root = next((parent for parent in path.parents if parent.is_dir()), Path())
    known = sorted(str(found) for found in root.rglob("*.py")) if root.name else []
    near = difflib.get_close_matches(
        str(path), known or [str(found) for found in Path("configs").rglob("*.py")], n=1
    )
    return f"; did you mean {near[0]}?" if near else ""


def _line_in(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    return f":{lines[-1]}" if lines else ""


def _first_line(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return message.splitlines()[0] if message else "(no message)"
