"""When each action of a schedule begins and ends, by nominal durations: what a step would take on real ranks.

A message leaves when its action has computed it and arrives `hop` later; an action begins when its rank is free and its
messages are there. So a hop costs nothing behind other work, and all of itself where a rank waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from r1mega.parallel.schedule import (
    WEIGHT_SHARE,
    Action,
    Schedule,
    Task,
    in_dependency_order,
    peak_activations,
)


@dataclass(frozen=True)
class Durations:
    """Of one micro-batch in 1/P of the model, in any unit of time; a stage takes its share of them."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    overlapped: float = 2.6
    """Of X: less than the sum of the three where communication hides behind computation."""
    hop: float = 0.0
    """From the send in one rank to its arrival in another."""
    early: float = 0.0
    """Share of a stage's weight gradients that B and X compute after they have sent their results (its last layer's).
    0: results are sent at the end."""
    prefetch: bool = True
    """Receives are posted ahead. If not, a transfer begins only when the receiving rank is free."""

    def of(self, action: Action, schedule: Schedule, costs: Sequence[float] | None = None) -> float:
        """costs: of each stage, relative to its even share of the model."""
        share = schedule.share

        def cost(task: Task) -> float:
            return share * (costs[task.stage] if costs else 1.0)

        if action.kind == "X":
            assert action.backward is not None
            forward, backward = cost(action.task), cost(action.backward)
            both = self.forward + self.input_gradient + self.weight_gradient
            hidden = min(forward, backward) * (both - self.overlapped)
            return forward * self.forward + backward * (self.input_gradient + self.weight_gradient) - hidden
        parts = {
            "F": self.forward,
            "B": self.input_gradient + self.weight_gradient,
            "I": self.input_gradient,
            "W": self.weight_gradient,
        }
        return cost(action.task) * parts[action.kind]

    def after_sending(
        self, action: Action, schedule: Schedule, costs: Sequence[float] | None = None
    ) -> float:
        """What B and X still compute when their results are on their way."""
        task = action.weight_gradient
        if task is None or action.kind == "W":
            return 0.0
        return self.early * self.weight_gradient * schedule.share * (costs[task.stage] if costs else 1.0)


DEEPSEEK_V3 = Durations(forward=58.0, input_gradient=85.0, weight_gradient=42.0, overlapped=139.0, hop=9.0)
"""Milliseconds on 2,048 H800, P=16, from the published times of one step (arXiv 2505.09343, table 4): 120 micro-batches
of 4,096 tokens, 1F 1.13 s, 1B 1.99 s, 1W 0.48 s, 1F1B 13.95 s, bubble 2.06 s, optimizer 0.29 s, in all 19.926 s."""
DEEPSEEK_V3_OPTIMIZER = 290.0


@dataclass(frozen=True)
class Span:
    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """Of each rank, in its order."""
    makespan: float
    """When the last rank has ended."""
    peaks: tuple[float, ...]
    """Activations of each rank at most; see peak_activations."""
    idle: tuple[float, ...] = field(default=())
    """Of each rank, until the makespan."""

    @property
    def bubble(self) -> float:
        """Mean share of the makespan in which a rank does nothing."""
        return sum(self.idle) / len(self.idle) / self.makespan


def simulate(
    schedule: Schedule,
    durations: Durations,
    costs: Sequence[float] | None = None,
    weight_share: float = WEIGHT_SHARE,
) -> Timeline:
    """costs: of each stage, relative to its even share of the model. ScheduleError if the schedule never ends."""
    free = [0.0] * schedule.ranks
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    output_sent: dict[Task, float] = {}
    gradient_sent: dict[Task, float] = {}

    def arrives(sent: float, source: int, rank: int) -> float:
        if schedule.rank_of[source] == rank:
            return sent
        begins = sent if durations.prefetch else max(sent, free[rank])
        return begins + durations.hop

    for rank, action in in_dependency_order(schedule):
        start = free[rank]
        for task, neighbours, sent in (
            (action.forward, schedule.previous, output_sent),
            (action.input_gradient, schedule.following, gradient_sent),
        ):
            if task and task.stage in neighbours:
                source = neighbours[task.stage]
                start = max(start, arrives(sent[Task(source, task.micro_batch)], source, rank))
        end = start + durations.of(action, schedule, costs)
        leaves = end - durations.after_sending(action, schedule, costs)
        if action.forward:
            output_sent[action.forward] = leaves
        if action.input_gradient:
            gradient_sent[action.input_gradient] = leaves
        spans[rank].append(Span(start, end, action))
        free[rank] = end
    makespan = max(free)
    idle = tuple(makespan - sum(span.end - span.start for span in rank) for rank in spans)
    peaks = tuple(peak_activations(schedule, weight_share))
    return Timeline(schedule, tuple(map(tuple, spans)), makespan, peaks, idle)


def bound(ranks: int, micro_batches: int, durations: Durations) -> float:
    """No order in the V placement is faster, whatever memory it has: the rank of the turn cannot begin before the
    first micro-batch has come there, and computes all of them."""
    whole = durations.forward + durations.input_gradient + durations.weight_gradient
    return (ranks - 1) * durations.forward / 2 + micro_batches * min(durations.overlapped, whole)
