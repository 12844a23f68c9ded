"""Writes the files of a checkpoint, by default in a thread beside the training, and makes it valid in one rename.

Megatron's asynchronous save starts a manager process once and forks a writer for every save, from a process full of
threads (Ray, gloo). Here a thread writes: the tensors are copied to host memory before `start` returns, and from
then on training may change them. The price is one host copy of what this rank writes, for the time of the write.

The ranks' threads meet in a process group of their own, so they never come between the collectives of training.
Rank 0 names the checkpoint only when every rank's file is on the disk; a process killed at any moment leaves a
hidden folder at most, and the checkpoint before as it was.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from r1mega.platforms import CPU
from r1mega.training import checkpoint_checksums as checksums
from r1mega.training.checkpoint_checksums import Piece

TIMEOUT = timedelta(hours=2)
"""A rank whose disk is slower than the others' may keep them waiting this long; training goes on meanwhile."""


class HostWriter(FileSystemWriterAsync):
    """Megatron's writer, less its processes: holds this rank's tensors and writes them to one file."""

    def __init__(self, directory: str, copy: bool) -> None:
        super().__init__(directory)
        self.copy = copy
        self.items: list[tuple[WriteItem, Any]] = []
        self.file = ""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called by Megatron when the ranks have agreed on who writes what."""
        self.file = f"{plan.storage_data.prefix}0.distcp"
        for item in plan.items:
            data = planner.resolve_data(item)
            if isinstance(data, Tensor):
                data = data.detach().to("cpu", copy=self.copy)
            self.items.append((item, data))

    def write(self) -> tuple[list[WriteResult], list[Piece]]:
        """Write and sync this rank's file; the items are let go."""
        results: list[WriteResult] = []
        pieces: list[Piece] = []
        items, self.items = self.items, []
        if not items:
            return results, pieces
        with (Path(self.checkpoint_dir) / self.file).open("wb") as file:
            stream: Any = checksums.DigestingStream(file)
            items.sort(key=lambda pair: pair[0].type is not WriteItemType.BYTE_IO)
            for item, data in items:
                if isinstance(data, Tensor) and data.untyped_storage().nbytes() != data.nbytes:
                    data = data.clone()  # of a view torch.save would write all that it is a view of
                offset = stream.tell()
                results.append(
                    _write_item(
                        self.transforms, stream, data, item, self.file, SerializationFormat.TORCH_SAVE
                    )
                )
                length = stream.tell() - offset
                pieces.append(Piece(self.file, offset, length, _label(item), stream.take_digest()))
            file.flush()
            os.fsync(file.fileno())
        return results, pieces


class HostStrategy(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, prepared here and written by whoever takes `prepared`."""

    def __init__(self, copy: bool) -> None:
        super().__init__("torch_dist", 1)
        self.copy = copy
        self.prepared: tuple[HostWriter, Metadata] | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """As the parent's, with a HostWriter; collective on the default group."""
        keyed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planned = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(keyed, False),
            HostWriter(str(checkpoint_dir), self.copy),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        writer, metadata, _ = planned[0]
        self.prepared = (writer, metadata)
        return AsyncRequest(None, (), [])


@dataclass(frozen=True)
class Job:
    """What is left to do of one save once the tensors are in host memory."""

    writer: HostWriter
    metadata: Metadata
    partial: Path
    final: Path
    small_files: dict[str, str]
    """Name -> text of further files, written by rank 0."""
    drop: Callable[[], list[Path]]
    """Older checkpoints that go once this one is complete."""


class Background:
    """One save at a time; `wait` and `check` raise what the last one failed of."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._group: dist.ProcessGroup | None = None

    def start(self, job: Job) -> None:
        """Begin to write. Called on every rank, after `wait`."""
        assert self._thread is None
        if self._group is None and dist.get_world_size() > 1:
            self._group = dist.new_group(backend=CPU.collectives, timeout=TIMEOUT)
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise where the write has failed already; never blocks."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the write is complete on every rank, or raise OSError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Job) -> None:
        try:
            failure = self._write(job)
        except Exception as error:  # the group's: a rank is gone
            failure = f"{type(error).__name__}: {error}"
        if failure:
            self._error = OSError(f"{job.final}: the checkpoint cannot be written ({failure})")

    def _write(self, job: Job) -> str | None:
        """Returns what failed on any rank, the same on all."""
        mine: Any
        try:
            mine = job.writer.write()
        except Exception as error:
            mine = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        everyone = self._gather(mine)
        outcome: list[str | None] = [None]
        if everyone is not None:
            outcome = [next((part for part in everyone if isinstance(part, str)), None)]
            try:
                if outcome[0] is None:
                    _complete(job, everyone)
            except Exception as error:
                outcome = [f"rank 0: {type(error).__name__}: {error}"]
            finally:
                shutil.rmtree(job.partial, ignore_errors=True)
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]

    def _gather(self, mine: Any) -> list[Any] | None:
        """Every rank's part, on rank 0."""
        if self._group is None:
            return [mine]
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts, dst=0, group=self._group)
        return parts


def _complete(job: Job, parts: list[tuple[list[WriteResult], list[Piece]]]) -> None:
    """The index, the small files and the checksums; then the one rename that makes the checkpoint."""
    partial, final = job.partial, job.final
    job.writer.finish(job.metadata, [results for results, _ in parts])
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    for name, text in job.small_files.items():
        (partial / name).write_text(text)
    pieces = [piece for _, pieces_of_rank in parts for piece in pieces_of_rank]
    with_pieces = {piece.file for piece in pieces}
    small = [path for path in sorted(partial.iterdir()) if path.name not in with_pieces]
    small.append(checksums.write(partial, pieces + [checksums.whole_file(path) for path in small]))
    for path in [*small, partial]:
        _sync(path)
    if final.exists():
        remove(final)
    os.replace(partial, final)
    _sync(final.parent)
    for old in job.drop():
        remove(old)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a process killed meanwhile leaves no half of it under its name."""
    hidden = checkpoint.with_name(f".writing-no-more-{checkpoint.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _label(item: WriteItem) -> str:
    """The tensor's name, and the first index of the part that is stored."""
    name, offset = item.index.fqn, item.index.offset
    return f"{name} at {list(offset)}" if offset is not None and any(torch.Size(offset)) else name
