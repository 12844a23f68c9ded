"""The trainer's token-level objective, computed in the head in one pass, beside autograd through log-probs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import batch, config_of, in_processes
from tiny_models import DEEPSEEK_V3, QWEN2

from r1mega.config import GateConfig, GRPOConfig, ModelConfig, OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.distributed

WITH_MTP = DEEPSEEK_V3 | {"num_nextn_predict_layers": 1}
TIED = QWEN2 | {"tie_word_embeddings": True}
LAYOUTS = {
    "one process": (WITH_MTP, ParallelConfig()),
    "TP2": (WITH_MTP, ParallelConfig(tensor=2)),
    "CP2": (WITH_MTP, ParallelConfig(context=2)),
    "PP2 dualpipev": (WITH_MTP, ParallelConfig(pipeline=2, schedule="dualpipev")),
    "TP2 without sequence_parallel, tied": (TIED, ParallelConfig(tensor=2, sequence_parallel=False)),
    "PP2 zb1p": (WITH_MTP, ParallelConfig(pipeline=2, schedule="zb1p")),
    "PP2 1f1b, tied": (TIED, ParallelConfig(pipeline=2)),
    "PP2 dualpipev, tied": (TIED, ParallelConfig(pipeline=2, schedule="dualpipev")),
    "DP2 ZeRO-1": (WITH_MTP, ParallelConfig(data=2, distributed_optimizer=True)),
}
SAMPLED = ("TP2", "CP2", "PP2 dualpipev")


def chunks_of(trainer: Any, step: int) -> list:
    """Prompts of three tokens, and an engine whose log-probs are off by enough to be weighted."""
    chunks = batch(step, trainer.config.parallel, rl=True, align=4)[trainer.mesh.data_rank]
    trained = [(chunk.positions_T > 2) * chunk.loss_mask_T for chunk in chunks]
    return [
        dataclasses.replace(
            chunk,
            loss_mask_T=mask_T,
            token_weights_T=chunk.token_weights_T * mask_T,
            rollout_logprobs_T=-4.5 * mask_T,
        )
        for chunk, mask_T in zip(chunks, trained, strict=True)
    ]


def curve(trainer: Any, first: int) -> list[dict[str, float]]:
    seen = []
    for step in (first, first + 2):
        trainer.rl_prepare([chunks_of(trainer, step), chunks_of(trainer, step + 1)], step)
        report = trainer.rl_update(None, step)
        seen.append({**report["totals"], "grad_norm": report["grad_norm"]})
    return seen


def one_way(trainer: Any, out: Path, in_head: bool) -> None:
    from r1mega.training import trainer as module

    objective, made = module.token_objective, []

    def choice(config: GRPOConfig) -> Any:
        made.append(objective(config) if in_head else None)
        return made[-1]

    module.token_objective = choice
    seen = curve(trainer, 0)
    assert made
    assert (made[0] is not None) == in_head
    torch.save(seen, out / f"{in_head} {trainer.rank}.pt")


def check(name: str, tmp_path: Path) -> None:
    model, parallel = LAYOUTS[name]
    config = config_of(
        tmp_path / "model",
        "rl",
        parallel=parallel,
        grpo=GRPOConfig(kl_coef=0.05, clip_low=0.02, clip_high=0.02, importance_cap=2.0),
        gates=GateConfig(logprob=(100.0, 100.0)),
        optimizer=OptimizerConfig(lr=1e-3),
        model=ModelConfig(
            path=str(tmp_path / "model"),
            init="random",
            dtype="float32",
            mtp_loss_weight=0.3 if model is WITH_MTP else 0.0,
            router_bias_rate=1e-3 if model is WITH_MTP else 0.0,
        ),
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps({**model, "initializer_range": 0.1}))
    size = parallel.tensor * parallel.context * parallel.pipeline * parallel.data
    for in_head in (True, False):
        in_processes(size, one_way, config, tmp_path, in_head)
    clipped = 0.0
    for rank in range(size):
        pair = [torch.load(tmp_path / f"{in_head} {rank}.pt") for in_head in (True, False)]
        for a, b in zip(*pair, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), f"rank {rank}, {key}"
        clipped += sum(step.get("clip_high", 0) + step.get("clip_low", 0) for step in pair[0])
    assert clipped > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_the_loss_in_the_head_trains_like_autograd_through_log_probs(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in SAMPLED])
def test_it_does_in_the_other_layouts_too(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
