"""Started once per session: Ray with two vLLM engines; a whole SFT run and a whole RL run on its model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import WholeRun, completions, sums, whole_run, write_jsonl
from rollout_fixtures import checkpoint_weights, deepseek, save_tokenizer, spawn_engine

from r1mega.config import DataConfig, GRPOConfig, ModelConfig, RolloutConfig, RunConfig

SFT = (
    "run", "configs/tiny/base.py", "num_steps=30", "parallel.data=1", "sft.batch_size=16",
    "optimizer.lr=5e-3", "optimizer.warmup_steps=3", "checkpoint.every=10", "checkpoint.keep=3",
)  # fmt: skip
RL = (
    "run", "configs/tiny/r1_zero.py", "num_steps=5", "parallel.data=1", "rollout.engines=1",
    "grpo.group_size=4", "grpo.questions_per_step=8", "rollout.max_tokens=40", "data.eval_size=8",
    "rewards.cpu_seconds=0.2", "optimizer.warmup_steps=0", "optimizer.lr=3e-4",
    "checkpoint.every=2",
)  # fmt: skip


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """30 steps from random weights; its hf/ answers sums in the right format, at random."""
    scratch = tmp_path_factory.mktemp("sft")
    data = write_jsonl(scratch / "completions.jsonl", completions(seed=0))
    return whole_run((*SFT, f"data={data}"), scratch)


@pytest.fixture(scope="session")
def rl_run(sft_run: WholeRun, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """5 steps from the SFT model, with checkpoints at 2, 4 and 5."""
    scratch = tmp_path_factory.mktemp("rl")
    data = write_jsonl(scratch / "sums.jsonl", sums())
    return whole_run((*RL, f"model={sft_run.directory / 'hf'}", f"data={data}"), scratch)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with tokenizer and MTP layer; reload it with `deepseek(..., seed=0)`."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("model") / "tiny"
    vocab_size = save_tokenizer(path)
    save_file(checkpoint_weights(deepseek(vocab_size, seed=0), path), path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path) -> RunConfig:
    return RunConfig(
        seed=3,
        platform="cpu",
        model=ModelConfig(path=str(tiny_model), dtype="float32"),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(
            engines=2, max_tokens=((0, 24),), dtype="float32", kv_cache_gib=0.0625, max_concurrent=32
        ),
        grpo=GRPOConfig(group_size=4, questions_per_step=6, routing_replay=True),
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    from r1mega import cluster

    with cluster.start(RunConfig()):
        yield


@pytest.fixture(scope="session")
def engines(ray_cluster: None, tiny_run: RunConfig) -> Iterator[Any]:
    """A RolloutGroup of two engines; their weights change from test to test."""
    from r1mega import cluster
    from r1mega.rollout.engine import RolloutGroup

    async def start() -> list[Any]:
        handles = [spawn_engine(tiny_run, index) for index in range(2)]
        await asyncio.gather(*(handle.ready() for handle in handles))
        return handles

    handles = asyncio.run(start())
    yield RolloutGroup(handles)
    for handle in handles:
        cluster.kill(handle)


@pytest.fixture
def speculative_run(tiny_run: RunConfig) -> RunConfig:
    return replace(tiny_run, rollout=replace(tiny_run.rollout, engines=1, speculative_tokens=1))
