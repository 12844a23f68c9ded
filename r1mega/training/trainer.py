"""One rank of the trainer: the policy, its reference, its optimizer and PPO's critic in Megatron's layout.

Plain SPMD code: every rank runs the same methods with its own micro-batches. It knows nothing of Ray,
vLLM or the disk layout of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r1mega.algorithms.losses import Metrics, combine, grpo_loss, sft_loss, token_objective
from r1mega.config import RunConfig
from r1mega.parallel.mesh import destroy_mesh
from r1mega.parallel.offload import phase_memory
from r1mega.parallel.stages import StagePart
from r1mega.samples import PackedBatch
from r1mega.training.checkpoint import Saver
from r1mega.training.critic import Critic
from r1mega.training.optimizer import Optimizer
from r1mega.training.pipelined_model import Compute, PipelinedModel
from r1mega.training.process import join, on_device, update_report

if TYPE_CHECKING:  # r1mega.models imports Megatron, which Platform.prepare_megatron must meet first
    from r1mega.models.language_model import LanguageModel, TokenOutputs
    from r1mega.models.trunk import Hidden
    from r1mega_kernels.grpo_loss import Objective

Loss = Callable[["TokenOutputs", PackedBatch], tuple[Tensor, Metrics]]


class GateFailed(RuntimeError):
    """A check that guards the run's correctness found a violation; the message names the gate."""


