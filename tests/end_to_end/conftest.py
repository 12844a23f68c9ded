"""Ray and two vLLM engines, started once per session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rollout_fixtures import checkpoint_weights, deepseek, save_tokenizer, spawn_engine

from r1mega.config import DataConfig, GRPOConfig, ModelConfig, RolloutConfig, RunConfig


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
        grpo=GRPOConfig(group_size=4, questions_per_step=6),
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
