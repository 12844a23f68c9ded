"""A run directory as one self-contained HTML file, and the learning curve as one SVG.

Everything the page shows is inside the file: no request leaves it (its content policy forbids them), so
it can be mailed, archived or opened years later. Text that came from a model, a data file or a config is
untrusted: it reaches the page escaped, or as JSON that the script only ever writes as text.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from r1mega.config import RunConfig
from r1mega.overrides import changed, format_value, stored
from r1mega.training.metrics import read_jsonl

PAGE = Path(__file__).parent / "report_page"
MAX_POINTS = 1500
"""Points of a curve in the page; longer runs are averaged over neighbouring steps."""
MAX_SAMPLES = 600
"""Outputs in the page, spread evenly over the run, the newest included."""
MAX_TEXT = 24_000
"""Characters of one output in the page; the middle of a longer one is left out, and said so."""

Row = dict[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` in a run directory and return its path.

    Reads config.json and metrics.jsonl, and where present samples.jsonl, results.json (accuracy before and
    after) and lineage.json (versions, hardware). FileNotFoundError when the first two are missing.
    """
    run_dir = Path(run_dir)
    for name in ("config.json", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(
                f"{run_dir / name} is missing: {run_dir} is not the directory of a run that has started, nor of a pipeline"
            )
    config = stored(run_dir / "config.json")
    rows = merge_steps(read_jsonl(run_dir / "metrics.jsonl"))
    samples = read_jsonl(run_dir / "samples.jsonl") if (run_dir / "samples.jsonl").is_file() else []
    results, lineage = _optional(run_dir / "results.json"), _optional(run_dir / "lineage.json")
    data = {
        "metrics": columns(thin(with_ends(rows, results), MAX_POINTS)),
        "samples": [clip(sample) for sample in spread(samples, MAX_SAMPLES)],
        "num_samples": len(samples),
        "chance": results.get("chance"),
        "paper": paper()["curves"] if config.stage == "rl" else {},
    }
    body = fill(
        (PAGE / "page.html").read_text(encoding="utf-8"),
        {
            "headline": _headline(results, rows),
            "settings": _settings_table(config),
            "lineage": _facts_table(lineage),
        },
    )
    return write_page(
        run_dir / "report.html", "run", run_dir.resolve().name, _subtitle(config, rows), body, "page.js", data
    )


def paper() -> dict[str, Any]:
    """The paper's numbers, for comparison: its stages' benchmarks, R1-Zero's curves, the data of Dev-3."""
    return json.loads((PAGE / "paper.json").read_text(encoding="utf-8"))


def write_page(
    path: Path, kind: str, title: str, subtitle: str, body: str, script: str, data: Mapping[str, Any]
) -> Path:
    """One file with everything inside. body: HTML; title and subtitle: text; script: a file that follows charts.js."""
    read = {
        name: (PAGE / name).read_text(encoding="utf-8")
        for name in ("frame.html", "page.css", "charts.js", script)
    }
    page = fill(
        read["frame.html"],
        {
            "kind": kind,
            "title": escape(title),
            "subtitle": escape(subtitle),
            "css": read["page.css"],
            "js": read["charts.js"] + read[script],
            "body": body,
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        },
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Put the parts at their {{name}} in one pass: a part that contains {{...}} is left alone."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


# ---- the data of the page -------------------------------------------------------------------------------


def merge_steps(rows: Iterable[Row]) -> list[Row]:
    """One row per step, ascending: an evaluation may be logged apart from its step's training numbers."""
    merged: dict[int, Row] = {}
    for row in rows:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    return [merged[step] for step in sorted(merged)]


def with_ends(rows: Sequence[Row], results: Mapping[str, Any]) -> list[Row]:
    """The steps with the held-out scores that results.json has from before the first and after the last."""
    ends = []
    for when, step in (("before", 0), ("after", rows[-1]["step"] if rows else 0)):
        for kind in ("sampled", "greedy"):
            score = results.get(when)
            if isinstance(score, dict) and isinstance(score.get(kind), dict) and "accuracy" in score[kind]:
                ends.append({"step": step, f"eval/{kind}": score[kind]["accuracy"]})
    return merge_steps([*ends, *rows]) if rows else []


def thin(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows: each the mean of neighbouring rows, at the step of the last of them."""
    if len(rows) <= limit:
        return list(rows)
    size = -(-len(rows) // limit)
    return [mean_row(rows[start : start + size]) for start in range(0, len(rows), size)]


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of every number, at the step and under the length limit of the last row."""
    mean: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) is not None]
        mean[name] = sum(values) / len(values) if values else None
    limit = {"max_tokens": rows[-1]["max_tokens"]} if rows[-1].get("max_tokens") else {}
    return mean | {"step": rows[-1]["step"]} | limit


def columns(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Rows as columns of equal length; a number that a row lacks is None. Six significant digits."""
    names = dict.fromkeys(name for row in rows for name in row if name != "time")
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def spread(samples: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` samples at even distances, the last one always among them."""
    if len(samples) <= limit:
        return list(samples)
    return [samples[(position + 1) * len(samples) // limit - 1] for position in range(limit)]


def clip(sample: Row) -> Row:
    text = sample["response"]
    if len(text) <= MAX_TEXT:
        return sample
    left_out = len(text) - MAX_TEXT
    middle = f"\n\n[… {left_out} characters left out …]\n\n"
    return sample | {"response": text[: MAX_TEXT // 2] + middle + text[-MAX_TEXT // 2 :]}


def _optional(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- the parts that are plain HTML ----------------------------------------------------------------------


def _subtitle(config: RunConfig, rows: Sequence[Row]) -> str:
    last = rows[-1]["step"] if rows else 0
    planned = f", {config.num_steps} planned" if config.num_steps else ""
    facts = [
        f"{config.stage} stage",
        f"last step {last}{planned}",
        f"model {config.model.path}",
        f"data {config.data.path}",
    ]
    seconds = [row["time/step"] for row in rows if row.get("time/step")]
    if seconds:
        facts.append(f"{duration(sum(seconds))} in steps")
    return "  ·  ".join([*facts, f"seed {config.seed}"])


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _headline(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    cards = [
        _accuracy_card(kind, results["before"][kind], results["after"][kind], results.get("chance"))
        for kind in ("sampled", "greedy")
        if kind in results.get("before", {}) and kind in results.get("after", {})
    ]
    for name, label, show in (
        ("accuracy", "Training accuracy", percent),
        ("reward", "Mean reward", plain),
        ("format", "Format rate", percent),
        ("response_length", "Response tokens", plain),
        ("tokens_per_second", "Tokens per second", plain),
        ("peak_memory_gib", "Peak memory, GiB", plain),
    ):
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values or (name == "accuracy" and cards):
            continue
        width = max(1, min(10, len(values) // 5))
        first, last = sum(values[:width]) / width, sum(values[-width:]) / width
        if name == "peak_memory_gib":
            first = last = max(values)
        was = f'<span class="was">{show(first)} →</span> ' if show(first) != show(last) else ""
        cards.append(f'<div class="card stat"><h3>{label}</h3><p class="value">{was}{show(last)}</p></div>')
    return "\n".join(cards)


def percent(value: float) -> str:
    return f"{value:.1%}"


def plain(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _accuracy_card(
    kind: str, before: Mapping[str, Any], after: Mapping[str, Any], chance: float | None
) -> str:
    """Held-out accuracy before and after on one scale of 0 to 100 %, with intervals and the chance level."""
    marks = "".join(interval_marks(name, entry) for name, entry in (("before", before), ("after", after)))
    if chance is not None:
        marks += f'<i class="chance" style="left:{chance:.2%}" title="chance {chance:.1%}"></i>'
    note = f"n = {int(after['n']):,}" if "n" in after else ""
    note += f"{', ' if note else ''}chance {chance:.0%}" if chance is not None else ""
    return (
        f'<div class="card stat wide"><h3>Held-out accuracy, {kind}</h3><p class="value">'
        f'<span class="was">{before["accuracy"]:.1%} →</span> {after["accuracy"]:.1%}</p>'
        f'<div class="scale">{marks}</div><p class="note">{escape(note)}</p></div>'
    )


def interval_marks(name: str, entry: Mapping[str, Any]) -> str:
    value, interval = float(entry["accuracy"]), entry.get("ci")
    dot = f'<b class="{name}" style="left:{value:.2%}" title="{name} {value:.1%}"></b>'
    if interval is None:
        return dot
    low, high = interval if isinstance(interval, list) else (value - interval, value + interval)
    low, high = max(0.0, low), min(1.0, high)
    return f'<i class="ci {name}" style="left:{low:.2%};width:{high - low:.2%}"></i>' + dot


def _settings_table(config: RunConfig) -> str:
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(format_value(value))}</td>"
        f'<td class="faint">{escape(format_value(default)) or "empty"}</td></tr>'
        for name, (value, default) in changed(config).items()
    )
    return f"<table><thead><tr><th>setting</th><td>this run</td><td>default</td></tr></thead><tbody>{lines}</tbody></table>"


def _facts_table(facts: Mapping[str, Any]) -> str:
    """Versions, hardware and origin, nested names joined by dots."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in _flat(facts, "")
    )
    return (
        f"<table><tbody>{lines}</tbody></table>"
        if lines
        else '<p class="faint">No lineage.json in this run.</p>'
    )


def _flat(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else value


# ---- the README's picture -------------------------------------------------------------------------------

CURVES = (("accuracy", "accuracy", "#2f6fde", "#6ea8ff"), ("format", "format", "#c2700c", "#f0a850"))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 56, 24, 52, 44


def learning_curve_svg(metrics: Sequence[Row], title: str = "R1-Zero: reward terms per step") -> str:
    """The accuracy and format curves, and the evaluations, as a self-contained SVG for light and dark pages.

    metrics: rows of metrics.jsonl. The raw curve is drawn faint, its running mean bold.
    """
    rows = merge_steps(metrics)
    last = max([row["step"] for row in rows], default=0) or 1

    def point(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value:.1f}"

    body, legend = _svg_axes(last), LEFT
    for name, label, _, _ in CURVES:
        pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not pairs:
            continue
        for css, values in (
            ("raw", [value for _, value in pairs]),
            ("mean", running_mean([v for _, v in pairs])),
        ):
            line = " ".join(point(step, value) for (step, _), value in zip(pairs, values, strict=True))
            body += f'<polyline class="{css} {name}" points="{line}"/>\n'
        body += f'<rect class="{name}" x="{legend}" y="34" width="14" height="4" rx="2"/>'
        body += f'<text x="{legend + 20}" y="40">{label} in training</text>\n'
        legend += 160
    for name, label, css in (
        ("eval/sampled", "held-out, sampled", "dot"),
        ("eval/greedy", "held-out, greedy", "ring"),
    ):
        pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if pairs:
            body += f'<circle class="{css}" cx="{legend + 7}" cy="36" r="4"/><text x="{legend + 18}" y="40">{label}</text>\n'
            legend += 150
        for step, value in pairs:
            x, y = point(step, value).split(",")
            body += f'<circle class="{css}" cx="{x}" cy="{y}" r="4"/>\n'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{_svg_style()}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>\n'
        f'<text class="title" x="{LEFT}" y="23">{escape(title)}</text>\n{body}</svg>\n'
    )


def running_mean(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """Exponential running mean, corrected for its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def _svg_axes(last: int) -> str:
    body = ""
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share
        body += f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        body += f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>\n'
    for tick in range(5):
        step = round(last * tick / 4)
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        body += (
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>\n'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        body
        + f'<text class="tick" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">policy updates</text>\n'
    )


def _svg_style() -> str:
    light = "".join(f".{name}{{stroke:{color}}}rect.{name}{{fill:{color}}}" for name, _, color, _ in CURVES)
    dark = "".join(f".{name}{{stroke:{color}}}rect.{name}{{fill:{color}}}" for name, _, _, color in CURVES)
    return (
        "text{font:13px system-ui,sans-serif;fill:#454c58}.title{font-size:15px;font-weight:600;fill:#1b1f26}"
        ".tick{font-size:12px}.page{fill:#fff;stroke:#dfe3ea}.grid{stroke:#e6e9ef}"
        "polyline{fill:none;stroke-linejoin:round}.raw{opacity:.28;stroke-width:1}.mean{stroke-width:2.5}"
        ".dot{fill:#1c8a5a}.ring{fill:none;stroke:#1c8a5a;stroke-width:2}rect.accuracy,rect.format{stroke:none}"
        f"{light}@media(prefers-color-scheme:dark){{text{{fill:#b4bccb}}.title{{fill:#eef1f6}}"
        f".page{{fill:#14181f;stroke:#2b323d}}.grid{{stroke:#262d38}}.dot{{fill:#4cc38a}}.ring{{stroke:#4cc38a}}{dark}}}"
    )
