"""Megatron's data-parallel gradient buffers and optimizer around a model's stages, and the learning-rate schedule.

Losses arrive as sums already weighted by the global batch (samples.py), so gradients are summed over
ranks and never divided again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from r1mega.config import OptimizerConfig, ParallelConfig

if TYPE_CHECKING:
    from r1mega.models.trunk import Trunk


ADAM_EPSILON = 1e-8


class NonFiniteGradient(RuntimeError):
    """A gradient is NaN or infinite: the gate that keeps it from reaching the weights."""


@dataclass(frozen=True)
class StepReport:
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Rate of the update that turns step `step` into `step + 1`: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Optimizer:
    """AdamW over the local shard: fp32 master weights and moments, sharded over data ranks if asked."""

    def __init__(
        self,
        stages: Sequence[Trunk],
        config: OptimizerConfig,
        parallel: ParallelConfig,
        total_steps: int,
        *,
        epsilon: float = ADAM_EPSILON,
    ):
        """stages: of this process; one, the model, where there is no pipeline."""
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from r1mega.training.stage_gradients import StageGradients

        self.config, self.total_steps = config, total_steps
        megatron = stages[0].config
        half = megatron.params_dtype is torch.bfloat16
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.distributed_optimizer, grad_reduce_in_fp32=True
        )
        self.wrapped = [
            StageGradients(stage.config, settings, Float16Module(stage.config, stage) if half else stage)
            for stage in stages
        ]
        """The stages inside the wrappers that keep their gradients; forward passes that train go through them."""
        options = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=epsilon,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            bf16=half,
            params_dtype=megatron.params_dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        groups = _float32_apart(options) if half else None
        self.megatron = get_megatron_optimizer(options, self.wrapped, groups)
        self.parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        """Dense and expert parameters are reduced over different groups, so they have optimizers of their own."""

    def zero_grad(self) -> None:
        for stage in self.wrapped:
            stage.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, step: int) -> StepReport:
        """Reduce the gradients or wait for it, clip, update the weights. Raises NonFiniteGradient before anything changes."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        biases = [
            (bias, bias.clone())
            for stage in self.wrapped
            for name, bias in stage.named_buffers()
            if name.endswith("expert_bias")
        ]
        finalize_model_grads(self.wrapped)  # reduces the gradients, and moves the routers' biases
        lr = learning_rate(step, self.config, self.total_steps)
        for group in self.megatron.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        found_inf = self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm() or 0.0)
        if found_inf or not math.isfinite(norm):
            for bias, before in biases:
                bias.copy_(before)
            raise NonFiniteGradient(
                f"step {step}: the gradient norm is {norm}; the weights were not changed. "
                "Lower optimizer.lr or look at the last rows of samples.jsonl"
            )
        for part in self.parts:
            if self.config.clip_grad > 0 and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.clip_grad, norm)
        updated = self.megatron.step_with_ready_grads()
        assert updated
        return StepReport(grad_norm=norm, lr=lr)


def _float32_apart(options: Any) -> dict[Any, Any]:
    """Megatron's parameter groups, and one more for float32 parameters of a half-precision model (a scalar head).

    In one group with the others their optimizer states would be taken for those of others: the distributed optimizer
    counts parameters in the order of its buffers and then puts float32 ones first (distrib_optimizer.py:587, :441).
    """
    from megatron.core.optimizer import ParamKey, ParamPredicate, get_standard_config_overrides

    is_float32 = ParamPredicate(name="float32", fn=lambda parameter: parameter.dtype is torch.float32)
    return get_standard_config_overrides(options) | {ParamKey(predicate=is_float32): {"lr_mult": 1.0}}
