"""Checkpoints of a training run: everything the next step depends on, in Megatron's sharded format.

A checkpoint is a directory `step-00000050/` with the model, the reference model, the optimizer (torch
distributed format, readable in another layout) and `state.json`. It is written under a temporary name
and renamed when complete, so a crash during a save leaves the previous one good. Nothing in a step
draws random numbers in the trainer (no dropout; sampling seeds are functions of step and question),
so the step number is the whole random state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from r1mega.training.optimizer import Optimizer

if TYPE_CHECKING:
    from r1mega.models.trunk import Trunk

_NAME = re.compile(r"step-(\d{8})")


def _metadata() -> dict[str, Any]:
    """How Megatron lays out optimizer shards; "fully_reshardable" keeps them readable in any layout."""
    from megatron.core import parallel_state

    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _sharded_state(
    model: Trunk, reference: Trunk | None, optimizer: Optimizer, *, loading: bool
) -> dict[str, Any]:
    metadata = _metadata()
    model_state = model.sharded_state_dict(metadata=metadata)
    state = {
        "model": model_state,
        "optimizer": optimizer.megatron.sharded_state_dict(
            model_state, is_loading=loading, metadata=metadata
        ),
    }
    if reference is not None:
        state["reference"] = reference.sharded_state_dict(prefix="reference.", metadata=metadata)
    return state


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """torch wraps every rank's exception in one that is no Exception, so that few handlers see it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise OSError(f"{what} (rank {rank}: {type(cause).__name__}: {cause})") from error


def save(
    root: Path,
    step: int,
    model: Trunk,
    reference: Trunk | None,
    optimizer: Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-…/`, then drop all but the newest `keep`. Called on every rank.

    `state` is small and JSON-ready. Raises OSError (disk full, no permission) with nothing half-written
    under a final name.
    """
    from megatron.core import dist_checkpointing

    final = root / f"step-{step:08d}"
    partial = root / f".writing-{final.name}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        with _plain_errors(f"{final}: the checkpoint cannot be written"):
            dist_checkpointing.save(
                _sharded_state(model, reference, optimizer, loading=False),
                str(partial),
                validate_access_integrity=False,
            )
        dist.barrier()
        if first:
            (partial / "state.json").write_text(json.dumps(state | {"step": step}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in complete(root)[:-keep]:
                shutil.rmtree(old)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    return final


def load(path: Path, model: Trunk, reference: Trunk | None, optimizer: Optimizer) -> None:
    """Read a checkpoint into a model of any layout. Called on every rank. Raises OSError when it is damaged."""
    from megatron.core import dist_checkpointing

    with _plain_errors(f"{path}: the checkpoint cannot be read; delete it to use the one before"):
        state = dist_checkpointing.load(_sharded_state(model, reference, optimizer, loading=True), str(path))
    model.load_state_dict(state["model"])
    optimizer.megatron.load_state_dict(state["optimizer"])
    if reference is not None:
        reference.load_state_dict({k.removeprefix("reference."): v for k, v in state["reference"].items()})


def complete(root: Path) -> list[Path]:
    """Finished checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def read_state(path: Path) -> dict[str, Any]:
    """The small state saved with the checkpoint; raises ValueError if it cannot be read."""
    file = path / "state.json"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file}: not a complete checkpoint ({error}); delete {path} to use the one before"
        ) from error
