"""A schedule run by the real executor in real processes, under virtual clocks (parallel/virtual_clock.py).

The stages are matrices of a few numbers: what is measured is order, messages and waiting, in nominal time.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from r1mega.parallel.messages import Messages
from r1mega.parallel.pipeline import Pipeline
from r1mega.parallel.schedule import Schedule, Task, peak_activations
from r1mega.parallel.simulator import Durations, Span, Timeline
from r1mega.parallel.virtual_clock import VirtualClock
from r1mega.platforms import CPU

SIZE = 4
TIMEOUT_SECONDS = 300.0


def run(jobs: Sequence[tuple[Schedule, Durations]]) -> list[Timeline]:
    """What the clocks said of each job; all have as many ranks. Their gradients are compared with those of one process.

    Raises AssertionError where they differ.
    """
    ranks = jobs[0][0].ranks
    assert all(schedule.ranks == ranks for schedule, _ in jobs)
    assert all(len(schedule.chains) == 1 for schedule, _ in jobs), "DualPipe's two directions have two chains"
    with tempfile.TemporaryDirectory(prefix="r1mega-bench-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_rank, (jobs, port, folder), nprocs=ranks)
        of_rank = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]
    return [
        _timeline(schedule, [spans[number] for spans in of_rank]) for number, (schedule, _) in enumerate(jobs)
    ]


def _timeline(schedule: Schedule, spans: list[list[Span]]) -> Timeline:
    makespan = max(rank[-1].end for rank in spans)
    idle = tuple(makespan - sum(span.end - span.start for span in rank) for rank in spans)
    return Timeline(schedule, tuple(map(tuple, spans)), makespan, tuple(peak_activations(schedule)), idle)


def _rank(rank: int, jobs: Sequence[tuple[Schedule, Durations]], port: int, folder: str) -> None:
    CPU.set_threads(1)
    CPU.init_process_group(rank, jobs[0][0].ranks, "127.0.0.1", port, TIMEOUT_SECONDS)
    spans = [_execute(rank, schedule, durations) for schedule, durations in jobs]
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(spans))
    dist.barrier()
    dist.destroy_process_group()


def _execute(rank: int, schedule: Schedule, durations: Durations) -> list[Span]:
    stages = len(schedule.rank_of)
    weights = [_matrix(stage).requires_grad_(schedule.rank_of[stage] == rank) for stage in range(stages)]

    def forward(task: Task, hidden: Tensor | None) -> Tensor:
        return _stage(weights, task, hidden, stages)

    clock = VirtualClock(schedule, durations)
    messages = Messages(
        schedule,
        rank,
        lambda sender, receiver: dist.group.WORLD,
        lambda pipeline_rank: pipeline_rank,
        lambda micro_batch: torch.empty(SIZE, dtype=torch.float64),
        clock=clock,
    )
    Pipeline(schedule, rank, forward, messages, clock=clock).run()
    dist.barrier()  # the next job's messages have the same tags
    _compare(weights, rank, schedule)
    return clock.spans


def _compare(weights: list[Tensor], rank: int, schedule: Schedule) -> None:
    stages = len(weights)
    alone = [_matrix(stage).requires_grad_() for stage in range(stages)]
    for micro_batch in range(schedule.chains[0].micro_batches):
        hidden = None
        for stage in range(stages):
            hidden = _stage(alone, Task(stage, micro_batch), hidden, stages)
        assert hidden is not None
        hidden.backward()
    for stage in range(stages):
        if schedule.rank_of[stage] == rank:
            torch.testing.assert_close(weights[stage].grad, alone[stage].grad, rtol=1e-12, atol=1e-12)


def _matrix(stage: int) -> Tensor:
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) / SIZE**0.5


def _stage(weights: list[Tensor], task: Task, hidden: Tensor | None, stages: int) -> Tensor:
    """The last stage's output is the loss."""
    if hidden is None:
        generator = torch.Generator().manual_seed(1000 + task.micro_batch)
        hidden = torch.randn(SIZE, dtype=torch.float64, generator=generator)
    output = (weights[task.stage] @ hidden).tanh()
    return output.square().sum() if task.stage == stages - 1 else output
