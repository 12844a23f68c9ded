"""One training step by itself, for CPU time: our trainer's ranks, and plain transformers on the same samples.

Both do what GRPO's update needs: reference log-probs, policy forward and backward with the clipped loss and
the KL term, gradient clipping, AdamW. Each runs on one thread per process, so that seconds of CPU are seconds
of work. Transformers gets padded micro-batches of sequences sorted by length, its best case.

S sequences, T tokens (padded), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1mega.algorithms.losses import grpo_loss
from r1mega.config import RunConfig
from r1mega.samples import PackedBatch, Sample
from r1mega.training.optimizer import ADAM_EPSILON

SEQUENCES_PER_MICRO_BATCH = 32


class TrainerAlone:
    """One rank of our trainer (RANK, WORLD_SIZE, ... in the environment) and its chunks."""

    def __init__(self, config: RunConfig, chunks: list[PackedBatch]):
        from r1mega.training.trainer import Trainer

        self.trainer = Trainer(config, threads=1)
        self.chunks, self.step = chunks, 0

    def round(self) -> dict[str, float]:
        began, wall = time.process_time(), time.monotonic()
        self.trainer.rl_prepare([self.chunks], self.step)
        report = self.trainer.rl_update(None, self.step)
        self.step += 1
        return {
            "cpu_seconds": time.process_time() - began,
            "seconds": time.monotonic() - wall,
            "grad_norm": report["grad_norm"],
        }


class TransformersAlone:
    """DeepseekV3ForCausalLM, a copy of it as reference, torch.optim.AdamW."""

    def __init__(self, config: RunConfig, samples: Sequence[Sample]):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.config = config
        self.model, self.reference = (
            AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32) for _ in range(2)
        )
        self.reference.requires_grad_(False)
        self.model.train()
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=ADAM_EPSILON,
            weight_decay=optimizer.weight_decay,
        )
        ordered = sorted(samples, key=lambda sample: len(sample.token_ids))
        starts = range(0, len(ordered), SEQUENCES_PER_MICRO_BATCH)
        self.micro_batches = [Padded(ordered[i : i + SEQUENCES_PER_MICRO_BATCH]) for i in starts]

    def round(self) -> dict[str, float]:
        began, wall = time.process_time(), time.monotonic()
        self.optimizer.zero_grad()
        for padded in self.micro_batches:
            with torch.no_grad():
                reference_T, _ = padded.logprobs(self.reference)
            logprobs_T, entropy_T = padded.logprobs(self.model)
            loss, _ = grpo_loss(logprobs_T, entropy_T, padded.batch(reference_T), self.config.grpo)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
        positions = sum(padded.inputs_ST.numel() for padded in self.micro_batches)
        real = sum(int(padded.attention_ST.sum()) for padded in self.micro_batches)
        return {
            "cpu_seconds": time.process_time() - began,
            "seconds": time.monotonic() - wall,
            "grad_norm": float(norm),
            "padding": 1 - real / positions,
        }


class Padded:
    """Samples padded to the longest. [S, T] arrays hold the shifted sequences."""

    def __init__(self, samples: Sequence[Sample]):
        self.inputs_ST = self._pad([sample.token_ids[:-1] for sample in samples])
        self.targets_ST = self._pad([sample.token_ids[1:] for sample in samples])
        self.attention_ST = self._pad(
            [np.ones(len(sample.token_ids) - 1, dtype=np.int64) for sample in samples]
        )
        self.samples = samples

    @staticmethod
    def _pad(rows: Sequence[np.ndarray]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)

    def logprobs(self, model: Any) -> tuple[Tensor, Tensor]:
        """Log-prob of every target and entropy of its distribution, [S*T]; the entropy without gradient."""
        logits_STV = model(input_ids=self.inputs_ST, attention_mask=self.attention_ST, use_cache=False).logits
        logprobs_STV = logits_STV.log_softmax(dim=-1)
        with torch.no_grad():
            entropy_ST = -(logprobs_STV.exp() * logprobs_STV).sum(dim=-1)
        return logprobs_STV.gather(-1, self.targets_ST[..., None]).flatten(), entropy_ST.flatten()

    def batch(self, reference_T: Tensor) -> PackedBatch:
        num_sequences, width = self.inputs_ST.shape
        return PackedBatch(
            tokens_T=self.inputs_ST.flatten(),
            targets_T=self.targets_ST.flatten(),
            positions_T=torch.arange(width).repeat(num_sequences),
            cu_seqlens_S=torch.arange(num_sequences + 1, dtype=torch.int32) * width,
            loss_mask_T=self._flat("loss_mask"),
            token_weights_T=self._flat("token_weights"),
            advantages_T=self._flat("advantages"),
            rollout_logprobs_T=self._flat("rollout_logprobs"),
            ref_logprobs_T=reference_T,
        )

    def _flat(self, field: str) -> Tensor:
        return self._pad([getattr(sample, field) for sample in self.samples]).flatten()
