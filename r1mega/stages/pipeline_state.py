"""pipeline.json: what a pipeline has done, so that the same command continues. One writer, replaced in one step.

{"pipeline": "tiny", "title": ..., "stages": {name: Record}}; the report and `r1mega lineage` read it too.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from r1mega.config import ConfigError
from r1mega.stages.fingerprint import Fingerprint
from r1mega.stages.run_directory import write_json

FILE, LOCK = "pipeline.json", ".pipeline.lock"
WAIT_SECONDS = 60.0
"""For the stage of a killed pipeline to end."""


@dataclass
class Record:
    """One stage's last start and what came of it."""

    status: str = "running"
    """"running" (or killed while it was) | "finished" | "failed"."""
    config: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Setting -> "stage/artefact"."""
    command: str = ""
    title: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    """Artefact -> checksum when it was finished."""
    began: str = ""
    ended: str = ""
    attempts: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the whole process tree; a killed pipeline's last attempt is not in it."""
    gpu_seconds: float = 0.0
    """Wall seconds times the GPUs that the stage held (trainer ranks, engines, reward models), busy or not."""
    tokens: int = 0
    """Trained on (SFT) or sampled (RL, data, evaluation), where the stage counts them."""
    anew: bool = False
    """To be run from its beginning (`--from`), not yet begun."""
    message: str = ""
    """Why it failed."""

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.config, self.code, self.inputs)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def read(dir: str | Path) -> dict[str, Record]:
    """Records by stage; empty where no pipeline has run."""
    stages = _stored(dir).get("stages", {})
    known = {entry.name for entry in dataclasses.fields(Record)}
    return {
        name: Record(**{key: value for key, value in record.items() if key in known})
        for name, record in stages.items()
    }


def check_owner(dir: str | Path, identity: str) -> None:
    """ConfigError when the folder belongs to another pipeline."""
    owner = _stored(dir).get("pipeline", identity)
    if owner != identity:
        raise ConfigError(
            f"{dir} belongs to the pipeline {owner!r}, not {identity!r}: choose another with dir=PATH"
        )


def _stored(dir: str | Path) -> dict[str, Any]:
    file = Path(dir) / FILE
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); restore it, or choose another dir=PATH"
        ) from error


class State:
    """Context manager: holds the pipeline's lock and its records. ConfigError when another pipeline holds it."""

    def __init__(self, dir: str | Path, identity: str, title: str):
        self.dir, self.identity, self.title = Path(dir), identity, title

    def __enter__(self) -> State:
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.dir / LOCK, "a+")
        try:
            self._take()
            check_owner(self.dir, self.identity)
            self.records = read(self.dir)
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def descriptor(self) -> int:
        """A stage inherits it, so that the lock is held until the stage of a killed pipeline has ended too."""
        return self._lock.fileno()

    def _take(self) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = _holder(self._lock)
                if _alive(holder):
                    raise ConfigError(
                        f"{self.dir}: another pipeline is using this directory (process {holder}); "
                        "wait for it or choose another with dir=PATH"
                    ) from None
                if time.monotonic() > until:
                    raise ConfigError(
                        f"{self.dir}: the last stage of a pipeline that was killed (process {holder}) has not "
                        "ended yet; wait for it"
                    ) from None
                time.sleep(0.1)
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def save(self) -> None:
        stages = {name: dataclasses.asdict(record) for name, record in self.records.items()}
        write_json(self.dir / FILE, {"pipeline": self.identity, "title": self.title, "stages": stages})


def _holder(lock: TextIO) -> int:
    lock.seek(0)
    text = lock.read()
    return int(text) if text.isdigit() else 0


def _alive(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()
