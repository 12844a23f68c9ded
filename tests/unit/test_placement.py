"""Threads and GPUs of trainer ranks and engines."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from r1mega.config import ParallelConfig, RewardConfig, RolloutConfig, RunConfig
from r1mega.data.recipes import RejectionSampling
from r1mega.platforms import CPU, CUDA
from r1mega.stages.command import CommandStage
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.pipeline_cost import gpus_of
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


ENGINES = RolloutConfig(engines=3, tensor_parallel=2)
RL = RunConfig(parallel=ParallelConfig(tensor=2, data=4), rollout=ENGINES)


@pytest.mark.parametrize(
    ("config", "gpus"),
    [
        (RL, 8 + 6),
        (replace(RL, rewards=RewardConfig(task_weights={"helpful": {"helpful": 1.0}})), 8 + 6 + 2),
        (replace(RL, stage="sft"), 8),
        (replace(RL, stage="reward_model"), 8),
        (replace(RL, stage="preference_pairs"), 0),
        (RejectionSampling(rollout=ENGINES), 6),
        (EvaluationConfig(model="m", rollout=ENGINES), 6),
        (EvaluationConfig(generations="g.jsonl", rollout=ENGINES), 0),
        (CommandStage(argv=("true",)), 0),
    ],
)
def test_a_stage_costs_the_gpus_of_its_ranks_engines_and_reward_models(config: Any, gpus: int) -> None:
    assert gpus_of(config, CUDA) == gpus
    assert gpus_of(config, CPU) == 0
