"""How right and how fast the math answers are judged: `r1mega bench rewards`, its mathematics.

`grade` judges any file of labelled pairs the way a run does: exact stages here, the rest in one warm worker.
Pairs per CPU-second count both.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.bench.reward_math_pairs import generated_pairs, invented_golds
from r1mega.bench.reward_rows import Row
from r1mega.rewards.math_answer import quick_compare
from r1mega.rewards.workers import WorkerPool

INVENTED = 100
MATH500_SEED = 1
RESPAWNS = 7


@dataclass(frozen=True)
class Judged:
    gold: str
    pred: str
    equal: bool
    doubt: bool
    """The label looks wrong: not counted among false accepts and rejects."""
    verdict: str
    cpu: float
    """Seconds, of all stages together."""

    @property
    def right(self) -> bool:
        return (self.verdict == "equal") == self.equal


@dataclass(frozen=True)
class Report:
    pairs: tuple[Judged, ...]

    @property
    def accuracy(self) -> float:
        return sum(pair.right for pair in self.pairs) / len(self.pairs)

    @property
    def wrong(self) -> list[Judged]:
        return [pair for pair in self.pairs if not pair.right]

    @property
    def false_accepts(self) -> list[Judged]:
        return [pair for pair in self.wrong if not pair.equal and not pair.doubt]

    @property
    def false_rejects(self) -> list[Judged]:
        return [pair for pair in self.wrong if pair.equal and not pair.doubt]

    @property
    def pairs_per_cpu_second(self) -> float:
        return len(self.pairs) / sum(pair.cpu for pair in self.pairs)

    def cpu_quantile(self, share: float) -> float:
        """Seconds."""
        times = sorted(pair.cpu for pair in self.pairs)
        return times[min(len(times) - 1, int(share * len(times)))]

    def verdicts(self) -> Counter[str]:
        return Counter(pair.verdict for pair in self.pairs)


def grade(path: Path, *, cpu_seconds: float = 5.0) -> Report:
    r"""Judges a jsonl file: `gold`, `pred`, `equal`, and where they apply `raw` (take both texts as they are, instead
    of putting them into \boxed{}) and `doubt` (the label looks wrong).

    Raises ValueError with the line that is not so.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            gold, pred, equal = row["gold"], row["pred"], row["equal"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: wants a JSON object with gold, pred, equal: {error!r}"
            ) from error
        if not (isinstance(gold, str) and isinstance(pred, str) and isinstance(equal, bool)):
            raise ValueError(f"{path}:{number}: gold and pred are texts, equal is true or false: {line[:80]}")
        if not row.get("raw"):
            gold, pred = boxed(gold), boxed(pred)
        rows.append((gold, pred, equal, bool(row.get("doubt"))))
    if not rows:
        raise ValueError(f"{path}: no pairs")
    return judge(rows, cpu_seconds=cpu_seconds)


def boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def judge(rows: Sequence[tuple[str, str, bool, bool]], *, cpu_seconds: float = 5.0) -> Report:
    """Rows of gold, pred, equal, doubt; one after the other, so that each pair's CPU time is its own."""
    judged = []
    with WorkerPool(1, cpu_seconds=cpu_seconds) as pool:
        pool.submit("math", "x", "1+x").result()  # the worker is there
        for gold, pred, equal, doubt in rows:
            began, used = time.thread_time(), pool.cpu_used
            verdict = quick_compare(gold, pred)
            cpu = time.thread_time() - began
            if verdict in (None, "too_long"):  # the worker looks for the box of a whole solution
                verdict = pool.submit("math", gold, pred).result()
                cpu += pool.cpu_used - used
            judged.append(Judged(gold, pred, equal, doubt, verdict, cpu))
    return Report(tuple(judged))


def measure(shared: Path | None = None) -> list[Row]:
    rows = []
    path = shared / "data/math_pairs/open.jsonl" if shared else None
    if path and path.exists():
        report = grade(path)
        rows += _rows("labelled pairs", report, accuracy_goal=">= 0.985", accepts_goal="<= 1", note=path.name)
        rows += _math_verify_rows(report)
    golds, source = _golds(shared)
    pairs = list(generated_pairs(golds, MATH500_SEED))
    report = judge([(boxed(p.gold), boxed(p.pred), p.equal, False) for p in pairs])
    rows += _rows("generated pairs", report, accuracy_goal=">= 0.985", accepts_goal="", note=source)
    rows += _respawn_rows()
    return rows


def _golds(shared: Path | None) -> tuple[list[str], str]:
    path = shared / "data/math/math500.jsonl" if shared else None
    if path and path.exists():
        answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
        return list(dict.fromkeys(answers)), "MATH-500 references, rewritten and perturbed"
    return invented_golds(INVENTED, MATH500_SEED), "invented references, rewritten and perturbed"


def _rows(name: str, report: Report, *, accuracy_goal: str, accepts_goal: str, note: str) -> list[Row]:
    count = f"{len(report.pairs)} pairs, {note}"
    verdicts = ", ".join(f"{verdict} {n}" for verdict, n in report.verdicts().most_common())
    return [
        Row(f"math: {name}, accuracy", report.accuracy, "share", accuracy_goal, count),
        Row(f"math: {name}, false accepts", len(report.false_accepts), "pairs", accepts_goal, verdicts),
        Row(f"math: {name}, false rejects", len(report.false_rejects), "pairs"),
        Row(f"math: {name}, speed", report.pairs_per_cpu_second, "pairs/CPU-s", ">= 150"),
        Row(f"math: {name}, p50", 1e3 * report.cpu_quantile(0.5), "CPU-ms"),
        Row(f"math: {name}, p99", 1e3 * report.cpu_quantile(0.99), "CPU-ms", "<= 150"),
    ]


def _math_verify_rows(ours: Report) -> list[Row]:
    """The library alone with its defaults (but no alarm, which wants the main thread), on the same texts."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    right, accepts = 0, 0
    _library_says(math_verify, r"\boxed{\sqrt{2}}", r"\boxed{x+1}")
    began = time.process_time()
    for pair in ours.pairs:
        equal = _library_says(math_verify, pair.gold, pair.pred)
        right += equal == pair.equal
        accepts += equal and not pair.equal and not pair.doubt
    cpu = time.process_time() - began
    return [
        Row("math: math-verify alone, accuracy", right / len(ours.pairs), "share", note="same pairs"),
        Row("math: math-verify alone, false accepts", accepts, "pairs"),
        Row("math: math-verify alone, speed", len(ours.pairs) / cpu, "pairs/CPU-s"),
    ]


def _library_says(math_verify: Any, gold: str, pred: str) -> bool:
    values = [math_verify.parse(text, parsing_timeout=None) for text in (gold, pred)]
    return bool(math_verify.verify(values[0], values[1], timeout_seconds=None))


def _respawn_rows() -> list[Row]:
    """From the kill of the only worker to the next answer."""
    seconds = []
    with WorkerPool(1) as pool:
        began = time.perf_counter()
        pool.submit("math", "x", "1+x").result()
        start = time.perf_counter() - began
        for _ in range(RESPAWNS):
            began = time.perf_counter()
            os.kill(pool.pids()[0], signal.SIGKILL)
            while not pool.pids():
                time.sleep(0.0005)
            pool.submit("math", r"\sqrt{8}", r"2\sqrt{2}").result()
            seconds.append(time.perf_counter() - began)
    return [
        Row("math: start of the worker pool", start, "s", note="exec, imports, warm-up; once"),
        Row(
            "math: a killed worker's replacement answers after",
            1e3 * min(seconds),
            "ms",
            note="best of several",
        ),
    ]
