"""The trainer on its own: resuming, gates, and one result for one process and two."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import DEEPSEEK_V3, free_port

from r1mega.config import GRPOConfig, ModelConfig, OptimizerConfig, ParallelConfig, PPOConfig, RunConfig
from r1mega.data.packing import pack
from r1mega.samples import Sample

pytestmark = pytest.mark.distributed


def config_of(model_dir: Path, stage: str = "sft", **changes: Any) -> RunConfig:
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps({**DEEPSEEK_V3, "initializer_range": 0.1}))
    base = RunConfig(
        stage=stage,
        platform="cpu",
        num_steps=10,
        model=ModelConfig(path=str(model_dir), init="random", dtype="float32", router_bias_rate=1e-3),
        optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1),
    )
    return dataclasses.replace(base, **changes)


def batch(step: int, parallel: ParallelConfig, rl: bool = False, align: int = 1) -> list[list]:
    """The step's packed chunks for every data rank."""
    rng = np.random.default_rng(step)
    samples = []
    for _ in range(6):
        n = int(rng.integers(5, 30))
        mask = np.ones(n - 1, dtype=np.float32)
        extra: dict[str, Any] = {}
        if rl:
            extra = {"advantages": mask * rng.normal(), "rollout_logprobs": np.zeros(n - 1)}
            extra = {key: value.astype(np.float32) for key, value in extra.items()}
        samples.append(Sample(rng.integers(0, 96, n), mask, mask / 100, **extra))
    return pack(samples, parallel.data, tokens_per_chunk=64, align=align)


def in_processes(size: int, function: Callable, *args: Any) -> None:
    mp.spawn(_enter, (size, free_port(), function, args), nprocs=size)


def _enter(rank: int, size: int, port: int, function: Callable, args: tuple) -> None:
    names = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    from r1mega.training.trainer import Trainer

    config, *rest = args
    trainer = Trainer(config)
    function(trainer, *rest)
    trainer.close()


def train(trainer, first: int, last: int) -> list[tuple[float, float]]:
    seen = []
    for step in range(first, last):
        chunks = batch(step, trainer.config.parallel)[trainer.mesh.data_rank]
        report = trainer.sft_update(chunks, step)
        seen.append((report["totals"]["loss"], report["grad_norm"]))
    return seen


def straight(trainer, out: Path) -> None:
    seen = train(trainer, 0, 2)
    trainer.save(str(out / "checkpoints"), 2, {"note": "kept"})
    seen += train(trainer, 2, 5)
    torch.save((seen, dict(trainer.named_tensors())), out / f"straight {trainer.rank}.pt")


def resumed(trainer, out: Path) -> None:
    from r1mega.training import checkpoint

    (path,) = checkpoint.complete(out / "checkpoints")
    assert checkpoint.read_state(path) == {"note": "kept", "step": 2}
    trainer.load(str(path))
    seen = train(trainer, 2, 5)
    torch.save((seen, dict(trainer.named_tensors())), out / f"resumed {trainer.rank}.pt")


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "two, distributed optimizer"])
def test_resume_is_bit_identical(sharded, tmp_path):
    """With the distributed optimizer this covers the step tensor that all parameters would share."""
    size = 2 if sharded else 1
    parallel = ParallelConfig(data=size, distributed_optimizer=sharded)
    config = config_of(tmp_path / "model", parallel=parallel)
    in_processes(size, straight, config, tmp_path)
    in_processes(size, resumed, config, tmp_path)
    for rank in range(size):
        seen, weights = torch.load(tmp_path / f"straight {rank}.pt")
        seen_again, weights_again = torch.load(tmp_path / f"resumed {rank}.pt")
        assert seen[2:] == seen_again
        assert weights.keys() == weights_again.keys()
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def losses(trainer, out: Path) -> None:
    torch.save(train(trainer, 0, 4), out / f"losses {trainer.config.parallel.data} {trainer.rank}.pt")


def test_two_data_ranks_train_like_one(tmp_path):
    for size in (1, 2):
        config = config_of(tmp_path / "model", parallel=ParallelConfig(data=size))
        in_processes(size, losses, config, tmp_path)
    one = torch.load(tmp_path / "losses 1 0.pt")
    two = [torch.load(tmp_path / f"losses 2 {rank}.pt") for rank in range(2)]
    for step, (loss, norm) in enumerate(one):
        assert two[0][step][0] + two[1][step][0] == pytest.approx(loss, rel=2e-5)
        assert two[0][step][1] == pytest.approx(norm, rel=2e-4)


def updated(trainer, mini_batches, step: int) -> dict:
    trainer.rl_prepare(mini_batches, step)
    return trainer.rl_update(None, step)


