"""References measured in processes of their own: built once, then one timed round at each request.

The class `Measured` starts `python -m r1mega.bench.processes`, which receives `(cls, args)`, builds the object
and answers every line with what `object.round()` returns.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from r1mega.cluster import THREAD_VARIABLES

LOG_TAIL = 2000
"""Characters of a failed process's log that are shown."""


class Measured:
    """A process around `cls(*args)`; the constructor returns at once, `ready()` waits."""

    def __init__(
        self, cls: type, *args: Any, log: Path, threads: int = 1, env: Mapping[str, str] | None = None
    ):
        self.log = log
        threads_env = dict.fromkeys(THREAD_VARIABLES, str(threads))
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "r1mega.bench.processes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **threads_env, **(env or {})},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        pickle.dump((cls, args), self.stdin)
        self.stdin.flush()

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()

    def ready(self) -> None:
        self.answer()

    def ask(self) -> None:
        """Start a round; `answer()` waits for its result."""
        self.stdin.write(b"\n")
        self.stdin.flush()

    def answer(self) -> Any:
        try:
            return pickle.load(self.stdout)
        except EOFError:
            code = self.process.wait()
            tail = self.log.read_text(errors="replace")[-LOG_TAIL:]
            raise RuntimeError(
                f"a reference process ended with exit code {code}; its log ends:\n{tail}"
            ) from None


def round_together(processes: Sequence[Measured]) -> tuple[float, list[Any]]:
    """One round in all of them at the same time: (seconds until the last is done, their results)."""
    began = time.monotonic()
    for process in processes:
        process.ask()
    results = [process.answer() for process in processes]
    return time.monotonic() - began, results


def main() -> None:
    """The process, until its standard input closes. What libraries print goes to standard error, the log."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    cls, args = pickle.load(sys.stdin.buffer)
    measured = cls(*args)
    result: Any = None
    while True:
        pickle.dump(result, answers)
        answers.flush()
        if not sys.stdin.buffer.readline():
            return
        result = measured.round()


if __name__ == "__main__":
    main()
