"""What a pipeline's stages left in their folders, for its report: read once, and every fault noted in words.

Nothing here raises for a stage's file: a report of a half-done or damaged pipeline shows the rest.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from r1mega.config import ConfigError
from r1mega.data.chat import THINK
from r1mega.data.responses import parse_response
from r1mega.report import clip, merge_steps
from r1mega.rewards.readability import readability
from r1mega.stages.graph import Pipeline, Stage, order
from r1mega.stages.pipeline_state import FILE, Record, read
from r1mega.training.metrics import read_jsonl

QUESTIONS = 8
"""Questions of a suite whose answers are shown: those that all its stages were asked, or else any."""
MAX_READ = 2000
"""Answers of a suite whose format and readability are judged."""
MAX_PROMPT = 4000
"""Characters at the end of a prompt that are searched for the question."""


@dataclass(frozen=True)
class Begun:
    """Stands for the config of a stage that pipeline.json tells of."""

    command: str
    artefacts: ClassVar[tuple[str, ...]] = ("*",)
    dir: str = ""


@dataclass(frozen=True)
class Reading:
    """Of one suite's answers: shares in [0, 1], and where the first answer to each question stands."""

    format: float
    readable: float
    file: Path
    places: dict[str, int]
    """Question's id -> the byte at which the row of its first answer begins."""

    def answer(self, key: str) -> dict[str, Any]:
        with self.file.open("rb") as lines:
            lines.seek(self.places[key])
            row = json.loads(lines.readline())
        return clip(row | {"response": f"{THINK}{row['response']}"} if _opened(row) else row)


@dataclass
class Evaluated:
    """One stage's model, as an eval stage measured it."""

    stage: str
    """Whose model; the eval stage's model path where no stage made it."""
    suites: dict[str, dict[str, Any]]
    read: dict[str, Reading] = field(default_factory=dict)


class PipelineFolder:
    """ConfigError when pipeline.json is damaged; FileNotFoundError when there is none."""

    def __init__(self, dir: str | Path):
        self.dir = Path(dir)
        self.problems: list[str] = []
        self.title, self.records = _begun(self.dir / FILE)
        stages = [_stage(name, record, self.records) for name, record in self.records.items()]
        self.problems += [f"{name} failed: {r.message}" for name, r in self.records.items() if r.message]
        self.pipeline = Pipeline(tuple(stages), str(self.dir), self.title)
        self.stages: Sequence[Stage] = order(self.pipeline)
        self.results = cache(self._results)
        self.metrics = cache(self._metrics)

    # ---- files of one stage ---------------------------------------------------------------------------

    def _results(self, name: str) -> dict[str, Any]:
        found = self._object(name, "results.json")
        for alarm in found.get("alarms") or ():
            self.problems.append(f"{name}: {alarm}")
        return found

    def manifest(self, name: str) -> dict[str, Any]:
        if self.records[name].command != "data":
            return {}
        return self._object(name, "manifest.json")

    def _metrics(self, name: str) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, one a step; empty for stages that train nothing."""
        if (
            self.records[name].command != "run"
            or self.records[name].config.get("stage") == "preference_pairs"
        ):
            return []
        file = self.dir / name / "metrics.jsonl"
        if not self._there(name, file):
            return []
        try:
            return merge_steps(row | {"step": int(row["step"])} for row in read_jsonl(file))
        except (ValueError, KeyError, TypeError) as error:
            self._unreadable(file, error)
            return []

    def _object(self, name: str, file_name: str) -> dict[str, Any]:
        file = self.dir / name / file_name
        if not self._there(name, file):
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__} and not an object")
        except ValueError as error:
            self._unreadable(file, error)
            return {}
        return found

    def _there(self, name: str, file: Path) -> bool:
        if file.is_file():
            return True
        if self.records[name].status == "finished":
            self.problems.append(f"{file.relative_to(self.dir)} is missing, though {name} is finished")
        return False

    def _unreadable(self, file: Path, error: Exception) -> None:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        self.problems.append(f"{file.relative_to(self.dir)} cannot be read: {words}")

    # ---- evaluations ----------------------------------------------------------------------------------

    def evaluated(self) -> list[Evaluated]:
        """In the order of the stages that are measured, which is that of the graph."""
        places = {stage.name: place for place, stage in enumerate(self.stages)}
        found = []
        for stage in self.stages:
            record = self.records[stage.name]
            if record.command != "eval":
                continue
            source = record.sources.get("model", "").partition("/")[0]
            suites = self.results(stage.name).get("suites")
            one = Evaluated(
                source or str(record.config.get("model") or stage.name),
                {
                    name: value
                    for name, value in suites.items()
                    if isinstance(value, dict) and "pass@1" in value
                }
                if isinstance(suites, dict)
                else {},
            )
            for file in sorted((self.dir / stage.name / "generations").glob("*.jsonl")):
                reading = self._reading(file)
                if reading is not None:
                    one.read[file.stem] = reading
            found.append((places.get(source, len(places)), one))
        return [one for _, one in sorted(found, key=lambda pair: pair[0])]

    def _reading(self, file: Path) -> Reading | None:
        """None where there is no row, or the file is damaged."""
        formats: list[bool] = []
        readable: list[float] = []
        places: dict[str, int] = {}
        try:
            for place, row in _rows(file):
                if len(formats) < MAX_READ:
                    cut = row["finish_reason"] == "length"
                    parsed = parse_response(row["response"], opened=_opened(row), truncated=cut)
                    formats.append(parsed.ok)
                    readable.append(readability(parsed.reasoning or row["response"])[0])
                if row["index"] == 0:
                    places[row["id"]] = place
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._unreadable(file, error)
            return None
        if not formats:
            return None
        return Reading(sum(formats) / len(formats), sum(readable) / len(readable), file, places)

    def answers(self, evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
        """Some questions and each stage's first answer to them, suite by suite."""
        found = []
        for suite in dict.fromkeys(name for one in evaluated for name in one.read):
            asked = [(one.stage, one.read[suite]) for one in evaluated if suite in one.read]
            keys = [set(reading.places) for _, reading in asked]
            chosen = sorted(set.intersection(*keys) or set.union(*keys), key=_place)[:QUESTIONS]
            for key in chosen:
                answers = [(stage, reading.answer(key)) for stage, reading in asked if key in reading.places]
                found.append({
                    "suite": suite, "question": _question([row["prompt"] for _, row in answers]),
                    "answers": [
                        {"stage": stage} | {name: row.get(name) for name in ("response", "verdict", "correct", "tokens")}
                        for stage, row in answers
                    ],
                })  # fmt: skip
        return found


