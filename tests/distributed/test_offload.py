"""What a phase does not need leaves memory and comes back bit for bit; the memory is really returned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import batch, config_of, in_processes
from tiny_models import DEEPSEEK_V3

from r1mega.config import CheckpointConfig, ConfigError, ParallelConfig
from r1mega.parallel.offload import DiskFile, HostMemory, Offload, store_for

MIB = 1 << 20


def tensors(count: int = 3, size: int = 8 * MIB) -> list[torch.Tensor]:
    return [torch.randn(size // 4) for _ in range(count)]


@pytest.fixture(params=["host", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return HostMemory() if request.param == "host" else DiskFile(tmp_path)


def test_tensors_come_back_bit_for_bit_and_their_views_with_them(store: Any) -> None:
    whole = tensors()
    views = [whole[0][5:100].view(5, 19), whole[1].view(torch.int32)]
    half = torch.randn(5000).bfloat16()
    half[7] = float("nan")
    small = torch.randn(10)
    everything = [*whole, *views, half, small]
    before = [tensor.clone() for tensor in everything]
    offload = Offload(lambda: everything, store)
    with offload.away() as report:
        assert report.moved == sum(tensor.nbytes for tensor in [*whole, half])
        assert [tensor.untyped_storage().nbytes() for tensor in everything] == [0] * 6 + [small.nbytes]
    for tensor, then in zip(everything, before, strict=True):
        assert torch.equal(tensor.view(torch.int16), then.view(torch.int16))
    assert views[0].untyped_storage().data_ptr() == whole[0].untyped_storage().data_ptr()
    with offload.away():
        pass
    assert torch.equal(whole[0], before[0])


def test_the_disk_takes_the_memory_and_leaves_no_file(tmp_path: Path) -> None:
    whole = tensors(4, 64 * MIB)
    offload = Offload(lambda: whole, DiskFile(tmp_path))
    report = offload.out()
    assert report.before - report.after > 0.9 * report.moved == 0.9 * 256 * MIB
    assert list(tmp_path.iterdir()) == [], "a killed process would leave it"
    back = offload.back()
    assert back.after - back.before > 0.9 * report.moved
    assert back.peak < report.before + 32 * MIB, "no second copy on the way back"


class Full(HostMemory):
    def put(self, storages: list[torch.UntypedStorage]) -> None:
        raise OSError("No space left on device")


def test_a_failed_move_leaves_everything_in_its_place() -> None:
    whole = tensors()
    before = [tensor.clone() for tensor in whole]
    offload = Offload(lambda: whole, Full())
    with pytest.raises(OSError, match="No space"):
        offload.out()
    assert all(torch.equal(tensor, then) for tensor, then in zip(whole, before, strict=True))
    assert offload.back().moved == 0


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    assert store_for("none") is None
    with pytest.raises(ConfigError, match=r"checkpoint\.offload=\S+nowhere: no such folder"):
        store_for(str(tmp_path / "nowhere"))


def offloading(trainer: Any, out: Path) -> None:
    """Three updates, with everything away between them where the config says so."""

    def state() -> dict[str, torch.Tensor]:
        tensors = dict(trainer.named_tensors())
        tensors |= {f"gradient {n}": p.main_grad for n, p in trainer.model.named_parameters()}
        for index, part in enumerate(trainer.optimizer.parts):
            for number, moments in enumerate(part.optimizer.state.values()):
                tensors |= {f"{name} {index} {number}": moment for name, moment in moments.items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    seen = []
    for step in range(3):
        chunks = batch(step, trainer.config.parallel)[trainer.mesh.data_rank]
        report = trainer.sft_update(chunks, step)
        seen.append((report["totals"]["loss"], report["grad_norm"]))
        before = state()
        report = trainer.offload()
        if trainer.config.checkpoint.offload != "none":
            assert report["offload/moved_mib"] > 10
            assert report["offload/resident_mib_after"] < report["offload/resident_mib_before"] - 10
            large = [p for p in trainer.model.parameters() if p.nelement() * p.element_size() > 4096]
            assert all(parameter.untyped_storage().nbytes() == 0 for parameter in large)
        trainer.onload()
        after = state()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    torch.save(seen, out / f"{trainer.config.checkpoint.offload == 'none'} {trainer.rank}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_trainer_that_leaves_memory_between_updates_trains_the_same(sharded: bool, tmp_path: Path) -> None:
    size = 2 if sharded else 1
    parallel = ParallelConfig(data=size, distributed_optimizer=sharded)
    config = config_of(tmp_path / "model", parallel=parallel)
    wide = {**DEEPSEEK_V3, "hidden_size": 256, "vocab_size": 4096, "initializer_range": 0.1}
    (tmp_path / "model/config.json").write_text(json.dumps(wide))
    for where in ("none", str(tmp_path)):
        in_processes(
            size,
            offloading,
            dataclasses.replace(config, checkpoint=CheckpointConfig(offload=where)),
            tmp_path,
        )
    for rank in range(size):
        assert torch.load(tmp_path / f"True {rank}.pt") == torch.load(tmp_path / f"False {rank}.pt")
