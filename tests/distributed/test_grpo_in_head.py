"""The trainer's token-level objective, computed in the head in one pass, beside autograd through log-probs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_trainer import batch, config_of, in_processes
from tiny_models import DEEPSEEK_V3

from r1mega.config import GateConfig, GRPOConfig, ModelConfig, OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one process": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP2 without sequence_parallel": ParallelConfig(tensor=2, sequence_parallel=False),
    "CP2": ParallelConfig(context=2),
    "PP2 dualpipev": ParallelConfig(pipeline=2, schedule="dualpipev"),
    "PP2 zb1p": ParallelConfig(pipeline=2, schedule="zb1p"),
    "DP2 ZeRO-1": ParallelConfig(data=2, distributed_optimizer=True),
}
SAMPLED = ("one process", "TP2", "CP2", "PP2 dualpipev")


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


def both_ways(trainer: Any, out: Path) -> None:
    from r1mega.training import trainer as module

    path = trainer.save(str(out / "checkpoints"), 0, {})
    trainer.finish_save()
    objective = module.token_objective
    used = []
    module.token_objective = lambda config: used.append(1) or objective(config)
    in_head = curve(trainer, 0)
    assert used
    trainer.load(path)
    module.token_objective = lambda config: None
    through_logprobs = curve(trainer, 0)
    for a, b in zip(in_head, through_logprobs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name
    if trainer.model.has_last:
        assert in_head[0]["kl"] > 0
        assert in_head[1]["clip_high"] + in_head[1]["clip_low"] > 0


def check(name: str, tmp_path: Path) -> None:
    parallel = LAYOUTS[name]
    config = config_of(
        tmp_path / "model",
        "rl",
        parallel=parallel,
        grpo=GRPOConfig(kl_coef=0.05, clip_low=0.02, clip_high=0.02, importance_cap=2.0),
        gates=GateConfig(logprob_mean=100.0, logprob_max=100.0),
        optimizer=OptimizerConfig(lr=1e-3),
        model=ModelConfig(
            path=str(tmp_path / "model"),
            init="random",
            dtype="float32",
            mtp_loss_weight=0.3,
            router_bias_rate=1e-3,
        ),
    )
    with_mtp = {**DEEPSEEK_V3, "initializer_range": 0.1, "num_nextn_predict_layers": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(with_mtp))
    size = parallel.tensor * parallel.context * parallel.pipeline * parallel.data
    in_processes(size, both_ways, config, tmp_path)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_loss_in_the_head_trains_like_autograd_through_log_probs(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in SAMPLED])
def test_it_does_in_the_other_layouts_too(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