def _begun(file: Path) -> tuple[str, dict[str, Record]]:
    """Title and records of pipeline.json."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} is not the directory of a pipeline")
    try:
        records = read(file.parent)
        for record in records.values():
            record.config, record.sources = dict(record.config), dict(record.sources)
            record.wall_seconds, record.cpu_seconds = float(record.wall_seconds), float(record.cpu_seconds)
            record.gpu_seconds = float(record.gpu_seconds)
            record.tokens, record.attempts = int(record.tokens), int(record.attempts)
        return str(json.loads(file.read_text(encoding="utf-8")).get("title", "")), records
    except ConfigError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not what a pipeline writes ({error}); restore it") from error


def _stage(name: str, record: Record, records: Mapping[str, Record]) -> Stage:
    """The stage as far as pipeline.json tells of it; its kind is that of the graph's own drawing."""
    kind = record.config.get("stage", "run") if record.command == "run" else record.command
    known = {s: source for s, source in record.sources.items() if source.partition("/")[0] in records}
    return Stage(name, Begun(str(kind)), known, record.title)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it begins, row); whole lines only: an evaluation may be appending."""
    place = 0
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n") and line.strip():
                yield place, json.loads(line)
            place += len(line)


def _opened(row: Mapping[str, Any]) -> bool:
    """The prompt itself begins the reasoning."""
    return row["prompt"].rstrip().endswith(THINK)


def _place(key: str) -> tuple[int, str]:
    """An order that has nothing to do with the questions', the same in every evaluation."""
    return zlib.crc32(key.encode()), key


def _question(prompts: Sequence[str]) -> str:
    """What the stages' prompts have in common: their templates differ."""
    common, *others = (prompt[-MAX_PROMPT:] for prompt in prompts)
    for prompt in others:
        match = SequenceMatcher(None, common, prompt, autojunk=False).find_longest_match()
        common = common[match.a : match.a + match.size]
    return common.strip()
