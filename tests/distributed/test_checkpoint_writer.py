"""Saving beside the training: what is written, when it counts, and what a failure or a kill leaves behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import batch, config_of, in_processes

from r1mega.config import ParallelConfig
from r1mega.training import checkpoint
from r1mega.training.checkpoint_checksums import NAME, DamagedCheckpoint, by_file, read

pytestmark = pytest.mark.distributed


def update(trainer: Any, step: int) -> float:
    report = trainer.sft_update(batch(step, trainer.config.parallel)[trainer.mesh.data_rank], step)
    return report["totals"]["loss"]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_tensors()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# ---------------------------------------------------------------- one process


def one_trainer(trainer: Any, out: Path) -> None:
    """Everything that one trainer can show; each part leaves whole checkpoints."""
    goes_on_beside_training(trainer, out / "beside")
    fails_by_name(trainer, out / "failing")
    random_numbers_come_back(trainer, out / "random")
    damage_is_found_before_loading(trainer, out / "damaged")


def goes_on_beside_training(trainer: Any, root: Path) -> None:
    from r1mega.training.checkpoint_writer import HostWriter

    release, write = threading.Event(), HostWriter.write

    def held(self: Any) -> Any:
        assert release.wait(timeout=60)
        return write(self)

    HostWriter.write = held
    update(trainer, 0)
    at_save = weights(trainer)
    trainer.save(str(root), 1, {})
    losses = [update(trainer, step) for step in (1, 2)]
    assert checkpoint.complete(root) == []
    assert names(root) == [".writing-step-00000001"]
    release.set()
    trainer.finish_save()
    HostWriter.write = write
    assert names(root) == ["step-00000001"]
    assert not same(at_save, weights(trainer))
    trainer.load(str(root / "step-00000001"))
    assert same(at_save, weights(trainer)), "training got into the checkpoint"
    assert losses == [update(trainer, step) for step in (1, 2)]

    for step in (2, 3, 4):  # at once: each waits for the one before
        trainer.save(str(root), step, {"position": step * 10})
    trainer.finish_save()
    assert names(root) == ["step-00000003", "step-00000004"], "checkpoint.keep is 2"
    assert checkpoint.read_state(root / "step-00000004") == {"position": 40, "step": 4}


def fails_by_name(trainer: Any, root: Path) -> None:
    from r1mega.training.checkpoint_writer import HostWriter

    trainer.save(str(root), 1, {})
    trainer.finish_save()
    write = HostWriter.write

    def full(self: Any) -> Any:
        (Path(self.checkpoint_dir) / self.file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    HostWriter.write = full
    trainer.save(str(root), 2, {})
    writer = trainer.saver._writer
    writer._thread.join()
    with pytest.raises(
        OSError, match=rf"{root}/step-00000002: the checkpoint cannot be written .*rank 0.*No space"
    ):
        update(trainer, 2)
    assert names(root) == ["step-00000001"]
    trainer.save(str(root), 3, {})
    with pytest.raises(OSError, match=r"step-00000003.*No space"):
        trainer.finish_save()
    HostWriter.write = write
    trainer.save(str(root), 4, {})
    trainer.finish_save()
    assert names(root) == ["step-00000001", "step-00000004"]


def random_numbers_come_back(trainer: Any, root: Path) -> None:
    trainer.save(str(root), 1, {})

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random()]

    drawn = [draw(), draw()]
    trainer.load(str(root / "step-00000001"))
    assert [draw(), draw()] == drawn
    assert draw() not in drawn


def damage_is_found_before_loading(trainer: Any, root: Path) -> None:
    trainer.save(str(root), 1, {})
    trainer.finish_save()
    path = root / "step-00000001"
    pieces = by_file(read(path))
    assert set(pieces) == {file.name for file in path.iterdir()} - {NAME}
    assert {".metadata", "common.pt", "metadata.json", "state.json", "layout.json", "__0_0.distcp"} == set(
        pieces
    )
    labels = [piece.tensor for piece in pieces["__0_0.distcp"]]
    assert any(label.startswith("optimizer.state.exp_avg.decoder.layers.1.") for label in labels)
    update(trainer, 5)
    before = weights(trainer)
    for name, of_file in pieces.items():
        file = path / name
        whole = file.read_bytes()
        for piece in random.sample(of_file, min(4, len(of_file))):
            content = bytearray(whole)
            content[piece.offset + random.randrange(piece.length)] ^= 1 << random.randrange(8)
            file.write_bytes(content)
            with pytest.raises(DamagedCheckpoint) as caught:
                trainer.load(str(path))
            assert str(caught.value).startswith(f"{file}: damaged "), caught.value
            assert not piece.tensor or f" in tensor {piece.tensor}," in str(caught.value)
        file.write_bytes(whole)
    assert same(before, weights(trainer))
    trainer.load(str(path))


def test_one_trainer_saves_beside_its_training_and_finds_damage(tmp_path: Path) -> None:
    in_processes(1, one_trainer, config_of(tmp_path / "model"), tmp_path)


# ---------------------------------------------------------------- two processes


def one_rank_fails(trainer: Any, out: Path) -> None:
    from r1mega.training.checkpoint_writer import HostWriter

    root = out / "checkpoints"
    trainer.save(str(root), 1, {})
    trainer.finish_save()
    write = HostWriter.write

    def failing(self: Any) -> Any:
        if trainer.rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(self)

    HostWriter.write = failing
    trainer.save(str(root), 2, {})
    update(trainer, 1)  # its collectives are not those of the save
    with pytest.raises(OSError, match=r"step-00000002.*rank 1.*Input/output error"):
        trainer.finish_save()
    HostWriter.write = write
    trainer.save(str(root), 3, {})
    trainer.finish_save()
    assert names(root) == ["step-00000001", "step-00000003"]
    files = {piece.file for piece in read(root / "step-00000003")}
    assert {"__0_0.distcp", "__1_0.distcp"} <= files, "data ranks share the writing"
    trainer.load(str(root / "step-00000003"))
    torch.distributed.barrier()
    if trainer.rank == 0:
        content = bytearray((root / "step-00000003/__1_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (root / "step-00000003/__1_0.distcp").write_bytes(content)
    torch.distributed.barrier()
    with pytest.raises(DamagedCheckpoint, match=r"__1_0\.distcp: damaged in tensor"):
        trainer.load(str(root / "step-00000003"))


def test_a_failure_of_one_rank_is_named_on_all_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path / "model", parallel=ParallelConfig(data=2, distributed_optimizer=True))
    in_processes(2, one_rank_fails, config, tmp_path)


# ---------------------------------------------------------------- killed


def killed_at(trainer: Any, out: Path, moment: str) -> None:
    from r1mega.training import checkpoint_writer as writer

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after_half(stream: Any) -> int:
        stream.file.flush()
        die()
        return 0

    root = out / "checkpoints"
    for step in (1, 2):
        trainer.save(str(root), step, {"kept": step})
    trainer.finish_save()
    if moment == "in the middle of the tensors":
        taken: list[int] = []
        tell = writer.checksums.DigestingStream.tell

        def counted(stream: Any) -> int:
            taken.append(0)
            return die_after_half(stream) if len(taken) == 20 else tell(stream)

        writer.checksums.DigestingStream.tell = counted
    elif moment == "before the checksums":
        writer.checksums.write = die
    elif moment == "before the rename":
        writer.os.replace = die
    elif moment == "while the oldest is deleted":
        writer.shutil.rmtree = lambda path, ignore_errors=False: None if ignore_errors else die()
    trainer.save(str(root), 3, {"kept": 3})
    update(trainer, 0)
    trainer.finish_save()


MOMENTS = [
    "in the middle of the tensors",
    "before the checksums",
    "before the rename",
    "while the oldest is deleted",
]


@pytest.mark.parametrize(
    "moment", [MOMENTS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS[1:])]
)
def test_a_kill_during_a_save_leaves_whole_checkpoints_only(moment: str, tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        in_processes(1, killed_at, config_of(tmp_path / "model"), tmp_path, moment)
    left = checkpoint.complete(tmp_path / "checkpoints")
    newest = 3 if moment == MOMENTS[3] else 2
    assert [path.name for path in left] == [f"step-{step:08d}" for step in (newest - 1, newest)]
    for path in left:
        checkpoint.verify(path)
    assert checkpoint.read_state(left[-1]) == {"kept": newest, "step": newest}
    hidden = [path.name for path in (tmp_path / "checkpoints").iterdir() if path not in left]
    assert all(name.startswith(".writing-") for name in hidden), "begin() of the next run removes these"
