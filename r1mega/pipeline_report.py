"""A whole pipeline as one self-contained HTML file: `r1mega report DIR`, DIR with a pipeline.json.

Shows what is there: the graph, stages x metrics, learning curves with ablations in one picture, answers of the stages
to the same questions, data manifests, cost, and the paper's numbers (report_page/paper.json), labelled as the paper's.
A file that is damaged, or missing where its stage is finished, is named on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from r1mega.pipeline_folder import MAX_READ, Evaluated, PipelineFolder
from r1mega.report import (
    MAX_POINTS,
    PAGE,
    columns,
    duration,
    fill,
    interval_marks,
    mean_row,
    paper,
    percent,
    plain,
    with_ends,
    write_page,
)
from r1mega.stages import graph_drawing
from r1mega.stages.graph import Pipeline, order
from r1mega.stages.pipeline_state import FILE

CURVES = (
    "accuracy", "language", "response_length", "reflective_words", "aha", "reward", "eval/sampled", "max_tokens",
)  # fmt: skip
MEAN_OF = 10
"""Steps at either end of a run whose mean stands in the table."""


NONE = "—"


class Html(str):
    """Text that is markup already; every other text is escaped."""


def is_pipeline(path: str | Path) -> bool:
    return (Path(path) / FILE).is_file()


def write_pipeline_report(dir: str | Path) -> Path:
    """Write `report.html` in a pipeline's folder and return its path. ConfigError when pipeline.json is damaged."""
    folder = PipelineFolder(dir)
    evaluated = folder.evaluated()
    published = paper()
    parts = {
        "headline": _headline(folder, evaluated),
        "graph": _graph(folder),
        "measures": _abreast(evaluated) + _suites(evaluated) + _own_measures(folder),
        "manifests": _manifests(folder),
        "cost": _cost(folder),
        "paper": _paper(published),
    }
    data = {"groups": _curves(folder), "answers": folder.answers(evaluated), "paper": published["curves"]}
    parts["problems"] = _problems(folder.problems)  # known when everything has been read
    body = fill((PAGE / "pipeline.html").read_text(encoding="utf-8"), parts)
    title = folder.title or folder.dir.resolve().name
    subtitle = f"{folder.dir.resolve().name}  ·  {len(folder.records)} stages begun"
    return write_page(folder.dir / "report.html", "pipeline", title, subtitle, body, "pipeline.js", data)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> Html:
    """Numbers to the right, the first cell of a row its name."""

    def line(cells: Sequence[str], css: str = "") -> str:
        name, *others = (cell if isinstance(cell, Html) else escape(cell) for cell in cells)
        return f"<tr{css}><th>{name}</th>{''.join(f'<td>{other}</td>' for other in others)}</tr>"

    body = "".join(map(line, rows)) + (line(total, ' class="total"') if total else "")
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return Html(f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>')


def _card(title: str, content: str, note: str = "") -> str:
    under = f'<p class="faint">{escape(note)}</p>' if note else ""
    return f'<div class="card scroll"><h3>{escape(title)}</h3>{content}{under}</div>\n'


def _stat(label: str, value: str) -> str:
    return f'<div class="card stat"><h3>{escape(label)}</h3><p class="value">{escape(value)}</p></div>'


def _faint(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


# ---- the head of the page -------------------------------------------------------------------------------


def _headline(folder: PipelineFolder, evaluated: Sequence[Evaluated]) -> str:
    records = folder.records.values()
    cards = [_stat("Stages finished", f"{sum(r.status == 'finished' for r in records)} of {len(records)}")]
    depth = _depths(folder.pipeline)
    for one in sorted((one for one in evaluated if one.suites), key=lambda one: depth.get(one.stage, 0))[-1:]:
        name, metrics = next(iter(one.suites.items()))
        if (value := number(metrics, "pass@1")) is not None:
            cards.append(_stat(f"{one.stage} on {name}, pass@1", percent(value)))
    cards += [
        _stat("Wall time", duration(sum(record.wall_seconds for record in records))),
        _stat("CPU time", duration(sum(record.cpu_seconds for record in records))),
        *(
            [_stat("GPU time", duration(gpus))]
            if (gpus := sum(record.gpu_seconds for record in records))
            else []
        ),
        _stat("Tokens", plain(sum(record.tokens for record in records))),
    ]
    return "\n".join(cards)


def _depths(pipeline: Pipeline) -> dict[str, int]:
    """How many stages lead to each one: the pipeline's result is that with the most, not a control that ran last."""
    depth: dict[str, int] = {}
    for stage in order(pipeline):
        depth[stage.name] = 1 + max((depth[parent] for parent in stage.parents), default=0)
    return depth


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'  <section class="card problems"><h3>To know before reading on</h3><ul>{items}</ul></section>'


def _graph(folder: PipelineFolder) -> str:
    """The drawing, coloured by the page: it follows the page's light and dark button."""
    notes = {name: record.status for name, record in folder.records.items()}
    drawing = graph_drawing.svg(folder.pipeline, notes) if notes else ""
    style = f"<style>{graph_drawing.STYLE}</style>"
    return drawing.replace(style, "").replace(' xmlns="http://www.w3.org/2000/svg"', "")


# ---- stages x metrics -----------------------------------------------------------------------------------


def number(values: Mapping[str, Any], name: str) -> float | None:
    """A number of a file that may hold anything."""
    value = values.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


def _plain(value: float | None) -> str:
    return NONE if value is None else plain(value)


def _abreast(evaluated: Sequence[Evaluated]) -> str:
    """The paper's view (R1, table 3): a column for each stage, a row for each measure of each suite."""
    shown = [one for one in evaluated if one.suites]
    suites = dict.fromkeys(name for one in shown for name in one.suites)
    rows = []
    for label, show, measured in ABREAST:
        for suite in suites:
            values = [measured(one, suite) for one in shown]
            if any(value is not None for value in values):
                rows.append([f"{suite}, {label}", *map(show, values)])
    note = "As in the paper's table of stages, which stands below."
    return (
        _card("Stage by stage", table(("", *(one.stage for one in shown)), rows), note)
        if len(shown) > 1
        else ""
    )


def _counted(name: str) -> Callable[[Evaluated, str], float | None]:
    return lambda one, suite: number(one.suites.get(suite, {}), name)


def _read(name: str) -> Callable[[Evaluated, str], float | None]:
    return lambda one, suite: getattr(one.read[suite], name) if suite in one.read else None


ABREAST: tuple[tuple[str, Callable[[float | None], str], Callable[[Evaluated, str], float | None]], ...] = (
    ("pass@1", _share, _counted("pass@1")),
    ("format", _share, _read("format")),
    ("language consistency", _share, _counted("language_consistency")),
    ("readable", _share, _read("readable")),
    ("tokens a response", _plain, _counted("tokens")),
    ("cut", _share, _counted("truncated")),
)
"""Measure -> how it is written, and its value of a stage on a suite."""


SUITE_HEAD = (
    "stage", "pass@1", "95 % interval", "", "cons@k", "pass@k", "format", "language", "readable", "tokens", "cut",
    "repetitive", "questions", "k",
)  # fmt: skip
SUITE_NOTE = (
    "pass@1: mean over k samples. cons@k: the most frequent answer. pass@k: any of the k. format: tags in order. language: "
    "words of the reasoning in the question's language. readable: reasoning in one language (from ten words on), without "
    f"code blocks, overlong paragraphs and repetition (this and format: first {MAX_READ:,} answers). cut: stopped by the "
    "length limit."
)


def _suites(evaluated: Sequence[Evaluated]) -> str:
    names = dict.fromkeys(name for one in evaluated for name in one.suites)
    cards = ""
    for name in names:
        rows = [_suite_row(one, one.suites[name], name) for one in evaluated if name in one.suites]
        cards += _card(f"Evaluated on {name}", table(SUITE_HEAD, rows), SUITE_NOTE)
    return cards or _faint("No stage has been evaluated yet.")


def _suite_row(one: Evaluated, metrics: Mapping[str, Any], suite: str) -> list[str]:
    value, interval = number(metrics, "pass@1"), metrics.get("pass@1_interval")
    whole = isinstance(interval, list) and [isinstance(end, float) for end in interval] == [True, True]
    bounds: Any = interval if whole else None
    bar = ""
    if value is not None:
        bar = f'<div class="scale">{interval_marks("after", {"accuracy": value, "ci": bounds})}</div>'
    k, read = metrics.get("k", NONE), one.read.get(suite)
    return [
        one.stage, _share(value), f"{bounds[0]:.1%} to {bounds[1]:.1%}" if bounds else NONE, Html(bar),
        _share(number(metrics, "cons@k")), _share(number(metrics, f"pass@{k}")) if k != 1 else NONE,
        _share(read.format if read else None), _share(number(metrics, "language_consistency")),
        _share(read.readable if read else None), _plain(number(metrics, "tokens")),
        _share(number(metrics, "truncated")), _share(number(metrics, "repetitive")),
        str(metrics.get("questions", NONE)), str(k),
    ]  # fmt: skip


OWN_HEAD = (
    "stage", "kind", "steps", "held-out, sampled", "held-out, greedy", "format", "language", "tokens a response",
    "nats a token",
)  # fmt: skip


def _own_measures(folder: PipelineFolder) -> str:
    """What training stages measured themselves, at their beginning and at their end."""
    rows = []
    for stage in folder.stages:
        steps = folder.metrics(stage.name)
        if not steps:
            continue
        results = folder.results(stage.name)

        def held_out(kind: str, name: str = "accuracy", results: Mapping[str, Any] = results) -> str:
            ends = [number(_inner(results, when, kind), name) for when in ("before", "after")]
            return _change(ends, _share)

        rows.append([
            stage.name, stage.kind, f"{steps[-1]['step']:,}",
            held_out("heldout" if stage.kind == "reward_model" else "sampled"), held_out("greedy"),
            held_out("sampled", "format"), _trained(steps, "language", _share),
            _trained(steps, "response_length", _plain), _trained(steps, "nll", _plain),
        ])  # fmt: skip
    note = (
        f"Beginning → end. Language, tokens and nats are means of the first and last {MEAN_OF} steps of training, "
        "the others the stage's own held-out questions."
    )
    return _card("Measured by the stages themselves", table(OWN_HEAD, rows), note) if rows else ""


def _inner(values: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _trained(rows: Sequence[Mapping[str, Any]], name: str, show: Any) -> str:
    values = [row[name] for row in map(_watched, rows) if number(row, name) is not None]
    width = min(MEAN_OF, -(-len(values) // 2))
    return _change([sum(end) / width for end in (values[:width], values[-width:])], show) if width else NONE


def _change(ends: Sequence[float | None], show: Any) -> str:
    """Beginning → end; once where they are equal, "…" for an end that is to come."""
    if not any(value is not None for value in ends):
        return NONE
    return " → ".join(dict.fromkeys(show(value) if value is not None else "…" for value in ends))


# ---- curves ---------------------------------------------------------------------------------------------


def _curves(folder: PipelineFolder) -> list[dict[str, Any]]:
    """RL stages that start from the same inputs share a picture: an ablation beside what it is compared with."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for stage in folder.stages:
        if stage.kind == "rl" and folder.metrics(stage.name):
            groups.setdefault(tuple(sorted(stage.inputs.items())), []).append(stage.name)
    return [
        {
            "title": " against ".join(names),
            "note": _differences(folder, names),
            "stages": names,
            "metrics": together(
                {name: with_ends(folder.metrics(name), folder.results(name)) for name in names}
            ),
        }
        for names in groups.values()
    ]


def together(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float | None]]:
    """Columns "stage/metric" over one axis of steps; long runs are averaged over the same steps in every run."""
    size = -(-max(row["step"] for rows in runs.values() for row in rows) // MAX_POINTS) or 1
    merged: dict[int, dict[str, Any]] = {}
    for name, rows in runs.items():
        bins: dict[int, list[dict[str, Any]]] = {}
        for row in map(_watched, rows):
            kept = {key: row.get(key) for key in CURVES if number(row, key) is not None}
            bins.setdefault(-(-row["step"] // size) * size, []).append({"step": row["step"]} | kept)
        for step, near in bins.items():
            mean = mean_row(near)
            values = {f"{name}/{key}": mean[key] for key in CURVES if key in mean}
            merged.setdefault(step, {"step": step}).update(values)
    return columns([merged[step] for step in sorted(merged)])


def _watched(row: Mapping[str, Any]) -> dict[str, Any]:
    """With the language as it is measured at every step, whether or not it is rewarded."""
    mixing = number(row, "language_mixing")
    return dict(row) if mixing is None else {**row, "language": 1 - mixing}


def _differences(folder: PipelineFolder, names: Sequence[str]) -> str:
    """The settings in which stages differ that are compared."""
    configs = [_leaves(folder.records[name].config) for name in names]
    keys = dict.fromkeys(key for config in configs for key in config)
    words = [
        f"{key} {' / '.join(str(config.get(key, 'none')) for config in configs)}"
        for key in keys
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    return f"They differ in {', '.join(words)}." if words else ""


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf
        for part, inner in value.items()
        for key, leaf in _leaves(inner, f"{name}.{part}" if name else part).items()
    }


# ---- data, cost, paper ----------------------------------------------------------------------------------

DATA_HEAD = ("domain", "samples", "average rounds", "average tokens", "with reasoning")


def _manifests(folder: PipelineFolder) -> str:
    cards = ""
    for stage in folder.stages:
        manifest = folder.manifest(stage.name)
        if not manifest:
            continue
        domains, total = _inner(manifest, "domains"), _inner(manifest, "total")
        rows = [_domain(name, _inner(domains, name)) for name in domains]
        content = table(DATA_HEAD, rows, _domain("Total", total))
        dropped = _inner(manifest, "dropped")
        lost = ", ".join(f"{reason} {_plain(number(dropped, reason))}" for reason in dropped)
        cards += _card(stage.name, content, f"Dropped: {lost}." if lost else "Nothing was dropped.")
    return cards or _faint("No stage has made data yet.")


def _domain(name: str, values: Mapping[str, Any]) -> list[str]:
    samples, reasoned = number(values, "samples"), number(values, "with_reasoning")
    rounds, tokens = number(values, "average_rounds"), number(values, "average_tokens")
    return [name, _count(samples), _one(rounds), _one(tokens), _count(reasoned)]


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _one(value: float | None) -> str:
    return NONE if value is None else f"{value:,.1f}"


def _cost(folder: PipelineFolder) -> str:
    gpus = sum(record.gpu_seconds for record in folder.records.values())
    gpu_head = ("GPU time",) if gpus else ()
    head = (
        "stage", "kind", "status", "starts", "wall time", "CPU time", *gpu_head, "tokens", "tokens a second", "share of wall",
    )  # fmt: skip
    whole = sum(record.wall_seconds for record in folder.records.values()) or 1.0
    rows = []
    for stage in folder.stages:
        record = folder.records[stage.name]
        rows.append([
            stage.name, stage.kind, _status(record.status), str(record.attempts), duration(record.wall_seconds),
            duration(record.cpu_seconds), *((duration(record.gpu_seconds) if record.gpu_seconds else NONE,) if gpus else ()),
            f"{record.tokens:,}" if record.tokens else NONE,
            plain(record.tokens / record.wall_seconds) if record.tokens and record.wall_seconds else NONE,
            percent(record.wall_seconds / whole),
        ])  # fmt: skip
    records = folder.records.values()
    sums = [
        "Total", "", "", str(sum(record.attempts for record in records)),
        duration(sum(record.wall_seconds for record in records)),
        duration(sum(record.cpu_seconds for record in records)), *((duration(gpus),) if gpus else ()),
        f"{sum(r.tokens for r in records):,}", "", "",
    ]  # fmt: skip
    return table(head, rows, sums) + _faint(COST_NOTE + (GPU_NOTE if gpus else ""))


COST_NOTE = "Tokens: trained on (SFT, reward models) or sampled (RL, data, evaluation)."
GPU_NOTE = " GPU time: wall time times the GPUs that the stage held (trainer ranks, engines, reward models), busy or not."


def _status(status: str) -> str:
    return "running, or stopped" if status == "running" else status


def _paper(published: Mapping[str, Any]) -> str:
    rows = [[name, *(f"{value:,}" for value in values)] for name, values in published["benchmarks"].items()]
    stages = table(("The paper's model", *published["stages"]), rows)
    lines = [
        [name, f"{samples:,}", f"{rounds:.1f}", f"{tokens:,.1f}"]
        for name, (samples, rounds, tokens) in published["data"].items()
    ]
    data = table(DATA_HEAD[:4], lines[:-1], lines[-1])
    note = f"The paper's, of a model of 671 billion parameters; not measured here. {published['source']}."
    return _card("The paper's stages", stages, note) + _card(
        "The paper's data for Dev-3", data, "The paper's Table 5; not made here."
    )
