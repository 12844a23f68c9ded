"""Runs a pipeline: each stage in a process of its own, nothing twice, and the same command continues.

A stage is skipped when it is finished and its config, the code and its inputs' contents are as they were; so what
follows a stage that ran again runs again only if that stage's outputs differ. Stages that fail stop the pipeline.
Old work is never deleted: a stage that begins anew moves its folder to <stage>.replaced-<n>.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1mega import overrides, platforms
from r1mega.config import ConfigError
from r1mega.stages import child, pipeline_state
from r1mega.stages.console import Console
from r1mega.stages.fingerprint import Checksums, Fingerprint, code_version, fingerprint
from r1mega.stages.graph import Pipeline, Stage, did_you_mean, order
from r1mega.stages.inputs import missing_inputs
from r1mega.stages.pipeline_cost import gpus_of, tokens_of
from r1mega.stages.pipeline_state import Record, State
from r1mega.stages.run_directory import RESUMABLE, write_text

CHECKSUMS = ".checksums.json"
CONFIG_FILE = "config.py"
SAVE_SECONDS = 10.0


class StageFailed(Exception):
    """A stage ended with a fault; `code` is the exit status for the pipeline."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


@dataclass(frozen=True)
class Choice:
    """Which stages, and how."""

    start: str = ""
    """`--from`: this stage and all that depend on it anew."""
    only: str = ""
    """`--only`: this stage and no other."""
    dry: bool = False
    ignore_code: bool = False
    """Finished work stands though the code changed."""


@dataclass(frozen=True)
class Decision:
    action: str
    """"skip" | "run" | "continue" | "again"."""
    why: str


def run(pipeline: Pipeline, identity: str, choice: Choice, console: Console) -> None:
    """Bring every chosen stage to its end. ConfigError before anything is touched, StageFailed afterwards."""
    for name in filter(None, (choice.start, choice.only)):
        if name not in pipeline.names:
            near = did_you_mean(name, pipeline.names)
            raise ConfigError(f"no stage {name!r}; {near}the stages are {', '.join(pipeline.names)}")
    pipeline_state.check_owner(pipeline.dir, identity)
    records = pipeline_state.read(pipeline.dir)
    _check_paths(pipeline, records, choice)
    if choice.dry:
        _Runner(pipeline, records, choice, console).show()
        return
    with State(pipeline.dir, identity, pipeline.title) as state:
        _Runner(pipeline, state.records, choice, console, state).run()


def _check_paths(pipeline: Pipeline, records: dict[str, Record], choice: Choice) -> None:
    """ConfigError for a file or folder that a stage is to read and that is not there, before the first stage runs.

    What a stage has read that is finished and stays so may be gone.
    """
    anew = pipeline.after(choice.start) if choice.start else set()
    for stage in order(pipeline):
        record = records.get(stage.name, Record())
        stands = _finished(pipeline.folder(stage.name)) and not record.anew and stage.name not in anew
        stands = stands and (choice.ignore_code or record.code == code_version())
        now = json.loads(json.dumps(overrides.settings(stage.config), default=str))
        same = {name for name, value in now.items() if stands and record.config.get(name) == value}
        for setting, path in missing_inputs(stage, Path(pipeline.dir)):
            if choice.only in ("", stage.name) and not {setting, setting.rpartition(".")[0]} & same:
                raise ConfigError(
                    f"stage {stage.name}: {setting}={path}: no such file or folder; paths begin at the working "
                    f"directory, here {Path.cwd()}: start where it lies, or set {stage.name}.{setting}=PATH"
                )