def gates(trainer, _out: Path) -> None:
    from r1mega.training.optimizer import NonFiniteGradient
    from r1mega.training.trainer import GateFailed

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in trainer.named_tensors()}

    def unchanged(before: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(before[name], tensor) for name, tensor in weights().items())

    (chunks,) = batch(0, trainer.config.parallel, rl=True)
    before = weights()
    with pytest.raises(GateFailed, match="rollout-logprobs"):  # the engine claims log-prob 0 everywhere
        updated(trainer, [chunks], 0)
    assert unchanged(before)

    honest = [
        dataclasses.replace(chunk, rollout_logprobs_T=trainer.logprobs(trainer.model, [chunk])[0])
        for chunk in chunks
    ]
    poisoned = [
        dataclasses.replace(chunk, advantages_T=chunk.advantages_T * float("nan")) for chunk in honest
    ]
    with pytest.raises(NonFiniteGradient):
        updated(trainer, [poisoned], 0)
    assert unchanged(before)

    report = updated(trainer, [honest, honest], 0)
    assert report["totals"]["logprob_mismatch_max"] < 1e-4
    assert not unchanged(before)

    trainer.config = dataclasses.replace(
        trainer.config,
        gates=dataclasses.replace(trainer.config.gates, ratio=-1.0, logprob=(10.0, 50.0)),
    )
    with pytest.raises(GateFailed, match="on-policy-ratio"):
        updated(trainer, [honest], 2)


def test_gates_stop_an_update_before_the_weights_change(tmp_path):
    config = config_of(tmp_path / "model", "rl", grpo=GRPOConfig(kl_coef=0.01))
    in_processes(1, gates, config, tmp_path)


def without_reference(trainer, _out: Path) -> None:
    (chunks,) = batch(0, trainer.config.parallel, rl=True)
    honest = [
        dataclasses.replace(chunk, rollout_logprobs_T=trainer.logprobs(trainer.model, [chunk])[0])
        for chunk in chunks
    ]
    report = updated(trainer, [honest], 0)
    assert trainer.reference is None
    assert "kl" not in report["totals"]
    from r1mega.training.trainer import GateFailed

    lost = [dataclasses.replace(c, rollout_logprobs_T=c.rollout_logprobs_T * float("nan")) for c in honest]
    with pytest.raises(GateFailed, match="rollout-logprobs"):
        updated(trainer, [lost], 1)


def test_without_kl_there_is_no_reference_and_nan_fails_the_gate(tmp_path):
    config = config_of(tmp_path / "model", "rl", grpo=GRPOConfig(kl_coef=0.0))
    in_processes(1, without_reference, config, tmp_path)


def replaying(trainer, _out: Path) -> None:
    from r1mega.models.experts import GroupLimitedRouter
    from r1mega.parallel.pipeline import PipelineError

    (chunks,) = batch(0, trainer.config.parallel, rl=True)
    bare = chunks[0]
    scores_TLE = torch.rand(len(bare.tokens_T), 2, 8, generator=torch.Generator().manual_seed(0))
    routed = dataclasses.replace(bare, experts_TLK=scores_TLE.topk(3).indices.byte())
    (reference,), (again,) = (trainer.logprobs(trainer.reference, [b]) for b in (bare, routed))
    assert torch.equal(reference, again)
    (policy,) = trainer.logprobs(trainer.model, [routed])
    assert float((policy - reference).abs().max()) > 1e-3, "equal weights, other experts"
    critics = [m for m in trainer.critic.model.stages[0].modules() if isinstance(m, GroupLimitedRouter)]
    assert [router.replayed for router in critics] == [None, None]
    honest = dataclasses.replace(routed, rollout_logprobs_T=policy, returns_T=torch.zeros_like(policy))
    trainer.rl_prepare([[honest], [honest]], 0)
    old = trainer._prepared[0][0].old_logprobs_T
    assert torch.equal(old, policy)
    trainer.rl_update(None, 0)  # its gate compares the first update's ratio with 1
    with pytest.raises(PipelineError, match=r"grpo\.routing_replay=true: a packed batch came without"):
        updated(trainer, [[bare]], 1)


def test_replay_is_the_policys_alone_in_old_logprobs_and_updates(tmp_path):
    grpo, ppo = GRPOConfig(kl_coef=0.01, routing_replay=True), PPOConfig(enabled=True)
    in_processes(1, replaying, config_of(tmp_path / "model", "rl", grpo=grpo, ppo=ppo), tmp_path)


def refreshing(trainer, _out: Path) -> None:
    (chunks,) = batch(0, trainer.config.parallel, rl=True)
    for step in range(3):
        honest = [
            dataclasses.replace(chunk, rollout_logprobs_T=trainer.logprobs(trainer.model, [chunk])[0])
            for chunk in chunks
        ]
        kl = updated(trainer, [honest], step)["totals"]["kl"]
        assert (kl > 1e-6) == (step == 1), f"step {step}: kl {kl}"


def test_the_reference_becomes_the_policy_every_n_steps(tmp_path):
    """The KL is zero at the start, not after one update, and zero again where the reference is refreshed."""
    config = config_of(tmp_path / "model", "rl", grpo=GRPOConfig(kl_coef=0.01, reference_every=2))
    in_processes(1, refreshing, config, tmp_path)


def failing_save(trainer, out: Path) -> None:
    from r1mega.training import checkpoint

    root = out / "checkpoints"
    trainer.save(str(root), 1, {})
    with pytest.raises(TypeError):  # not JSON: the write fails half-way
        trainer.save(str(root), 2, {"bad": object()})
    assert [path.name for path in checkpoint.complete(root)] == ["step-00000001"]
    assert [path.name for path in root.iterdir()] == ["step-00000001"], "something half-written stayed"


def test_a_failed_save_leaves_the_previous_checkpoint_and_nothing_else(tmp_path):
    in_processes(1, failing_save, config_of(tmp_path / "model"), tmp_path)
