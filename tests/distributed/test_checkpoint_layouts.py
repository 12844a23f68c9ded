"""A checkpoint of one layout continues in any other: model, optimizer, step, to the bit; the losses that follow too.

`straight` trains in a layout, saves on the way and goes on. `continued` loads a checkpoint in a layout, saves it
again at once (what was loaded, bit for bit, whatever the layout), and trains on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import DEEPSEEK_V3, QWEN2, free_port, mesh_of

from r1mega.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from r1mega.data.packing import pack
from r1mega.samples import Sample

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, ParallelConfig] = {
    "one": ParallelConfig(),
    "TP2EP2": ParallelConfig(tensor=2, expert=2),
    "EP2 distopt": ParallelConfig(data=2, expert=2, distributed_optimizer=True),
    "DP2": ParallelConfig(data=2),
    "DP2 distopt": ParallelConfig(data=2, distributed_optimizer=True),
    "PP2 V": ParallelConfig(pipeline=2),
    "PP2 1f1b": ParallelConfig(pipeline=2, schedule="1f1b"),
    "tied one": ParallelConfig(),
    "tied TP2": ParallelConfig(tensor=2),
    "tied PP2 V": ParallelConfig(pipeline=2),
    "tied PP2 1f1b": ParallelConfig(pipeline=2, schedule="1f1b"),
}
"""DeepSeek-V3 with multi-token prediction; "tied": Qwen2, whose embedding is its head."""
SAMPLED = (
    ("one", "TP2EP2"),
    ("TP2EP2", "EP2 distopt"),
    ("EP2 distopt", "one"),
    ("DP2", "PP2 V"),
    ("PP2 V", "DP2 distopt"),
    ("tied TP2", "tied PP2 V"),
)
HALF = (("one", "EP2 distopt"), ("EP2 distopt", "PP2 V"), ("DP2 distopt", "one"))
"""In bfloat16 the fp32 master weights are part of the optimizer; only there."""
ALL = tuple(
    (first, second)
    for first, second in itertools.product(LAYOUTS, LAYOUTS)
    if first.startswith("tied") == second.startswith("tied")
)
SAVED_AT, LAST = 2, 5


def config_of(directory: Path, layout: str, dtype: str) -> RunConfig:
    tied = layout.startswith("tied")
    model = directory / ("tied" if tied else "model")
    model.mkdir(exist_ok=True)
    shape = (
        {**DEEPSEEK_V3, "num_nextn_predict_layers": 1} if not tied else {**QWEN2, "tie_word_embeddings": True}
    )
    shape |= {"num_hidden_layers": 4, "initializer_range": 0.1}
    if not (model / "config.json").exists():
        partial = model / f"config {os.getpid()}"
        partial.write_text(json.dumps(shape))
        partial.rename(model / "config.json")
    return RunConfig(
        stage="sft",
        platform="cpu",
        num_steps=10,
        model=ModelConfig(
            path=str(model),
            init="random",
            dtype=dtype,
            router_bias_rate=0.0 if tied else 1e-3,
            mtp_loss_weight=0.0 if tied else 0.3,
        ),
        parallel=LAYOUTS[layout],
        optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1),
    )


def chunks(step: int, config: RunConfig) -> list[list[Any]]:
    rng = np.random.default_rng(step)
    samples = []
    for _ in range(6):
        length = int(rng.integers(5, 30))
        mask = np.ones(length - 1, dtype=np.float32)
        samples.append(Sample(rng.integers(0, 96, length), mask, mask / 100))
    return pack(samples, config.parallel.data, 64, config.token_alignment)


def train(trainer: Any, first: int) -> list[tuple[float, float, float]]:
    """(loss, MTP loss, gradient norm) of the steps up to LAST, summed over the ranks that count."""
    seen = []
    for step in range(first, LAST):
        report = trainer.sft_update(chunks(step, trainer.config)[trainer.mesh.data_rank], step)
        totals = report["totals"] if report["counted"] else {}
        sums = torch.tensor([totals.get("loss", 0.0), totals.get("mtp_loss", 0.0)]).double()
        dist.all_reduce(sums)
        seen.append((float(sums[0]), float(sums[1]), report["grad_norm"]))
    return seen


@contextlib.contextmanager
def trainer_in(
    directory: Path, layout: str, dtype: str, rank: int, size: int, meeting: Path
) -> Iterator[Any]:
    """A Trainer of its own process group, whose port rank 0 writes to the file `meeting`."""
    if rank == 0:
        partial = meeting.with_suffix(".partial")
        partial.write_text(str(free_port()))
        partial.rename(meeting)
    while not meeting.exists():
        time.sleep(0.01)
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    names["MASTER_PORT"] = int(meeting.read_text())
    os.environ.update({name: str(value) for name, value in names.items()})
    from r1mega.training.trainer import Trainer

    trainer = Trainer(config_of(directory, layout, dtype))
    yield trainer
    trainer.close()
    dist.barrier()
    dist.destroy_process_group()


def work(rank: int, directory: Path, dtype: str, size: int, tasks: list[tuple[str, ...]]) -> None:
    """Each task is (layout,): straight; or (from, to): continued."""
    for task in tasks:
        name = " to ".join(task)
        with trainer_in(directory, task[-1], dtype, rank, size, directory / f"{name}.port") as trainer:
            out = directory / name
            if len(task) == 1:
                for step in range(SAVED_AT):
                    trainer.sft_update(chunks(step, trainer.config)[trainer.mesh.data_rank], step)
                trainer.save(str(out), SAVED_AT, {"layout": task[0]})
            else:
                trainer.load(str(directory / task[0] / f"step-{SAVED_AT:08d}"))
                trainer.save(str(out), SAVED_AT, {})
            seen = train(trainer, SAVED_AT)
            trainer.finish_save()
            if rank == 0:
                torch.save(seen, out / "seen.pt")


def run(directory: Path, dtype: str, pairs: tuple[tuple[str, str], ...]) -> Path:
    """Every layout of `pairs` straight, then every pair; each number of processes started as rarely as may be."""
    layouts = sorted({name for pair in pairs for name in pair})
    size = {name: LAYOUTS[name].tensor * LAYOUTS[name].data * LAYOUTS[name].pipeline for name in LAYOUTS}
    stages: list[list[tuple[str, ...]]] = [[(name,) for name in layouts], list(pairs)]
    for tasks in stages:
        for processes in sorted(set(size.values())):
            mine = [task for task in tasks if size[task[-1]] == processes]
            if mine:
                mp.spawn(work, (directory, dtype, processes, mine), nprocs=processes)
    return directory


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, and Adam's step."""
    from megatron.core import dist_checkpointing

    values = dist_checkpointing.load_plain_tensors(str(checkpoint / f"step-{SAVED_AT:08d}"))
    assert values["adam_step"] == SAVED_AT
    return values | {"adam_step": torch.tensor(values["adam_step"])}