class _Runner:
    def __init__(
        self,
        pipeline: Pipeline,
        records: dict[str, Record],
        choice: Choice,
        console: Console,
        state: State | None = None,
    ):
        self.pipeline, self.records, self.choice, self.console = pipeline, records, choice, console
        self.state = state
        self.checksums = Checksums(Path(pipeline.dir) / CHECKSUMS)
        self.stages = [stage for stage in order(pipeline) if choice.only in ("", stage.name)]
        self.width = max(map(len, pipeline.names))
        for stage in self.stages if choice.start else ():
            if stage.name in records and stage.name in pipeline.after(choice.start):
                records[stage.name].anew = True

    def show(self) -> None:
        """What would run, and why; writes nothing."""
        running: set[str] = set()
        for stage in self.stages:
            awaited = [source for source in stage.inputs.values() if source.partition("/")[0] in running]
            record = self.records.get(stage.name, Record())
            known = {source: record.inputs.get(source, "") for source in awaited}
            self._check_inputs(stage, awaited)
            decision = self._decide(stage, fingerprint(self.pipeline, stage, self.checksums, known))
            if decision.action != "skip":
                running.add(stage.name)
            elif awaited:
                running.add(stage.name)
                decision = Decision("maybe", f"if {', '.join(awaited)} comes out differently")
            self._line(stage, decision)

    def run(self) -> None:
        assert self.state is not None
        self.state.save()  # of --from: a killed pipeline continues it without being told again
        for stage in self.stages:
            self._check_inputs(stage)
            present = fingerprint(self.pipeline, stage, self.checksums, {})
            self.checksums.save()
            decision = self._decide(stage, present)
            self._line(stage, decision)
            if self.choice.only:
                self._note_old_parents(stage)
            if decision.action == "skip":
                self._finish(stage)
            else:
                self._execute(stage, present, decision)

    def _line(self, stage: Stage, decision: Decision) -> None:
        number = self.pipeline.names.index(stage.name) + 1
        place = f"{number}/{len(self.pipeline.names)}"
        self.console.note(f"{place:>5} {stage.name:<{self.width}}  {decision.action:<8}  {decision.why}")

    def _note_old_parents(self, stage: Stage) -> None:
        """With --only, what a stage takes may be of an earlier version of its maker: that is the user's choice."""
        for parent in stage.parents:
            maker, record = self.pipeline[parent], self.records[parent]
            decision = self._decide(maker, fingerprint(self.pipeline, maker, self.checksums, record.inputs))
            if decision.action != "skip":
                self.console.note(
                    f"      {stage.name} takes the {parent} that is there; {parent}: {decision.why}"
                )

    # ---- deciding -------------------------------------------------------------------------------------

    def _check_inputs(self, stage: Stage, awaited: Sequence[str] = ()) -> None:
        """ConfigError unless every input is there, and is what its stage left."""
        for source in stage.inputs.values():
            parent, _, artefact = source.partition("/")
            if source in awaited:
                continue
            record, path = self.records.get(parent), self.pipeline.path(source)
            if record is None or not _finished(self.pipeline.folder(parent)):
                raise ConfigError(
                    f"stage {stage.name} needs {source}, and {parent} is not finished: run the pipeline without --only first"
                )
            if not path.exists():
                raise ConfigError(
                    f"stage {stage.name}: its input {path} is missing, though {parent} is finished: "
                    f"put it back, or make it anew with --from {parent}"
                )
            made = record.outputs.get(artefact)
            if made and (there := self.checksums(path)) != made:
                raise ConfigError(
                    f"stage {stage.name}: its input {path} is not what {parent} made (checksum {made}, now {there}): "
                    f"put it back, make it anew with --from {parent}, "
                    f"or say that it is yours with {stage.name}.{_setting(stage, source)}=PATH"
                )

    def _decide(self, stage: Stage, present: Fingerprint) -> Decision:
        record, folder = self.records.get(stage.name), self.pipeline.folder(stage.name)
        if record is None:
            if folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(
                    f"{folder} holds work that this pipeline did not make: remove it, or choose another directory with dir=PATH"
                )
            return Decision("run", "not run yet")
        if record.anew:
            return Decision("again", "--from")
        if not _holds_work(folder):
            reasons = {"finished": "its folder is gone", "failed": "failed before it began"}
            return Decision("run", reasons.get(record.status, "not run yet"))
        before = record.fingerprint
        changes = present.differences(before)
        if _finished(folder):
            if self.choice.ignore_code and changes == ["code"]:
                changes = []
            return (
                Decision("again", "; ".join(changes)) if changes else Decision("skip", "finished, unchanged")
            )
        resumable = all(name.startswith(RESUMABLE) for name in present.changed_settings(before))
        if resumable and not present.changed_inputs(before):
            why = "failed before" if record.status == "failed" else "stopped half-way"
            return Decision("continue", "; ".join([why, *changes]))
        return Decision("again", "; ".join(changes))

    # ---- doing ----------------------------------------------------------------------------------------

    def _execute(self, stage: Stage, present: Fingerprint, decision: Decision) -> None:
        assert self.state is not None
        folder = self.pipeline.folder(stage.name)
        if decision.action == "again":
            _move_aside(folder)
        record = self.records.get(stage.name, Record()) if decision.action == "continue" else Record()
        record = replace(
            record,
            status="running",
            config=present.config,
            code=present.code,
            inputs=present.inputs,
            sources=dict(stage.inputs),
            command=stage.command,
            title=stage.title,
            began=record.began or pipeline_state.now(),
            attempts=record.attempts + 1,
            message="",
        )
        self.records[stage.name] = record
        self.state.save()
        folder.mkdir(exist_ok=True)
        file = folder / CONFIG_FILE
        write_text(file, overrides.to_python(self.pipeline.resolved(stage)))
        state, saved = self.state, 0.0
        gpus, wall, gpu = _gpus(stage.config), record.wall_seconds, record.gpu_seconds

        def spent(seconds: float) -> None:
            record.wall_seconds, record.gpu_seconds = wall + seconds, gpu + seconds * gpus

        def tick(seconds: float) -> None:
            nonlocal saved
            spent(seconds)
            if seconds > saved + SAVE_SECONDS:
                saved = seconds
                state.save()

        command = [sys.executable, "-m", "r1mega", stage.command, str(file)]
        ended = child.run(command, [state.descriptor], tick)
        spent(ended.wall_seconds)
        record.cpu_seconds += ended.cpu_seconds
        if ended.leftovers:
            self.console.note(f"processes that stage {stage.name} started are still running")
        if ended.code or ended.interrupted or not _finished(folder):
            self._fail(record, stage, ended)
        self._finish(stage)
        tokens = f", {record.tokens:,} tokens" if record.tokens else ""
        gpus_held = f", {record.gpu_seconds:,.1f} GPU-s" if record.gpu_seconds else ""
        self.console.note(
            f"      {stage.name:<{self.width}}  finished  "
            f"{record.wall_seconds:,.1f} s, {record.cpu_seconds:,.1f} CPU-s{gpus_held}{tokens}"
        )

    def _fail(self, record: Record, stage: Stage, ended: child.Ended) -> None:
        assert self.state is not None
        if ended.code == 130 or ended.interrupted:
            self.state.save()
            raise KeyboardInterrupt
        words = ended.words if ended.code else "ended without finishing: no finished results.json"
        record.status, record.message = "failed", words
        self.state.save()
        raise StageFailed(f"stage {stage.name}: {words}", 2 if ended.code == 2 else 1)

    def _finish(self, stage: Stage) -> None:
        """Record a finished stage, once: also of a pipeline that was killed before it could."""
        assert self.state is not None
        record, folder = self.records[stage.name], self.pipeline.folder(stage.name)
        if record.status == "finished":
            return
        for artefact in _kept(self.pipeline, stage):
            path = folder / artefact
            if path.exists():
                record.outputs[artefact] = self.checksums(path)
            elif f"{stage.name}/{artefact}" in self.pipeline.used(stage.name):
                record.status, record.message = "failed", f"it made no {artefact}"
                self.state.save()
                raise StageFailed(f"stage {stage.name}: finished, but made no {path}, which others take", 1)
        record.status, record.ended, record.tokens = "finished", pipeline_state.now(), tokens_of(folder)
        self.checksums.save()
        self.state.save()


def _holds_work(folder: Path) -> bool:
    """Anything but what a stage refused before its beginning leaves."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return any(not name.startswith(".") for name in names - {CONFIG_FILE, "error.log"})


def _finished(folder: Path) -> bool:
    file = folder / "results.json"
    return file.is_file() and json.loads(file.read_text()).get("finished") is True


def _gpus(config: Any) -> int:
    try:
        return gpus_of(config, platforms.detect(getattr(config, "platform", "auto")))
    except ValueError:  # no such platform here: the stage will say so
        return 0


def _setting(stage: Stage, source: str) -> str:
    return next(setting for setting, taken in stage.inputs.items() if taken == source)


def _kept(pipeline: Pipeline, stage: Stage) -> Iterable[str]:
    """Artefacts whose checksum is recorded: those that others take, and those with a name and not a pattern."""
    used = [source.partition("/")[2] for source in pipeline.used(stage.name)]
    return dict.fromkeys([*used, *(name for name in stage.artefacts if "*" not in name)])


def _move_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    os.rename(folder, target)
