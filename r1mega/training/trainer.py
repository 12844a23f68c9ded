"""One rank of the trainer: the policy, its reference and its optimizer in Megatron's layout.

Plain SPMD code: every rank runs the same methods with its own micro-batches. It knows nothing of Ray,
vLLM or the disk layout of a run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r1mega import platforms
from r1mega.algorithms.losses import Metrics, combine, grpo_loss, sft_loss
from r1mega.config import RunConfig
from r1mega.parallel.mesh import destroy_mesh, init_mesh
from r1mega.samples import PackedBatch
from r1mega.training import checkpoint
from r1mega.training.optimizer import Optimizer

if TYPE_CHECKING:  # r1mega.models imports Megatron, which Platform.prepare_megatron must meet first
    from r1mega.models.language_model import LanguageModel, TokenOutputs


class GateFailed(RuntimeError):
    """A check that guards the run's correctness found a violation; the message names the gate."""


class Trainer:
    """Built in every trainer process; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in its environment."""

    def __init__(self, config: RunConfig, threads: int = 1):
        self.config = config
        self.rank = int(os.environ["RANK"])
        self.platform = platforms.detect(config.platform)
        self.platform.set_threads(threads)
        self.platform.prepare_megatron()
        self.device = self.platform.device_of(int(os.environ["LOCAL_RANK"]))
        self.platform.init_process_group(
            self.rank,
            int(os.environ["WORLD_SIZE"]),
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            config.sync.timeout_seconds,
        )
        from r1mega.models.hf_config import load_hf_config

        self.mesh = init_mesh(config.parallel, seed=config.seed)
        self.hf_config = load_hf_config(config.model.path)
        self.model = self._build()
        needs_reference = config.stage == "rl" and config.grpo.kl_coef > 0
        self.reference = self._build() if needs_reference else None
        if self.reference is not None:
            self.reference.requires_grad_(False)
        self.optimizer = Optimizer(self.model, config.optimizer, config.parallel, config.num_steps)

    def _build(self) -> LanguageModel:
        from r1mega.models.hf_weights import import_hf
        from r1mega.models.language_model import build_model

        config = self.config
        model = build_model(self.hf_config, config.model, config.parallel, seed=config.seed).to(self.device)
        if config.model.init == "checkpoint":
            import_hf(model, config.model.path)
        return model

    # ---- forward passes

    def _forward(
        self, model: torch.nn.Module, batch: PackedBatch, need_entropy: bool = False
    ) -> TokenOutputs:
        temperature = self.config.rollout.temperature if self.config.stage == "rl" else 1.0
        return model(batch, temperature=temperature, need_entropy=need_entropy)

    @torch.no_grad()
    def logprobs(self, model: torch.nn.Module, batch: PackedBatch) -> Tensor:
        """fp32 [T] log-probs of batch.targets_T under `model`, at the rollout's temperature."""
        model.eval()
        return self._forward(model, batch).logprobs_T

    # ---- updates

    def rl_update(self, mini_batches: list[list[PackedBatch]], step: int) -> dict[str, Any]:
        """One optimizer step per mini-batch over this rank's chunks, starting at policy update `step`.

        Returns {"totals": metric sums of this rank, "counted": whether this rank's sums count (one of each
        tensor group does), "grad_norm", "lr", ...}. Raises GateFailed before the first step changes anything.
        """
        self._maybe_refresh_reference(step)
        mini_batches = [[_to(batch, self.device) for batch in chunks] for chunks in mini_batches]
        if self.reference is not None:
            mini_batches = self._with(mini_batches, "ref_logprobs_T", self.reference)
        if len(mini_batches) > 1:
            mini_batches = self._with(mini_batches, "old_logprobs_T", self.model)
        parts: list[Metrics] = []
        norms: list[float] = []
        for k, chunks in enumerate(mini_batches):
            totals = self._accumulate(chunks)
            if k == 0:
                self._check_first_update(totals, step)
            parts.append(totals)
            report = self.optimizer.step(step + k)
            norms.append(report.grad_norm)
        return self._report(parts, norms, report.lr)

    def sft_update(self, chunks: list[PackedBatch], step: int) -> dict[str, Any]:
        """One optimizer step of next-token cross-entropy over this rank's chunks; returns what rl_update returns."""
        self.model.train()
        self.optimizer.zero_grad()
        parts = []
        for batch in chunks:
            batch = _to(batch, self.device)
            outputs = self._forward(self.optimizer.ddp, batch)
            loss, metrics = sft_loss(outputs.logprobs_T, batch)
            parts.append(metrics | self._backward(loss, outputs))
        report = self.optimizer.step(step)
        return self._report(parts, [report.grad_norm], report.lr)

    def _accumulate(self, chunks: list[PackedBatch]) -> Metrics:
        """Forward and backward of one mini-batch; gradients are left in the buffers."""
        self.model.train()
        self.optimizer.zero_grad()
        parts = []
        for batch in chunks:
            outputs = self._forward(self.optimizer.ddp, batch, need_entropy=True)
            loss, metrics = grpo_loss(outputs.logprobs_T, outputs.entropy_T, batch, self.config.grpo)
            parts.append(metrics | self._backward(loss, outputs))
        return combine(parts)

    def _backward(self, loss: Tensor, outputs: TokenOutputs) -> Metrics:
        """Gradients of the loss and of the multi-token-prediction loss, which is returned where there is one."""
        if outputs.mtp_loss_sum is None:
            loss.backward()
            return {}
        (loss + self.config.model.mtp_loss_weight * outputs.mtp_loss_sum).backward()
        return {"mtp_loss": outputs.mtp_loss_sum.detach().double()}

    def _with(
        self, mini_batches: list[list[PackedBatch]], field: str, model: torch.nn.Module
    ) -> list[list[PackedBatch]]:
        """Add `model`'s log-probs to every chunk."""

        def with_logprobs(batch: PackedBatch) -> PackedBatch:
            added: dict[str, Any] = {field: self.logprobs(model, batch)}
            return dataclasses.replace(batch, **added)

        return [[with_logprobs(batch) for batch in chunks] for chunks in mini_batches]

    def _maybe_refresh_reference(self, step: int) -> None:
        """R1: the reference model is replaced by the latest policy every `reference_every` steps.

        Those are always a rollout's first step (checks.py), before its reference log-probs are computed.
        """
        every = self.config.grpo.reference_every
        if self.reference is not None and every and step > 0 and step % every == 0:
            self.reference.load_state_dict(self.model.state_dict())

    def _check_first_update(self, totals: Metrics, step: int) -> None:
        """Gates on the first update after a rollout, before any weight changes."""
        gates = self.config.gates
        tokens = max(float(totals["tokens"]), 1.0)
        mean = float(totals["logprob_mismatch"]) / tokens
        worst = float(totals["logprob_mismatch_max"])
        if not (mean <= gates.logprob_mean and worst <= gates.logprob_max):  # NaN fails too
            raise GateFailed(
                f"gate rollout-logprobs, step {step}: engine and trainer disagree by {mean:.2e} on average and "
                f"{worst:.2e} at most (bounds gates.logprob_mean={gates.logprob_mean}, "
                f"gates.logprob_max={gates.logprob_max}): the engine does not hold the trainer's weights or "
                "computes them differently"
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

    def _report(self, parts: list[Metrics], norms: list[float], lr: float) -> dict[str, Any]:
        return {
            "totals": {key: float(value) for key, value in combine(parts).items()},
            "counted": self.mesh.tensor_rank == 0,
            "grad_norm": sum(norms) / len(norms),
            "lr": lr,
            "peak_memory_bytes": self.platform.peak_memory_bytes(),
        }

    # ---- state

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors in Hugging Face names; collective, every rank must drain it."""
        from r1mega.models.hf_weights import named_hf_tensors

        return named_hf_tensors(self.model)

    def save(self, root: str, step: int, state: dict[str, Any]) -> str:
        path = checkpoint.save(
            Path(root), step, self.model, self.reference, self.optimizer, state, self.config.checkpoint.keep
        )
        return str(path)

    def load(self, path: str) -> None:
        checkpoint.load(Path(path), self.model, self.reference, self.optimizer)

    def export(self, path: str) -> None:
        """Write a Hugging Face directory that transformers and vLLM load."""
        from r1mega.models.hf_weights import export_hf

        export_hf(self.model, path, self.config.model.path)

    def close(self) -> None:
        destroy_mesh()


def _to(batch: PackedBatch, device: torch.device) -> PackedBatch:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved: dict[str, Any] = {k: v.to(device) for k, v in fields.items() if isinstance(v, Tensor)}
    return dataclasses.replace(batch, **moved)
