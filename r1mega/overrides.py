"""From a config file and the command line to a config, and back to text.

A config file is Python that binds `config`; every other change is `section.field=value`, parsed by the
type that the dataclass declares. A config is a RunConfig or any other frozen dataclass whose sections are
frozen dataclasses. Nothing here has defaults of its own: they live with the dataclasses.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from r1mega.config import PRESETS, ConfigError, RunConfig, Schedule, TaskWeights, Weights

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


Config = TypeVar("Config")
"""A frozen dataclass."""


@overload
def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load(path: str | Path, overrides: Sequence[str], kind: type[Config]) -> Config: ...
def load(path: str | Path, overrides: Sequence[str] = (), kind: type[Any] = RunConfig) -> Any:
    """The config that the file at `path` binds, with `section.field=value` overrides applied in order.

    A section's name alone sets its path: `model=DIR` is `model.path=DIR`. `kind` is the config's class or
    a base of it. Raises FileNotFoundError for a missing file, ConfigError (one line) for everything else
    that a user can mend.
    """
    return apply(bound(path, "config", kind), overrides)


def bound(path: str | Path, name: str, kind: type[Config]) -> Config:
    """What the Python file at `path` binds to `name`; raises as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}{_similar_files(path)}")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(
            f"{path}{_line_in(path, error)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if name not in names:
        raise ConfigError(f"{path}: binds no name `{name}`; end it with {name} = {kind.__name__}(...)")
    if not isinstance(names[name], kind):
        raise ConfigError(f"{path}: `{name}` is a {type(names[name]).__name__}, it must be a {kind.__name__}")
    return names[name]


def apply(config: Config, overrides: Sequence[str]) -> Config:
    """The config with `section.field=value` overrides applied in order."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not NAME=VALUE; an override looks like grpo.group_size=16")
        name = full_name(config, name.strip())
        config = replace(config, name, _parse(name, _hint_of(type(config), name), text.strip()))
    return config


def full_name(config: Any, name: str) -> str:
    """A setting's dotted name: a section's name alone stands for its path. ConfigError when there is none."""
    section = getattr(config, name) if name in typing.get_type_hints(type(config)) else None
    if dataclasses.is_dataclass(section):
        if not hasattr(section, "path"):
            first = dataclasses.fields(section)[0].name
            raise ConfigError(
                f"{name!r} is a section, not a setting; set one of its fields, as in {name}.{first}=..."
            )
        name = f"{name}.path"
    _hint_of(type(config), name)
    return name


def settings(config: Any) -> dict[str, Any]:
    """Every leaf of the config by its dotted name, in the order of its dataclass."""
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


def changed(config: Any) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ from the defaults: dotted name -> (value, default); a setting without one has "" there."""
    defaults: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if dataclasses.is_dataclass(default):
            defaults |= {f"{entry.name}.{name}": value for name, value in settings(default).items()}
        elif default is not dataclasses.MISSING:
            defaults[entry.name] = default
    return {
        name: (value, defaults.get(name, ""))
        for name, value in settings(config).items()
        if name not in defaults or value != defaults[name]
    }


def describe(config: Any) -> str:
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


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready dicts and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@overload
def from_dict(values: Mapping[str, Any]) -> RunConfig: ...
@overload
def from_dict(values: Mapping[str, Any], kind: type[Config]) -> Config: ...
def from_dict(values: Mapping[str, Any], kind: type[Any] = RunConfig) -> Any:
    """The config that `to_dict` wrote; absent settings take their defaults. ConfigError on unknown ones."""
    sections = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        section = sections.get(name)
        if dataclasses.is_dataclass(section) and isinstance(value, Mapping):
            for leaf in value:
                _hint_of(kind, f"{name}.{leaf}")
            arguments[name] = section(**{leaf: _tuples(item) for leaf, item in value.items()})  # type: ignore[operator]
        else:
            _hint_of(kind, name)
            arguments[name] = _tuples(value)
    return kind(**arguments)