class Trainer:
    """Built in every trainer process; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in its environment."""

    def __init__(self, config: RunConfig, threads: int = 1):
        self.config = config
        self.process = join(config, threads)
        self.rank, self.platform = self.process.rank, self.process.platform
        self.device, self.mesh = self.process.device, self.process.mesh
        from r1mega.models.hf_config import load_hf_config

        self.hf_config = load_hf_config(config.model.path)
        self.model = self._build()
        if config.stage == "rl" and config.grpo.routing_replay:
            from r1mega.models.replay import replay_routing

            replay_routing(self.model.stages)
        needs_reference = config.stage == "rl" and config.grpo.kl_coef > 0
        self.reference = self._build() if needs_reference else None
        if self.reference is not None:
            self.reference.requires_grad_(False)
        self.optimizer = Optimizer(self.model.stages, config.optimizer, config.parallel, config.num_steps)
        self.critic = Critic(config, self.process) if config.stage == "rl" and config.ppo.enabled else None
        """PPO's; GRPO has none."""
        reference = self.reference.stages if self.reference is not None else None
        self.saver = Saver(self.model.stages, reference, self.optimizer)
        optimizers = [self.optimizer]
        if self.critic is not None:
            self.saver.add("critic", self.critic.model.stages, self.critic.optimizer)
            optimizers.append(self.critic.optimizer)
        self.memory = phase_memory(config.checkpoint.offload, self._models, optimizers)
        self._prepared: list[list[PackedBatch]] = []

    def _build(self) -> PipelinedModel:
        from r1mega.models.hf_weights import import_hf
        from r1mega.models.language_model import build_model

        config = self.config

        def build(part: StagePart) -> LanguageModel:
            stage = build_model(self.hf_config, config.model, config.parallel, seed=config.seed, part=part)
            stage = stage.to(self.device)
            if config.model.init == "checkpoint":
                import_hf(stage, config.model.path)
            return stage

        return PipelinedModel(build, self.hf_config, config.model, config.parallel, self.mesh)

    # ---- forward passes

    def _compute(self, need_entropy: bool = False, objective: Objective | None = None) -> Compute:
        temperature = self.config.rollout.temperature if self.config.stage == "rl" else 1.0

        def compute(stage: torch.nn.Module, batch: PackedBatch, hidden: Hidden | None) -> Any:
            return stage(
                batch, hidden, temperature=temperature, need_entropy=need_entropy, objective=objective
            )

        return compute

    def logprobs(self, model: PipelinedModel, batches: list[PackedBatch]) -> list[Tensor | None]:
        """For each micro-batch fp32 [T], log-probs of its targets_T under `model` at the rollout's temperature.

        None in the processes of a pipeline that do not have the last stage.
        """
        model.eval()
        outputs = model.outputs(batches, self._compute())
        return [None if output is None else output.logprobs_T for output in outputs]

    # ---- updates

    def rl_prepare(self, mini_batches: list[list[PackedBatch]], step: int) -> None:
        """The forward passes of a rollout that need no reward: reference and old log-probs of this rank's chunks, and
        the critic's values.

        They run while rewards are still being computed (R1, appendix B.1); `rl_update` takes it from here.
        """
        self.saver.check()
        self._maybe_refresh_reference(step)
        for model in (self.model, self.reference, self.critic.model if self.critic is not None else None):
            if model is not None:
                model.place_experts()  # until the next rollout
        mini_batches = [[on_device(batch, self.device) for batch in chunks] for chunks in mini_batches]
        if self.reference is not None:
            mini_batches = self._with(mini_batches, "ref_logprobs_T", self.reference)
        if len(mini_batches) > 1:
            mini_batches = self._with(mini_batches, "old_logprobs_T", self.model)
        if self.critic is not None:
            mini_batches = self.critic.with_values(mini_batches)
        self._prepared = mini_batches

    def rl_update(self, of_sequences: list[list[Tensor]] | None, step: int) -> dict[str, Any]:
        """One optimizer step per mini-batch of `rl_prepare`, starting at policy update `step`.

        of_sequences[mini-batch][chunk]: fp32 [S], one number for each sequence of the chunk, padding's included: its
        advantage, or with a critic its reward. None where the chunks carry advantages_T (and returns_T) already.
        Returns {"totals": metric sums of this rank, "counted": whether this rank's sums count (one of each
        tensor group does), "grad_norm", "lr", ...}. Raises GateFailed before the first step changes anything.
        """
        mini_batches, self._prepared = self._prepared, []
        if of_sequences is not None and self.critic is not None:
            mini_batches = self.critic.with_advantages(mini_batches, of_sequences)
        elif of_sequences is not None:
            mini_batches = [
                [_with_advantages(batch, values_S) for batch, values_S in zip(chunks, values, strict=True)]
                for chunks, values in zip(mini_batches, of_sequences, strict=True)
            ]
        parts: list[Metrics] = []
        norms: list[float] = []
        critic_norms: list[float] = []
        for k, chunks in enumerate(mini_batches):
            objective = token_objective(self.config.grpo)
            totals = self._accumulate(chunks, self._grpo_loss, need_entropy=True, objective=objective)
            if k == 0 and self.model.has_last:
                self._check_first_update(totals, step)
            parts.append(totals)
            report = self.optimizer.step(step + k)
            norms.append(report.grad_norm)
            if self.critic is not None:
                of_critic, critic_report = self.critic.update(chunks, step + k)
                parts.append(of_critic)
                critic_norms.append(critic_report.grad_norm)
        whole = update_report(self.process, parts, norms, report.lr, self.model)
        return whole | ({"critic_grad_norm": sum(critic_norms) / len(critic_norms)} if critic_norms else {})

    def sft_update(self, chunks: list[PackedBatch], step: int) -> dict[str, Any]:
        """One optimizer step of next-token cross-entropy over this rank's chunks; returns what rl_update returns."""
        self.saver.check()
        chunks = [on_device(batch, self.device) for batch in chunks]

        def loss(outputs: TokenOutputs, batch: PackedBatch) -> tuple[Tensor, Metrics]:
            return sft_loss(outputs.logprobs_T, batch)

        self.model.place_experts()
        totals = self._accumulate(chunks, loss, need_entropy=False)
        report = self.optimizer.step(step)
        return update_report(self.process, [totals], [report.grad_norm], report.lr, self.model)

    def _grpo_loss(self, outputs: TokenOutputs, batch: PackedBatch) -> tuple[Tensor, Metrics]:
        """The gradient is that of `outputs.loss_sum`, where the head has computed it already."""
        value, metrics = grpo_loss(outputs.logprobs_T, outputs.entropy_T, batch, self.config.grpo)
        return value if outputs.loss_sum is None else outputs.loss_sum, metrics

    def _accumulate(
        self, chunks: list[PackedBatch], loss: Loss, *, need_entropy: bool, objective: Objective | None = None
    ) -> Metrics:
        """Forward and backward of one mini-batch; gradients are left in the buffers.

        Returns the sums of the metrics; nothing in the processes of a pipeline that do not have the last stage.
        """
        self.model.train()
        self.optimizer.zero_grad()
        parts: list[Metrics] = []

        def total(outputs: TokenOutputs, micro_batch: int) -> Tensor:
            value, metrics = loss(outputs, chunks[micro_batch])
            if outputs.mtp_loss_sum is not None:
                value = value + self.config.model.mtp_loss_weight * outputs.mtp_loss_sum
                metrics = metrics | {"mtp_loss": outputs.mtp_loss_sum.detach().double()}
            parts.append(metrics)
            return value

        self.model.forward_backward(
            self.optimizer.wrapped, chunks, self._compute(need_entropy, objective), total
        )
        return combine(parts)

    def _with(
        self, mini_batches: list[list[PackedBatch]], field: str, model: PipelinedModel
    ) -> list[list[PackedBatch]]:
        """Add `model`'s log-probs to every chunk, where they come out."""
        logprobs = iter(self.logprobs(model, [batch for chunks in mini_batches for batch in chunks]))

        def with_next(batch: PackedBatch) -> PackedBatch:
            added: dict[str, Any] = {field: next(logprobs)}
            return dataclasses.replace(batch, **added)

        return [[with_next(batch) for batch in chunks] for chunks in mini_batches]

    def _maybe_refresh_reference(self, step: int) -> None:
        """R1: the reference model is replaced by the latest policy every `reference_every` steps.

        Those are always a rollout's first step (checks.py), before its reference log-probs are computed.
        """
        every = self.config.grpo.reference_every
        if self.reference is not None and every and step > 0 and step % every == 0:
            self.reference.copy_weights_of(self.model)

    def _check_first_update(self, totals: Metrics, step: int) -> None:
        """Gates on the first update after a rollout, before any weight changes."""
        gates = self.config.gates
        tokens = max(float(totals["tokens"]), 1.0)
        mean = float(totals["logprob_mismatch"]) / tokens
        worst = float(totals["logprob_mismatch_max"])
        of_mean, of_worst = gates.logprob
        if not (mean <= of_mean and worst <= of_worst):  # NaN fails too
            raise GateFailed(
                f"gate rollout-logprobs, step {step}: engine and trainer disagree by {mean:.2e} on average and "
                f"{worst:.2e} at most (bounds gates.logprob={of_mean},{of_worst}): the engine does not hold the "
                "trainer's weights or computes them differently"
            )
        ratio = float(totals["ratio_deviation_max"])
        if not ratio <= gates.ratio:
            raise GateFailed(
                f"gate on-policy-ratio, step {step}: the first update's ratio is off 1 by {ratio:.2e} "
                f"(bound gates.ratio={gates.ratio})"
            )
        kl = float(totals.get("kl", 0.0))
        if not kl >= 0:
            raise GateFailed(f"gate kl, step {step}: the k3 KL sum is {kl:.3e}, which cannot be")

    # ---- state

    def _models(self) -> list[torch.nn.Module]:
        critic = self.critic.model if self.critic is not None else None
        models = [self.model, self.reference, critic]
        return [stage for model in models if model is not None for stage in model.stages]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors in Hugging Face names; collective, every rank must drain it."""
        from r1mega.models.hf_weights import named_hf_tensors

        return named_hf_tensors(self.model.stages)

    def save(self, root: str, step: int, state: dict[str, Any]) -> str:
        """Begin a checkpoint; with checkpoint.background it is complete when `finish_save` returns, at the latest."""
        settings = self.config.checkpoint
        path = self.saver.save(Path(root), step, state, keep=settings.keep, background=settings.background)
        return str(path)

    def finish_save(self) -> None:
        self.saver.wait()

    def load(self, path: str) -> None:
        self.saver.load(Path(path))

    def offload(self) -> dict[str, float]:
        """Weights, gradients and optimizer leave this rank's device, where checkpoint.offload says so."""
        return self.memory.out().as_metrics() if self.memory is not None else {}

    def onload(self) -> None:
        """They come back, bit for bit."""
        if self.memory is not None:
            self.memory.back()

    def export(self, path: str) -> None:
        """Write a Hugging Face directory that transformers and vLLM load."""
        from r1mega.models.hf_weights import export_hf

        export_hf(self.model.stages, path, self.config.model.path)

    def close(self) -> None:
        self.saver.wait()
        destroy_mesh()


def _with_advantages(batch: PackedBatch, advantages_S: Tensor) -> PackedBatch:
    """Every trained token of a sequence gets the sequence's advantage."""
    values_S = advantages_S.to(batch.loss_mask_T.device)
    return dataclasses.replace(batch, advantages_T=batch.loss_mask_T * values_S[batch.sequence_of_T])
