"""Searched pipeline orders, saved as data, and what they gain over DualPipeV.

Each P<ranks>_M<micro-batches>_A<memory>_<durations>.json beside this file was written by tools/search_orders.py, which
calls order_search.search. A rank's order is a string of letters: F, I, W of its first stage (r) are F I W and of its
second (2P-1-r) f i w; an X is "X" (first forward over second backward), "x" (second over first), "Y" (both first) or
"y" (both second). Each stage takes its micro-batches one after the other, and W the one that has waited longest, so
letters are enough. A whole backward is I and W. "(Xx)9" is nine times Xx.

Legend: P ranks, M micro-batches.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from r1mega.parallel.dualpipe import dualpipe_v, v_placement
from r1mega.parallel.schedule import Action, Chain, Schedule, Task, check
from r1mega.parallel.simulator import DEEPSEEK_V3, DEEPSEEK_V3_OPTIMIZER, Durations, bound, simulate

FOLDER = Path(__file__).parent
LETTERS = "FfIiWwXxYy"
"""Of the kinds 0 ... 9 of order_anneal."""
NAMED = {
    "unit": Durations(),
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-early": replace(DEEPSEEK_V3, early=0.5),
}
"""What orders are saved for; "early": one of a stage's two layers sends before its weight gradients."""
_CHUNKS = {"X": (0, 1), "x": (1, 0), "Y": (0, 0), "y": (1, 1)}
_REPEAT = re.compile(r"\(([A-Za-z]{2})\)(\d+)|([A-Za-z])")


@dataclass(frozen=True)
class Searched:
    ranks: int
    micro_batches: int
    memory: float
    """The limit that was searched under; in activations of one micro-batch in 1/P of the model."""
    durations: str
    """A name in NAMED."""
    makespan: float
    peak: float
    seed: int
    trials: int
    rounds: int
    orders: tuple[str, ...]

    @property
    def file_name(self) -> str:
        return f"P{self.ranks}_M{self.micro_batches}_A{self.memory:g}_{self.durations}.json"

    @property
    def schedule(self) -> Schedule:
        return from_letters(self.orders, self.micro_batches)


def from_letters(orders: Sequence[str], micro_batches: int, name: str = "searched") -> Schedule:
    """ValueError if a rank has another letter, or a number of repeats that no order needs. Not checked further."""
    ranks = len(orders)
    actions = []
    for rank, text in enumerate(orders):
        stages = (rank, 2 * ranks - 1 - rank)
        forwards, backwards = [0, 0], [0, 0]
        without_weights: tuple[deque[Task], deque[Task]] = (deque(), deque())

        def take(counts: list[int], chunk: int, stages: tuple[int, int] = stages) -> Task:
            counts[chunk] += 1
            return Task(stages[chunk], counts[chunk] - 1)

        order = []
        for letter in _repeated(text, rank, most=6 * micro_batches):
            chunk, kind = int(letter.islower()), letter.upper()
            if letter in _CHUNKS:
                forward, backward = _CHUNKS[letter]
                order.append(Action("X", take(forwards, forward), take(backwards, backward)))
            elif kind == "F":
                order.append(Action("F", take(forwards, chunk)))
            elif kind == "I":
                order.append(Action("I", take(backwards, chunk)))
                without_weights[chunk].append(order[-1].task)
            elif without_weights[chunk]:
                order.append(Action("W", without_weights[chunk].popleft()))
            else:
                raise ValueError(
                    f"rank {rank}: {letter} after {len(order)} actions has no {'Ii'[chunk]} before it"
                )
        actions.append(tuple(order))
    return Schedule(
        name, (Chain(tuple(range(2 * ranks)), micro_batches),), v_placement(ranks), tuple(actions)
    )


def _repeated(text: str, rank: int, most: int) -> str:
    parts, at, length = [], 0, 0
    while at < len(text):
        match = _REPEAT.match(text, at)
        if match is None or any(letter not in LETTERS for letter in match[1] or match[3]):
            raise ValueError(f"rank {rank}, character {at}: {text[at : at + 8]!r} is no letter of {LETTERS}")
        times = int(match[2][:9]) if match[1] else 1
        length += times * len(match[1] or match[3])
        if length > most:
            raise ValueError(f"rank {rank}: more than {most} actions")
        parts.append((match[1] or match[3]) * times)
        at = match.end()
    return "".join(parts)


def to_text(letters: str) -> str:
    """With three and more repeats of two letters written once; from_letters reads both."""
    return re.sub(r"(..)\1{2,}", lambda match: f"({match[1]}){len(match[0]) // 2}", letters)


def read(path: Path) -> Searched:
    """ValueError, with the file's name, unless its order is complete, ends, and has the peak and makespan it says."""
    try:
        row = json.loads(path.read_text())
        found = Searched(**{**row, "orders": tuple(row["orders"])})
        if found.durations not in NAMED:
            raise ValueError(f"durations {found.durations!r}, not one of {', '.join(NAMED)}")
        if len(found.orders) != found.ranks:
            raise ValueError(f"{len(found.orders)} orders for {found.ranks} ranks")
        schedule = found.schedule
        check(schedule)
        timeline = simulate(schedule, NAMED[found.durations])
        if max(timeline.peaks) != found.peak or found.peak > found.memory:
            raise ValueError(f"peak {max(timeline.peaks)}, it says {found.peak} and limit {found.memory}")
        if not math.isclose(timeline.makespan, found.makespan, rel_tol=1e-12):
            raise ValueError(f"makespan {timeline.makespan}, it says {found.makespan}")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; write it again with tools/search_orders.py") from error
    return found


