"""A pipeline schedule as data: what each rank does, in order. It can be printed, checked, simulated and executed.

Following the zero-bubble papers a backward pass has two parts, the gradient of the stage's input (which the stage before
waits for) and that of its weights (which nobody waits for). An action is one of

    F  forward                      I  gradient of the input
    B  whole backward, I and W      W  gradient of the weights
    X  forward of one micro-batch running over the whole backward of another (DualPipe's F&B)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

WEIGHT_SHARE = 0.5
"""Of a micro-batch's activations in a stage: what I cannot free because W still needs it."""
_TEXT = re.compile(r"(\d+)([FBIW])(\d+)(?:&(\d+)B(\d+))?")


class ScheduleError(ValueError):
    """A schedule that does not compute what it should, or never ends; the message names rank and action."""


class Task(NamedTuple):
    """One micro-batch in one stage."""

    stage: int
    micro_batch: int


class Action(NamedTuple):
    kind: str
    task: Task
    """What F, B, I and W work on; of X what goes forward."""
    backward: Task | None = None
    """Of X only."""

    def __str__(self) -> str:
        """ "3F0", "3I0", "3W0", "3B0", and "3F7&12B2" for X: stage, kind, micro-batch."""
        text = f"{self.task.stage}{'F' if self.kind == 'X' else self.kind}{self.task.micro_batch}"
        return f"{text}&{self.backward.stage}B{self.backward.micro_batch}" if self.backward else text

    @property
    def forward(self) -> Task | None:
        return self.task if self.kind in "FX" else None

    @property
    def input_gradient(self) -> Task | None:
        return self.backward if self.kind == "X" else self.task if self.kind in "BI" else None

    @property
    def weight_gradient(self) -> Task | None:
        return self.backward if self.kind == "X" else self.task if self.kind in "BW" else None


def parse(text: str) -> Action:
    """The inverse of str(action). ValueError if it is none."""
    match = _TEXT.fullmatch(text)
    if match is None or (match[4] and match[2] != "F"):
        raise ValueError(f"{text!r} is no action: write 3F0, 3B0, 3I0, 3W0 or 3F7&12B2")
    task = Task(int(match[1]), int(match[3]))
    return Action("X", task, Task(int(match[4]), int(match[5]))) if match[4] else Action(match[2], task)


@dataclass(frozen=True)
class Chain:
    """The stages that a micro-batch passes one after the other."""

    stages: tuple[int, ...]
    micro_batches: int


@dataclass(frozen=True)
class Schedule:
    name: str
    chains: tuple[Chain, ...]
    """One; DualPipe has two, in opposite directions, with copies of all weights."""
    rank_of: tuple[int, ...]
    """Of each stage."""
    orders: tuple[tuple[Action, ...], ...]
    """One for each rank."""

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @property
    def share(self) -> float:
        """Of a rank's part of the model in one stage, where a rank's part is 1/ranks of the model."""
        return self.ranks / len(self.chains[0].stages)

    @property
    def copies(self) -> float:
        """How often the model's weights exist."""
        return len(self.rank_of) * self.share / self.ranks

    @cached_property
    def previous(self) -> dict[int, int]:
        """Stage -> the stage whose output it reads; the first of a chain is not in it."""
        return {b: a for chain in self.chains for a, b in zip(chain.stages, chain.stages[1:], strict=False)}

    @cached_property
    def following(self) -> dict[int, int]:
        """Stage -> the stage that reads its output; the last of a chain is not in it."""
        return {a: b for b, a in self.previous.items()}

    def __str__(self) -> str:
        return "\n".join(f"{rank}: {' '.join(map(str, order))}" for rank, order in enumerate(self.orders))


def check(schedule: Schedule) -> None:
    """Every task goes forward and backward exactly once, in its rank, in an order that ends. Else ScheduleError."""
    tasks = {
        Task(stage, micro_batch)
        for chain in schedule.chains
        for stage in chain.stages
        for micro_batch in range(chain.micro_batches)
    }
    for what in ("forward", "input_gradient", "weight_gradient"):
        counts: Counter[Task] = Counter()
        for rank, order in enumerate(schedule.orders):
            for action in order:
                task = getattr(action, what)
                if task is None:
                    continue
                if task not in tasks:
                    raise ScheduleError(
                        f"{schedule.name}: {action} of rank {rank} is no task of this schedule"
                    )
                if schedule.rank_of[task.stage] != rank:
                    home = schedule.rank_of[task.stage]
                    raise ScheduleError(
                        f"{schedule.name}: {action} in rank {rank}, its stage is in rank {home}"
                    )
                counts[task] += 1
        wrong = sorted(task for task in tasks if counts[task] != 1)
        if wrong:
            stage, micro_batch = wrong[0]
            raise ScheduleError(
                f"{schedule.name}: {what} of micro-batch {micro_batch} in stage {stage} happens"
                f" {counts[wrong[0]]} times; wrong in {len(wrong)} tasks"
            )
    for _ in in_dependency_order(schedule):
        pass


def in_dependency_order(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """All (rank, action), each after what it needs. ScheduleError names the actions that wait for ever."""
    forward_done: set[Task] = set()
    gradient_done: set[Task] = set()
    position = [0] * schedule.ranks

    def ready(action: Action) -> bool:
        task = action.forward
        if task and task.stage in schedule.previous:
            before = Task(schedule.previous[task.stage], task.micro_batch)
            if before not in forward_done:
                return False
        task = action.input_gradient
        if task:
            if task not in forward_done:
                return False
            if task.stage in schedule.following:
                after = Task(schedule.following[task.stage], task.micro_batch)
                if after not in gradient_done:
                    return False
        return action.kind != "W" or action.task in gradient_done

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while position[rank] < len(order) and ready(order[position[rank]]):
                action = order[position[rank]]
                if action.forward:
                    forward_done.add(action.forward)
                if action.input_gradient:
                    gradient_done.add(action.input_gradient)
                position[rank] += 1
                moved = True
                yield rank, action
    stuck = [
        f"rank {r}: {order[position[r]]}"
        for r, order in enumerate(schedule.orders)
        if position[r] < len(order)
    ]
    if stuck:
        raise ScheduleError(f"{schedule.name}: dead-lock, each waits for another: {', '.join(stuck)}")


def peak_activations(schedule: Schedule, weight_share: float = WEIGHT_SHARE) -> list[float]:
    """For each rank, in activations of one micro-batch in 1/ranks of the model.

    I frees all but `weight_share` of them. An X holds both of its tasks until it ends.
    """
    peaks = []
    for order in schedule.orders:
        held = peak = 0.0
        for action in order:
            if action.forward:
                held += schedule.share
                peak = max(peak, held)
            if action.input_gradient:
                held -= schedule.share * (1 - weight_share)
            if action.weight_gradient:
                held -= schedule.share * weight_share
        peaks.append(peak)
    return peaks
