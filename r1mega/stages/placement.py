"""How many processor threads and GPUs each worker gets.

Phases alternate, so trainer ranks and engines each may use every core of their machine. On GPUs the
trainer and the engines hold different devices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from r1mega.config import RunConfig
from r1mega.platforms import Platform


@dataclass(frozen=True)
class Placement:
    trainer_threads: int
    engine_threads: int
    trainer_gpus: int
    engine_gpus: int

    @property
    def trainer(self) -> dict[str, Any]:
        """Keyword arguments of cluster.WorkerGroup.create."""
        return {
            "threads": self.trainer_threads,
            "gpus": self.trainer_gpus,
            "cpus": self._cpus(self.trainer_gpus),
        }

    @property
    def engine(self) -> dict[str, Any]:
        """Keyword arguments of cluster.spawn."""
        return {
            "threads": self.engine_threads,
            "gpus": self.engine_gpus,
            "cpus": self._cpus(self.engine_gpus),
        }

    def total_gpus(self, config: RunConfig, reward_models: int = 0) -> int:
        """GPUs that a reinforcement-learning run holds; each reward model has one replica in the trainer's layout."""
        trainers = config.world_size + reward_models * config.world_size // config.parallel.data
        return trainers * self.trainer_gpus + config.rollout.engines * self.engine_gpus

    def _cpus(self, gpus: int) -> int:
        """Cores to reserve: a GPU worker wants one; CPU workers take turns and reserve none."""
        return 1 if gpus else 0


def place(config: RunConfig, platform: Platform) -> Placement:
    cores = len(os.sched_getaffinity(0))
    on_gpu = platform.name != "cpu"
    engine_workers = config.rollout.engines * config.rollout.tensor_parallel
    return Placement(
        trainer_threads=max(1, cores // config.world_size),
        engine_threads=max(1, cores // engine_workers),
        trainer_gpus=1 if on_gpu else 0,
        engine_gpus=config.rollout.tensor_parallel if on_gpu else 0,
    )
