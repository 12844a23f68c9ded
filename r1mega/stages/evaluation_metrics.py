"""From graded rows to a suite's metrics, and to a line of the table. Pure: no model, no files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from r1mega.algorithms.estimators import cons_at_k, contest_results, elo, interval, pass_at_k
from r1mega.config import ConfigError
from r1mega.data.prompts import Row

Rows = Sequence[Mapping[str, Any]]
PASS_AT = (2, 4, 5, 8, 10, 16, 32, 64, 100, 128, 256)
"""The k of pass@k that are reported beside pass@1, where every question has that many samples; and that number itself."""
HEADER = (
    f"{'suite':<28} {'n':>5} {'k':>4} {'pass@1':>7} {'95 % interval':>15} {'cons@k':>7} {'pass@k':>7} {'cut':>6} "
    f"{'length':>8} {'language':>8}"
)


def suite_metrics(samples: Sequence[Rows], classes: Sequence[Sequence[Any]] | None) -> dict[str, Any]:
    """Metrics of one suite. samples: the rows of each question; classes: the answers' classes, None where none vote.

    pass@1 is the mean over questions of the mean over samples; its interval counts questions (estimators.interval).
    """
    rows = [row for each in samples for row in each]
    means = [_mean([row["value"] for row in each]) for each in samples]
    k = min(len(each) for each in samples)
    metrics: dict[str, Any] = {
        "questions": len(samples),
        "samples": len(rows),
        "k": k,
        "pass@1": _mean(means),
        "pass@1_interval": list(interval(means, len(rows))),
        "truncated": _mean([row["finish_reason"] == "length" for row in rows]),
        "repetitive": _mean([row["repetition"] != "ok" for row in rows]),
        "characters": _mean([len(row["response"]) for row in rows]),
        "verdicts": dict(Counter(row["verdict"] for row in rows).most_common()),
    }
    if all(row["value"] in (0.0, 1.0) for row in rows):
        for size in sorted({n for n in PASS_AT if n <= k} | {k} - {1}):
            values = [pass_at_k(len(each), sum(row["correct"] for row in each), size) for each in samples]
            metrics[f"pass@{size}"] = _mean(values)
    if classes is not None:
        votes = [
            cons_at_k(labels, [row["correct"] for row in each])
            for labels, each in zip(classes, samples, strict=True)
        ]
        metrics["cons@k"] = _mean(votes)
        metrics["cons@k_interval"] = list(interval(votes, len(votes)))
    shown: tuple[tuple[str, Sequence[float]], ...] = (
        ("tokens", [row["tokens"] for row in rows if row.get("tokens") is not None]),
        ("language_consistency", [row["language"] for row in rows if row.get("language") is not None]),
        ("instructions_strict", [one for row in rows for one in row.get("strict", ())]),
        ("instructions_loose", [one for row in rows for one in row.get("loose", ())]),
        ("prompts_loose", [all(row["loose"]) for row in rows if "loose" in row]),
    )
    metrics |= {name: _mean(measured) for name, measured in shown if measured}
    published = [row for row in rows if "published" in row]
    if published:
        metrics["published_pass@1"] = _mean([row["published"] for row in published])
        metrics["disagreements"] = sum(row["published"] != row["correct"] for row in published)
    return metrics


def vote(row: Mapping[str, Any]) -> str | None:
    """The answer with which a sample votes in cons@k. One that was cut has none, as in pass@1: what was extracted from it
    stood on its way to an answer."""
    return None if row["finish_reason"] == "length" else row["answer"]


def table_line(name: str, metrics: Mapping[str, Any]) -> str:
    low, high = metrics["pass@1_interval"]
    best = metrics.get(f"pass@{metrics['k']}")
    return (
        f"{name:<28} {metrics['questions']:>5} {metrics['k']:>4} {metrics['pass@1']:>7.1%} "
        f"{f'{low:.1%}-{high:.1%}':>15} {_share(metrics.get('cons@k'))} {_share(best)} "
        f"{metrics['truncated']:>6.1%} {_number(metrics.get('tokens'))} {_share(metrics.get('language_consistency')):>8}"
    )


def decoding_check(sampled: Rows, greedy: Rows) -> dict[str, dict[str, float]]:
    """Does greedy decoding repeat more than sampling, as the paper says (R1, supplement D.1)?"""
    return {
        name: {
            "repetitive": _mean([row["repetition"] != "ok" for row in rows]),
            "truncated": _mean([row["finish_reason"] == "length" for row in rows]),
            "accuracy": _mean([row["value"] for row in rows]),
        }
        for name, rows in (("sampled", sampled), ("greedy", greedy))
    }


def contest_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Ratings from contests: rows with "problems": [{"rating", "solved"}, ...], or "rank" and "opponents": [ratings].

    All problems enter one maximum-likelihood rating (Elo, a problem being an opponent), and all ranks another one
    (estimators.contest_results), which has no error: results of one contest are not independent. Either is `bounded` where
    everything was won, or nothing. ConfigError with the row of another form.
    """
    results: list[tuple[float, bool]] = []
    places: list[tuple[float, bool]] = []
    ranked = 0
    for row in rows:
        problems, rank, opponents = (row.columns.get(name) for name in ("problems", "rank", "opponents"))
        try:
            if problems:
                results += [(_rating(one["rating"]), _solved(one["solved"])) for one in problems]
            else:
                places += contest_results(int(rank or 0), [_rating(value) for value in opponents or ()])
                ranked += 1
        except (KeyError, TypeError, ValueError) as error:
            words = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{row.where}: not the result of a contest ({words}); a row has "
                '"problems": [{"rating": 1500, "solved": true}, ...] or "rank": 12, "opponents": [1500, ...]'
            ) from None
    metrics: dict[str, Any] = {"contests": len(rows)}
    if results:
        found = elo(results)
        solved = sum(won for _, won in results)
        metrics |= {
            "problems": len(results),
            "solved": solved,
            "rating": found.rating,
            "bounded": found.bounded,
        }
        metrics["error"] = None if found.bounded else found.error
    if places:
        found = elo(places)
        metrics |= {"ranks": ranked, "rank_rating": found.rating, "rank_bounded": found.bounded}
    return metrics


def _rating(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        raise ValueError(f"rating {value!r} is no number")
    return float(value)


def _solved(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"solved {value!r} is neither true nor false")
    return value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def _share(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.1%}':>7}"


def _number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:,.1f}':>8}"