@overload
def stored(path: Path) -> RunConfig: ...
@overload
def stored(path: Path, kind: type[Config]) -> Config: ...
def stored(path: Path, kind: type[Any] = RunConfig) -> Any:
    """The config of a run's config.json. ConfigError with the file where another version wrote it."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")), kind)
    except ConfigError as error:
        what = str(error).partition(";")[0]
        raise ConfigError(
            f"{path}: {what}: another version of r1mega wrote it; take that version, or another directory"
        ) from None


def to_python(config: Any) -> str:
    """A config file that binds exactly this config, every setting written out."""
    classes = dict.fromkeys(_classes(config))
    for strange in (kind for kind in classes if kind.__module__ in ("__main__", "<run_path>")):
        raise ConfigError(f"{strange.__name__} is defined in the config file itself; put it into a module")
    imports = sorted(f"from {kind.__module__} import {kind.__qualname__}" for kind in classes)
    return "\n".join([*imports, "", f"config = {_expression(config, 0)}", ""])


def _classes(value: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(value):
        yield type(value)
        value = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        yield from _classes(item)


def _expression(value: Any, depth: int) -> str:
    """A value as Python that evaluates to it; a dataclass takes one line a field."""
    if dataclasses.is_dataclass(value):
        names = (entry.name for entry in dataclasses.fields(value) if entry.init)
        lines = [f"{name}={_expression(getattr(value, name), depth + 1)}," for name in names]
        indent = "\n" + "    " * (depth + 1)
        return f"{type(value).__qualname__}({indent}{indent.join(lines)}{indent[:-4]})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_expression(item, depth)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        text = ", ".join(_expression(item, depth) for item in value)
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"({text}{comma})" if isinstance(value, tuple) else f"[{text}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    raise ConfigError(
        f"{value!r} ({type(value).__name__}) cannot stand in a config; use text, numbers, tuples, dicts"
    )


def replace(config: Config, name: str, value: Any) -> Config:
    """The config with one setting changed, by its dotted name; an entry of a dict is `field.key`."""
    section, dot, leaf = name.partition(".")
    old = getattr(config, section)
    if not dot:
        new = value
    elif isinstance(old, dict):
        new = old | {leaf: value}
    else:
        new = dataclasses.replace(old, **{leaf: value})
    return dataclasses.replace(config, **{section: new})  # type: ignore[type-var]


def _hint_of(kind: type, name: str) -> Any:
    """The declared type of a dotted setting; ConfigError with the nearest names when there is none."""
    hints = type_hints(kind)
    if name in hints:
        return hints[name]
    section, _, leaf = name.partition(".")
    if leaf and typing.get_origin(hints.get(section)) is dict:
        return typing.get_args(hints[section])[1]
    same_leaf = [known for known in hints if known.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, hints, n=1, cutoff=0.6)
    near_leaf = {known.rpartition(".")[2]: known for known in hints}
    by_leaf = [
        near_leaf[leaf]
        for leaf in difflib.get_close_matches(name.rpartition(".")[2], near_leaf, n=1, cutoff=0.8)
    ]
    sections = [entry.name for entry in dataclasses.fields(kind) if f"{entry.name}.path" in hints]
    by_section = difflib.get_close_matches(name, sections, n=1, cutoff=0.6)
    guesses = same_leaf or near or by_section or by_leaf
    mend = f"did you mean {' or '.join(map(repr, guesses))}?" if guesses else "--show lists all settings"
    raise ConfigError(f"unknown setting {name!r}; {mend}")


def type_hints(kind: type = RunConfig) -> dict[str, Any]:
    """Declared type of every leaf by its dotted name."""
    hints: dict[str, Any] = {}
    declared = typing.get_type_hints(kind)
    for name in (entry.name for entry in dataclasses.fields(kind)):
        hint = declared[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            leaves = typing.get_type_hints(hint)
            hints |= {f"{name}.{leaf.name}": leaves[leaf.name] for leaf in dataclasses.fields(hint)}
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


def _parse_texts(text: str) -> dict[str, str]:
    """name:value pairs; only the first colon of a pair divides."""
    pairs = [pair.partition(":") for pair in text.split(",") if text]
    if not all(colon for _, colon, _ in pairs):
        raise ValueError(text)
    return {name.strip(): value for name, _, value in pairs}


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
    dict[str, str]: _Type(_parse_texts, "a list of name:value", "source:runs/base/hf"),
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
