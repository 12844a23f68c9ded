"""`r1mega run` as a user starts it: a process of its own, whose descendants are found again afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega import cluster_watch

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("R1MEGA_SHARED", ROOT.parent / "shared"))
MARK = "R1MEGA_TEST_RUN"
TIMEOUT_SECONDS = 240.0
EXIT_SECONDS = 30.0

ENDLESS = "9^{9^{9^{9}}}"
"""An answer whose comparison never ends."""


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"one line was due on stderr, not {len(lines)}:\n{self.err}"
        return lines[0]


class Run:
    """One started command. Processes it starts inherit a mark in their environment."""

    def __init__(self, arguments: tuple[str, ...], scratch: Path, wrapper: tuple[str, ...] = ()):
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        environment.pop(cluster_watch.VARIABLE, None)  # of a cluster that the tests themselves hold
        name = scratch / f"output-{self.mark}"
        self.out, self.err = name.with_suffix(".out"), name.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "r1mega", *arguments],
                cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> Finished:
        code = self.process.wait(timeout=seconds)
        return Finished(code, self.out.read_text(), self.err.read_text())

    def wait_for(self, condition: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> None:
        """Until the condition holds; fails when the run ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, (
                f"the run ended:\n{self.out.read_text()}\n{self.err.read_text()}"
            )
            assert time.monotonic() < deadline, f"waited {seconds} s in vain:\n{self.out.read_text()}"
            time.sleep(0.05)

    def says(self, text: str) -> bool:
        return text in self.out.read_text()

    def signal(self, number: signal.Signals, to_group: bool = False) -> None:
        """To the driver, or as a terminal does to its whole process group."""
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    def descendants(self) -> set[int]:
        """Processes that carry the mark, or belong to the private cluster of one that does."""
        marked = set(_processes_with(f"{MARK}={self.mark}"))
        for folder in {folder for pid in marked if (folder := _variable(pid, cluster_watch.VARIABLE))}:
            marked |= set(cluster_watch.processes_of(folder))
        return marked - {os.getpid()}

    def pids_of(self, command: str) -> list[int]:
        """Descendants whose name (as `ps` shows it) contains `command`."""
        return [pid for pid in self.descendants() if command in _command_line(pid)]

    def assert_nothing_left(self, known: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """No process of the run is alive; `known`: descendants seen earlier."""
        deadline = time.monotonic() + EXIT_SECONDS
        while left := self.descendants() | {pid for pid in known if _alive(pid)}:
            assert time.monotonic() < deadline, f"left: {[(pid, _command_line(pid)) for pid in left]}"
            time.sleep(0.1)

    def end(self) -> None:
        for pid in self.descendants() | {self.process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=EXIT_SECONDS)


@contextmanager
def started(*arguments: str, scratch: Path, wrapper: tuple[str, ...] = ()) -> Iterator[Run]:
    """`r1mega ARGUMENTS`, ended in any case."""
    run = Run(arguments, scratch, wrapper)
    try:
        yield run
    finally:
        run.end()


def r1mega(*arguments: str, scratch: Path, wrapper: tuple[str, ...] = ()) -> Finished:
    """`r1mega ARGUMENTS` to its end; fails when it leaves a process."""
    with started(*arguments, scratch=scratch, wrapper=wrapper) as run:
        finished = run.wait()
        run.assert_nothing_left()
        return finished


def succeeded(*arguments: str, scratch: Path) -> Finished:
    finished = r1mega(*arguments, scratch=scratch)
    assert finished.code == 0, f"exit code {finished.code}\n{finished.out}\n{finished.err}"
    return finished


@dataclass(frozen=True)
class WholeRun:
    """A run that came to its end, and how to start it once more elsewhere."""

    directory: Path
    arguments: tuple[str, ...]
    finished: Finished


def whole_run(arguments: tuple[str, ...], scratch: Path) -> WholeRun:
    directory = scratch / "run"
    finished = succeeded(*arguments, f"dir={directory}", scratch=scratch)
    return WholeRun(directory, arguments, finished)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def partial_files(directory: Path) -> list[str]:
    """What a write that did not finish would leave."""
    hidden = [path for path in directory.rglob(".*") if path.name not in (".lock", ".metadata")]
    return sorted(str(path.relative_to(directory)) for path in hidden)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completions(seed: int, count: int = 400) -> list[dict[str, Any]]:
    """Sums answered at random in the right format; a few of the answers are endless."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        question = f"{rng.randrange(10)}+{rng.randrange(10)}"
        answer = str(rng.randrange(10)) if rng.random() < 0.85 else ENDLESS
        text = f"<think>{question}</think><answer>{answer}</answer>"
        rows.append({"prompt": question, "completion": text})
    return rows


def sums() -> list[dict[str, Any]]:
    return [{"question": f"{a}+{b}", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]


def _processes_with(entry: str) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and _alive(int(name)) and entry in _environment(int(name)):
            yield int(name)


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:  # ended meanwhile
        return []


def _variable(pid: int, name: str) -> str:
    values = [entry.partition("=")[2] for entry in _environment(pid) if entry.startswith(f"{name}=")]
    return values[0] if values else ""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    """Running: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
