"""PPO's critic in the trainer: it learns, layouts agree, it is saved and leaves memory; GRPO has none."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import batch, config_of, in_processes
from tiny_models import QWEN2

from r1mega.config import CheckpointConfig, GateConfig, GRPOConfig, ParallelConfig, PPOConfig, RunConfig

pytestmark = pytest.mark.distributed


def ppo_config(model_dir: Path, **changes: Any) -> RunConfig:
    """Gates wide open: the random samples carry no engine's log-probs."""
    fields: dict[str, Any] = {
        "grpo": GRPOConfig(kl_coef=0.0),
        "ppo": PPOConfig(enabled=True, gae_lambda=0.95, lr=3e-3),
        "gates": GateConfig(logprob=(100.0, 100.0)),
    }
    return config_of(model_dir, "rl", **(fields | changes))


def update(trainer: Any, step: int) -> dict[str, Any]:
    """Two mini-batches; the reward of an output is a function of its number."""
    mini_batches = [
        batch(k, trainer.config.parallel, rl=True, align=2)[trainer.mesh.data_rank] for k in (step, step + 50)
    ]
    rewards = []
    for chunks in mini_batches:
        padding = [[0.0] * (chunk.num_sequences - len(chunk.members)) for chunk in chunks]
        rewards.append(
            [
                torch.tensor([float(m % 3) for m in chunk.members] + rest)
                for chunk, rest in zip(chunks, padding, strict=True)
            ]
        )
    trainer.rl_prepare(mini_batches, 2 * step)
    return trainer.rl_update(rewards, 2 * step)


def state(trainer: Any) -> dict[str, torch.Tensor]:
    """Policy, critic and both optimizers' moments."""
    tensors = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    tensors |= {f"critic {name}": p.detach() for name, p in trainer.critic.model.named_parameters()}
    for owner in (trainer.optimizer, trainer.critic.optimizer):
        moments = [m for part in owner.parts for m in part.optimizer.state.values()]
        tensors |= {
            f"{owner is trainer.optimizer} {n} {k}": v for n, m in enumerate(moments) for k, v in m.items()
        }
    return {name: tensor.clone() for name, tensor in tensors.items()}


def straight(trainer: Any, out: Path) -> None:
    seen = [update(trainer, 0)]
    trainer.save(str(out / "checkpoints"), 2, {})
    seen += [update(trainer, step) for step in (1, 2)]
    torch.save((seen, state(trainer)), out / f"straight {trainer.config.parallel.data} {trainer.rank}.pt")


def resumed(trainer: Any, out: Path) -> None:
    trainer.load(str(out / "checkpoints/step-00000002"))
    reports = []
    for step in (1, 2):
        moved = trainer.offload()
        assert moved["offload/moved_mib"] > 0
        assert all(
            p.untyped_storage().nbytes() == 0 for p in trainer.critic.model.parameters() if p.nbytes > 4096
        )
        trainer.onload()
        reports.append(update(trainer, step))
    torch.save((reports, state(trainer)), out / f"resumed {trainer.rank}.pt")


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_and_offloaded_critic_is_bit_identical(sharded: bool, tmp_path: Path) -> None:
    size = 2 if sharded else 1
    parallel = ParallelConfig(data=size, distributed_optimizer=sharded)
    in_processes(size, straight, ppo_config(tmp_path / "model", parallel=parallel), tmp_path)
    away = ppo_config(tmp_path / "model", parallel=parallel, checkpoint=CheckpointConfig(offload="host"))
    in_processes(size, resumed, away, tmp_path)
    for rank in range(size):
        (_, *reports), tensors = torch.load(tmp_path / f"straight {size} {rank}.pt")
        again, tensors_again = torch.load(tmp_path / f"resumed {rank}.pt")
        assert [r["totals"] for r in reports] == [r["totals"] for r in again]
        assert [r["critic_grad_norm"] for r in reports] == [r["critic_grad_norm"] for r in again]
        assert tensors.keys() == tensors_again.keys()
        assert all(torch.equal(tensors[name], tensors_again[name]) for name in tensors)