def differences(directory: Path, pair: tuple[str, str]) -> list[str]:
    first, second = stored(directory / pair[0]), stored(directory / " to ".join(pair))
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in first)
    return sorted(first.keys() ^ second.keys()) + [
        name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])
    ]


def assert_same_losses(directory: Path, pair: tuple[str, str]) -> None:
    """Those of the run that was not interrupted, in its layout."""
    expected = torch.load(directory / pair[0] / "seen.pt")
    seen = torch.load(directory / " to ".join(pair) / "seen.pt")
    assert len(seen) == LAST - SAVED_AT
    if pair[0] == pair[1]:
        assert seen == expected
    for now, then in zip(seen, expected, strict=True):
        assert now == pytest.approx(then, rel=2e-5)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("sampled"), "float32", SAMPLED)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("half"), "bfloat16", HALF)


@pytest.fixture(scope="module")
def every_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("every"), "float32", ALL)


@pytest.fixture
def one_process() -> Iterator[None]:
    with mesh_of(ParallelConfig()):
        yield


def names(pair: tuple[str, str]) -> str:
    return " to ".join(pair)


@pytest.mark.parametrize("pair", SAMPLED, ids=names)
def test_another_layout_loads_every_bit(pair: tuple[str, str], sampled: Path, one_process: None) -> None:
    assert differences(sampled, pair) == []


@pytest.mark.parametrize("pair", SAMPLED, ids=names)
def test_the_next_losses_are_those_of_the_uninterrupted_run(pair: tuple[str, str], sampled: Path) -> None:
    assert_same_losses(sampled, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", HALF, ids=names)
def test_master_weights_of_a_half_precision_model_move_too(
    pair: tuple[str, str], half: Path, one_process: None
) -> None:
    assert any(name.startswith("optimizer.state.fp32_param.") for name in stored(half / pair[0]))
    assert differences(half, pair) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pair", ALL, ids=names)
def test_every_layout_continues_every_other(
    pair: tuple[str, str], every_pair: Path, one_process: None
) -> None:
    assert differences(every_pair, pair) == []
    assert_same_losses(every_pair, pair)


def test_every_axis_of_the_trainer_is_among_the_layouts() -> None:
    default = ParallelConfig()
    used = {
        field.name
        for field in dataclasses.fields(ParallelConfig)
        for layout in LAYOUTS.values()
        if getattr(layout, field.name) != getattr(default, field.name)
    }
    assert {"tensor", "expert", "data", "pipeline", "distributed_optimizer"} <= used
