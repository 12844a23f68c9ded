"""`r1mega bench rewards`: throughput, latency and verdict tables of every reward, each number beside its goal.

Labelled sets come from the folder of --shared (or R1MEGA_SHARED); without it each part uses what it can generate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1mega.bench import (
    reward_code,
    reward_judge,
    reward_math,
    reward_overlap,
    reward_sandbox,
    reward_suites,
    reward_text,
    reward_training,
)
from r1mega.bench.reward_rows import Row
from r1mega.config import ConfigError

Measure = Callable[[Path | None], list[Row]]

PARTS: dict[str, Measure] = {
    "math": reward_math.measure,
    "jail": reward_sandbox.measure,
    "code": reward_code.measure,
    "text": reward_text.measure,
    "judge": reward_judge.measure,
    "suites": reward_suites.measure,
    "training": reward_training.measure,
    "overlap": reward_overlap.measure,
}
"""In the order of the table. The last three take minutes each."""


def run(parts: Sequence[str] = (), shared: str | None = None, trace: Path | None = None) -> dict[str, Any]:
    """Measure the parts (all without any), print each table as it is ready, return the numbers.

    trace: where to keep the Chrome trace of a step with a slow reward, if the part "overlap" runs.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"--parts {','.join(parts)}: {unknown[0]!r} is none of {', '.join(PARTS)}")
    folder = Path(shared or os.environ.get("R1MEGA_SHARED", ""))
    found = folder if (folder / "data").is_dir() else None
    if found is None:
        print("no labelled sets (--shared DIR): only what can be generated is measured")
    results: dict[str, Any] = {}
    for part in parts or PARTS:
        began = time.monotonic()
        rows = reward_overlap.measure(trace=trace) if part == "overlap" else PARTS[part](found)
        print(table(part, rows, time.monotonic() - began), flush=True)
        results[part] = [asdict(row) for row in rows]
    return results


def table(part: str, rows: Sequence[Row], seconds: float) -> str:
    """One part's rows as aligned text."""
    names = max((len(row.name) for row in rows), default=0)
    lines = [f"\n{part} (measured in {seconds:.0f} s)"]
    for row in rows:
        goal = f"goal {row.goal}" if row.goal else ""
        lines.append(
            f"  {row.name:<{names}}  {_number(row.value):>10} {row.unit:<18} {goal:<18} {row.note}".rstrip()
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
