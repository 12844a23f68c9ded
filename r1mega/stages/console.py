"""What a user sees while a stage runs: phases with their time, a table with one row per step, results.

Plain lines that survive a log file; on a terminal a progress line for long phases is redrawn in place.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

HEADER_EVERY = 25


TITLES = {
    "response_length": "length",
    "tokens_per_second": "tok/s",
    "grad_norm": "gradnorm",
    "time/generate": "gen s",
    "time/train": "train s",
    "time/sync": "sync s",
    "time/step": "step s",
}
FORMATS = {
    "step": "{:d}",
    "accuracy": "{:.1%}",
    "format": "{:.1%}",
    "response_length": "{:.1f}",
    "tokens_per_second": "{:,.0f}",
    "lr": "{:.1e}",
    "kl": "{:.4f}",
    "entropy": "{:.3f}",
    "loss": "{:.4f}",
    "reward": "{:.3f}",
    "grad_norm": "{:.3f}",
}


class Console:
    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.started = time.monotonic()
        self._drawn = 0

    def line(self, text: str = "") -> None:
        self._clear()
        print(text, file=self.stream, flush=True)

    def phase(self, text: str) -> None:
        self.line(f"[{time.monotonic() - self.started:6.1f}s] {text}")

    note = phase

    def result(self, name: str, value: object) -> None:
        self.line(f"  {name:<28} {value}")

    def progress(self, text: str, done: int, total: int) -> None:
        """Redraw one line on a terminal; silent elsewhere."""
        if not self.stream.isatty():
            return
        width = 30
        bar = "━" * round(width * done / max(1, total))
        self._clear()
        text = f"  {text} {bar:<{width}} {done}/{total}"
        self.stream.write(text)
        self.stream.flush()
        self._drawn = len(text)

    def _clear(self) -> None:
        if self._drawn:
            self.stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def table(self, columns: Sequence[str]) -> Table:
        return Table(self, columns)


class Table:
    """Rows of metrics under a header that is repeated every HEADER_EVERY rows."""

    def __init__(self, console: Console, columns: Sequence[str]):
        self.console, self.columns, self.rows = console, columns, 0

    def row(self, step: int, metrics: dict[str, float], of: int) -> None:
        if self.rows % HEADER_EVERY == 0:
            self.console.line(" ".join(f"{TITLES.get(c, c):>9}" for c in self.columns))
        self.rows += 1
        cells = {"step": step} | metrics
        texts = [FORMATS.get(c, "{:.2f}").format(cells[c]) if c in cells else "-" for c in self.columns]
        self.console.line(" ".join(f"{text:>9}" for text in texts))
        self.console.progress("run", step, of)
