"""Stages x metrics of several runs of one pipeline, as a markdown table and JSON: what the README and the docs show.

    python tools/compare_pipelines.py docs/benchmarks/tiny_pipeline.json runs/tiny_pipeline runs/two runs/three

A cell is the mean over the runs, and the lowest and highest of them. All numbers come from the stages' evaluations, by
the report's own reading (r1mega/pipeline_folder.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1mega.pipeline_folder import PipelineFolder

METRICS = ("pass@1", "cons@k", "format", "language", "readable", "tokens")


def measured(folder: PipelineFolder) -> dict[str, dict[str, dict[str, float]]]:
    """Stage -> suite -> metric."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in folder.evaluated():
        for suite, metrics in one.suites.items():
            values = {name: metrics.get(name) for name in METRICS}
            values["language"] = metrics.get("language_consistency")
            if suite in one.read:
                values["format"], values["readable"] = one.read[suite].format, one.read[suite].readable
            found.setdefault(one.stage, {})[suite] = {k: v for k, v in values.items() if v is not None}
    return found


def summary(directories: Sequence[str]) -> dict[str, Any]:
    """Every run's numbers, and what they took."""
    runs = []
    for directory in directories:
        folder = PipelineFolder(directory)
        records = folder.records.values()
        runs.append({
            "seed": next((r.config["seed"] for r in records if "seed" in r.config), None),
            "stages": {name: record.status for name, record in folder.records.items()},
            "wall_minutes": round(sum(r.wall_seconds for r in records) / 60, 1),
            "cpu_minutes": round(sum(r.cpu_seconds for r in records) / 60, 1),
            "measured": measured(folder),
        })  # fmt: skip
    return {"title": folder.title, "runs": runs}


def table(found: dict[str, Any], columns: Sequence[tuple[str, str]]) -> str:
    """columns: (suite, metric) pairs."""
    runs = [run["measured"] for run in found["runs"]]
    lines = ["| stage | " + " | ".join(f"{suite} {metric}" for suite, metric in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for stage in dict.fromkeys(stage for run in runs for stage in run):
        cells = [_cell([_value(run, stage, *column) for run in runs], column[1]) for column in columns]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(run: dict[str, Any], stage: str, suite: str, metric: str) -> float | None:
    return run.get(stage, {}).get(suite, {}).get(metric)


def _cell(values: Sequence[float | None], metric: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    show = "{:.1f}" if metric == "tokens" else "{:.1%}"
    mean = show.format(sum(known) / len(known))
    return mean if len(known) == 1 else f"{mean} ({show.format(min(known))} to {show.format(max(known))})"


def main(out: str, *directories: str) -> None:
    found = summary(directories)
    Path(out).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    suites = dict.fromkeys(s for run in found["runs"] for by in run["measured"].values() for s in by)
    present = {
        (suite, metric)
        for run in found["runs"]
        for by in run["measured"].values()
        for suite, values in by.items()
        for metric in values
    }
    columns = [(suite, metric) for suite in suites for metric in METRICS if (suite, metric) in present]
    print(table(found, columns))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
