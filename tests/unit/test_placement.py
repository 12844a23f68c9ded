"""Threads and GPUs of trainer ranks and engines."""

from __future__ import annotations

import os

import pytest

from r1mega.config import ParallelConfig, RolloutConfig, RunConfig
from r1mega.platforms import CPU, CUDA
from r1mega.stages.placement import place


@pytest.mark.parametrize(
    "cores, ranks, engines, expected",
    [(16, 4, 2, (4, 8)), (2, 2, 2, (1, 1)), (2, 4, 1, (1, 2)), (1, 1, 1, (1, 1)), (7, 2, 3, (3, 2))],
)
def test_ranks_share_the_cores_and_so_do_engines(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, engines: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    config = RunConfig(parallel=ParallelConfig(data=ranks), rollout=RolloutConfig(engines=engines))
    placement = place(config, CPU)
    assert (placement.trainer_threads, placement.engine_threads) == expected
    assert placement.trainer["gpus"] == placement.engine["gpus"] == 0
    assert placement.trainer["cpus"] == placement.engine["cpus"] == 0, "phases take turns on the cores"


def test_on_gpus_each_rank_has_one_and_each_engine_its_tensor_axis() -> None:
    config = RunConfig(parallel=ParallelConfig(data=2), rollout=RolloutConfig(tensor_parallel=4))
    placement = place(config, CUDA)
    assert (placement.trainer["gpus"], placement.engine["gpus"]) == (1, 4)
    assert (placement.trainer["cpus"], placement.engine["cpus"]) == (1, 1)
