"""One process of a training group: its platform, its device and its place on the mesh.

What the policy's trainer, the reward models' trainer and their server share; none of it knows Ray, which puts
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT into each process's environment.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r1mega import platforms
from r1mega.algorithms.losses import Metrics, combine
from r1mega.config import RunConfig
from r1mega.parallel.mesh import Mesh, init_mesh
from r1mega.platforms import Platform
from r1mega.samples import PackedBatch

if TYPE_CHECKING:
    from r1mega.training.pipelined_model import PipelinedModel


@dataclass(frozen=True)
class Process:
    rank: int
    platform: Platform
    device: torch.device
    mesh: Mesh


def join(config: RunConfig, threads: int) -> Process:
    """Prepare Megatron, join the group that the environment names and divide it as config.parallel says."""
    rank = int(os.environ["RANK"])
    platform = platforms.detect(config.platform)
    platform.set_threads(threads)
    platform.prepare_megatron()
    device = platform.device_of(int(os.environ["LOCAL_RANK"]))
    platform.init_process_group(
        rank,
        int(os.environ["WORLD_SIZE"]),
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        config.sync.timeout_seconds,
    )
    mesh = init_mesh(config.parallel, seed=config.seed, timeout_seconds=config.sync.timeout_seconds)
    return Process(rank, platform, device, mesh)


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved: dict[str, Any] = {k: v.to(device) for k, v in fields.items() if isinstance(v, Tensor)}
    return dataclasses.replace(batch, **moved)


def update_report(
    process: Process, parts: list[Metrics], norms: list[float], lr: float, model: PipelinedModel
) -> dict[str, Any]:
    """What one rank tells the driver of its optimizer steps.

    {"totals": metric sums of this rank, "counted": whether this rank's sums count (one of the ranks that
    compute alike does, where losses come out), "grad_norm": mean over the steps, "lr": of the last one,
    "peak_memory_bytes", "expert_balance": PipelinedModel's}.
    """
    return {
        "totals": {key: float(value) for key, value in combine(parts).items()},
        "counted": model.has_last and process.mesh.tensor_rank == process.mesh.context_rank == 0,
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
        "peak_memory_bytes": process.platform.peak_memory_bytes(),
        "expert_balance": model.expert_balance,
    }