def write(found: Searched, folder: Path = FOLDER) -> Path:
    """Replaces the file in one step."""
    path = folder / found.file_name
    partial = path.with_name(f".writing-{path.name}.{os.getpid()}")
    row: dict[str, Any] = asdict(found) | {"orders": [to_text(text) for text in found.orders]}
    try:
        partial.write_text(json.dumps(row, indent=1) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def saved(folder: Path = FOLDER) -> list[Searched]:
    """All of them, by durations, P, M and memory."""
    rows = [read(path) for path in sorted(folder.glob("P*.json"))]
    return sorted(rows, key=lambda row: (row.durations, row.ranks, row.micro_batches, row.memory))


def load_searched(
    ranks: int, micro_batches: int, memory: float, durations: str = "unit", folder: Path = FOLDER
) -> Schedule | None:
    """The fastest saved order that needs no more than `memory`; None if there is none."""
    if durations not in NAMED:
        raise ValueError(f"durations {durations!r}: there are orders for {', '.join(NAMED)}")
    paths = folder.glob(f"P{ranks}_M{micro_batches}_A*_{durations}.json")
    fitting = [row for row in map(read, sorted(paths)) if row.peak <= memory]
    return min(fitting, key=lambda row: (row.makespan, row.peak)).schedule if fitting else None


def bound_at(ranks: int, micro_batches: int, durations: Durations, memory: float) -> float:
    """No order in the V placement that keeps to `memory` is faster: simulator.bound made tighter.

    The rank of the turn sees its first gradient when the first micro-batch has gone all the way forward and half-way
    back; until then it can only go forward, as far as time and memory allow, and each of those forwards is one that
    no longer runs over a backward. It then has 2M backwards to do.
    """
    d = durations
    quickest = d.overlapped - d.early * d.weight_gradient
    forward = min(d.forward, quickest) / 2
    backward = min(d.input_gradient, quickest) / 2
    arrives = (ranks - 1) * (forward + d.hop)
    first = arrives + (ranks + 1) * forward + (ranks - 1) * (d.hop + backward + d.hop)
    alone = min(2 * micro_batches, math.floor(2 * memory), math.ceil((first - arrives) / (d.forward / 2)))
    whole = d.input_gradient + d.weight_gradient
    both = min(d.overlapped, d.forward + whole)
    time = first + (2 * micro_batches - alone) * both / 2 + alone * whole / 2
    return max(time, bound(ranks, micro_batches, durations))


@dataclass(frozen=True)
class Row:
    """Of the table of makespans."""

    durations: str
    ranks: int
    micro_batches: int
    memory: float
    """That the searched order needs; DualPipeV needs P + 1/2."""
    dualpipev: float | None
    """None where DualPipeV has too few micro-batches."""
    searched: float
    bound: float
    """With any memory."""
    bound_at: float
    """With this memory."""


def table(folder: Path = FOLDER) -> list[Row]:
    rows = []
    for found in saved(folder):
        ranks, micro_batches, durations = found.ranks, found.micro_batches, NAMED[found.durations]
        enough = micro_batches >= 2 * ranks
        dualpipev = simulate(dualpipe_v(ranks, micro_batches), durations).makespan if enough else None
        bounds = (
            bound(ranks, micro_batches, durations),
            bound_at(ranks, micro_batches, durations, found.memory),
        )
        rows.append(
            Row(found.durations, ranks, micro_batches, found.peak, dualpipev, found.makespan, *bounds)
        )
    return rows


@dataclass(frozen=True)
class Step:
    """Of the table of DeepSeek-V3's step."""

    what: str
    memory: float
    seconds: float
    """Makespan and optimizer."""


def deepseek_v3_steps(folder: Path = FOLDER) -> list[Step]:
    """What prefetched receives, early sends and the order each give: P=16, M=120, published durations.

    Published: 19.926 s. Each searched order was searched for the sends that its row names.
    """
    ranks, micro_batches = 16, 120
    late, early = NAMED["deepseek-v3"], NAMED["deepseek-v3-early"]
    dualpipev = dualpipe_v(ranks, micro_batches)
    rows = [
        ("DualPipeV, sends at the end, no prefetch", dualpipev, replace(late, prefetch=False)),
        ("DualPipeV, sends at the end", dualpipev, late),
        ("DualPipeV, early sends, no prefetch", dualpipev, replace(early, prefetch=False)),
        ("DualPipeV, early sends", dualpipev, early),
    ]
    for found in saved(folder):
        if (found.ranks, found.micro_batches) == (ranks, micro_batches) and found.durations != "unit":
            sends = "early sends" if found.durations == "deepseek-v3-early" else "sends at the end"
            if found.durations == "deepseek-v3-early":
                without = replace(early, prefetch=False)
                rows.append((f"searched, {sends}, no prefetch", found.schedule, without))
            rows.append((f"searched, {sends}", found.schedule, NAMED[found.durations]))
    rows.append(("DualPipeV, if a hop took no time", dualpipev, replace(late, hop=0.0)))
    steps = []
    for what, schedule, durations in rows:
        timeline = simulate(schedule, durations)
        steps.append(Step(what, max(timeline.peaks), (timeline.makespan + DEEPSEEK_V3_OPTIMIZER) / 1000))
    return steps