def reports_only(trainer: Any, out: Path) -> None:
    torch.save(
        [update(trainer, step) for step in range(3)], out / f"{trainer.mesh.world_size} {trainer.rank}.pt"
    )


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(data=2),
        pytest.param(ParallelConfig(pipeline=2), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(tensor=2), marks=pytest.mark.slow),
    ],
    ids=["data", "pipeline", "tensor"],
)
def test_a_critic_in_two_processes_trains_like_one(parallel: ParallelConfig, tmp_path: Path) -> None:
    in_processes(1, reports_only, ppo_config(tmp_path / "model"), tmp_path)
    in_processes(2, reports_only, ppo_config(tmp_path / "model", parallel=parallel), tmp_path)
    one = torch.load(tmp_path / "1 0.pt")
    two = [torch.load(tmp_path / f"2 {rank}.pt") for rank in range(2)]
    for step, alone in enumerate(one):
        counted = [reports[step]["totals"] for reports in two if reports[step]["counted"]]
        for name in ("loss", "value_loss", "returns", "values", "value_residual_squared", "tokens"):
            whole = sum(totals[name] for totals in counted)
            # The policy's loss is a sum of about 200 terms of size 1/100 and either sign, which nearly cancel.
            near = pytest.approx(alone["totals"][name], rel=1e-3, abs=1e-4 if name == "loss" else 1e-5)
            assert whole == near, (step, name)
        for name in ("grad_norm", "critic_grad_norm"):
            assert two[0][step][name] == pytest.approx(alone[name], rel=2e-3), (step, name)


@pytest.mark.slow
def test_a_tied_embedding_is_no_copy_in_a_critic_over_two_ranks(tmp_path: Path) -> None:
    """A pipeline whose last stage lies in another rank than the first: the policy has a copy there, the critic none."""
    pipeline = ParallelConfig(pipeline=2, schedule="1f1b")
    for size, parallel in ((1, ParallelConfig()), (2, pipeline)):
        config = ppo_config(tmp_path / "model", parallel=parallel)
        config = replace(config, model=replace(config.model, router_bias_rate=0.0))
        tied = {**QWEN2, "initializer_range": 0.1}
        (tmp_path / "model/config.json").write_text(json.dumps(tied))
        in_processes(size, reports_only, config, tmp_path)
    one, two = torch.load(tmp_path / "1 0.pt"), torch.load(tmp_path / "2 1.pt")
    for alone, last in zip(one, two, strict=True):
        assert last["totals"]["value_loss"] == pytest.approx(alone["totals"]["value_loss"], rel=1e-3)
        assert last["critic_grad_norm"] == pytest.approx(alone["critic_grad_norm"], rel=2e-3)


def learning(trainer: Any, _out: Path) -> None:
    first = update(trainer, 0)["totals"]
    assert first["values"] == 0, "a critic begins with a head of zeros"
    errors = [update(trainer, 0)["totals"]["value_residual_squared"] for _ in range(25)]
    assert errors[-1] < 0.3 * first["value_residual_squared"]


def test_the_critic_learns_the_outcomes(tmp_path: Path) -> None:
    in_processes(1, learning, ppo_config(tmp_path / "model", num_steps=1000), tmp_path)


def without(trainer: Any, _out: Path) -> None:
    from r1mega.models.heads import ScalarHead, ScalarModel

    assert trainer.critic is None
    assert not [thing for thing in gc.get_objects() if isinstance(thing, ScalarHead | ScalarModel)]
    owned = {id(p) for module in trainer._models() for p in module.parameters()}
    assert len(owned) == 2 * len(list(trainer.model.parameters())), "the policy and its reference"
    update(trainer, 0)
    totals = update(trainer, 1)["totals"]
    assert not [name for name in totals if name.startswith(("value", "return"))]


def test_grpo_allocates_no_value_model(tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "model", ppo=PPOConfig(), grpo=GRPOConfig(kl_coef=0.01))
    in_processes(1, without, config, tmp_path)
