"""One rank of a reward model: scoring texts, and training on preferences (R1 section 3.1).

Plain SPMD code beside trainer.py: every rank runs the same methods with its own chunks, and nothing here knows
Ray or the disk layout of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.algorithms.losses import Metrics
from r1mega.algorithms.preference_losses import binary_cross_entropy, bradley_terry
from r1mega.config import RunConfig
from r1mega.data.score_packing import PreferenceBatch, pack_whole
from r1mega.parallel.mesh import destroy_mesh
from r1mega.samples import PackedBatch
from r1mega.training import checkpoint
from r1mega.training.optimizer import Optimizer
from r1mega.training.process import join, on_device, update_report

if TYPE_CHECKING:  # r1mega.models imports Megatron, which Platform.prepare_megatron must meet first
    from r1mega.models.heads import ScalarModel


class RewardModel:
    """A scalar model that scores; built in every process of a group (process.py says what it finds there)."""

    def __init__(self, config: RunConfig, threads: int = 1):
        self.config = config
        self.process = join(config, threads)
        self.rank, self.mesh = self.process.rank, self.process.mesh
        self.had_head = False
        """Whether the model's directory brought a head; else it began at zero."""
        self.model = self._build()

    def _build(self) -> ScalarModel:
        from r1mega.models.heads import build_scalar_model, import_scalar_model
        from r1mega.models.hf_config import load_hf_config

        config = self.config
        hf_config = load_hf_config(config.model.path)
        model = build_scalar_model(hf_config, config.model, config.parallel, seed=config.seed)
        model = model.to(self.process.device)
        if config.model.init == "checkpoint":
            self.had_head = import_scalar_model(model, config.model.path)
        return model

    def brought_head(self) -> bool:
        return self.had_head

    @torch.no_grad()
    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[float]:
        """One score per sequence, in their order and the same on every rank, read at its last token.

        Every rank is given all sequences and runs its share of the packed chunks. A sequence longer than
        parallel.tokens_per_chunk gets a chunk as long as itself: at inference there is no limit.
        """
        if not token_id_lists:
            return []
        config = self.config
        capacity = max(config.parallel.tokens_per_chunk, *map(len, token_id_lists)) + config.token_alignment
        examples = [[sequence] for sequence in token_id_lists]
        chunks = pack_whole(examples, self.mesh.data_size, capacity, config.token_alignment)
        scores_N = torch.zeros(len(examples), dtype=torch.float32, device=self.process.device)
        self.model.eval()
        for chunk in chunks[self.mesh.data_rank]:
            members = torch.tensor(chunk.members, dtype=torch.int64, device=scores_N.device)
            scores_N[members] = self._scores(self.model, on_device(chunk, self.process.device))
        dist.all_reduce(scores_N, group=self.mesh.data_group)
        return scores_N.tolist()

    @staticmethod
    def _scores(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
        """float32 [N]: the scores of a chunk's sequences, in order."""
        return model(batch)[batch.loss_mask_T > 0]

    def close(self) -> None:
        destroy_mesh()


class RewardTrainer(RewardModel):
    """A reward model with its optimizer."""

    def __init__(self, config: RunConfig, threads: int = 1):
        super().__init__(config, threads)
        self.optimizer = Optimizer(self.model, config.optimizer, config.parallel, config.num_steps)

    def update(self, chunks: list[PreferenceBatch], step: int) -> dict[str, Any]:
        """One optimizer step over this rank's chunks; returns process.update_report's dict."""
        self.model.train()
        self.optimizer.zero_grad()
        parts = []
        for chunk in chunks:
            loss, metrics = self._loss(chunk)
            loss.backward()
            parts.append(metrics)
        report = self.optimizer.step(step)
        return update_report(self.process, parts, [report.grad_norm], report.lr)

    def _loss(self, chunk: PreferenceBatch) -> tuple[Tensor, Metrics]:
        batch = on_device(chunk.packed, self.process.device)
        scores_N = self._scores(self.optimizer.ddp, batch)
        weights_N = batch.token_weights_T[batch.loss_mask_T > 0]
        tokens = torch.tensor(float(len(batch.tokens_T) - batch.num_padding), dtype=torch.float64)
        if chunk.labels_N is None:
            loss, metrics = bradley_terry(scores_N.view(-1, 2), weights_N[::2])
        else:
            loss, metrics = binary_cross_entropy(scores_N, chunk.labels_N.to(scores_N), weights_N)
        return loss, metrics | {"tokens": tokens}

    def save(self, root: str, step: int, state: dict[str, Any]) -> str:
        keep = self.config.checkpoint.keep
        return str(checkpoint.save(Path(root), step, self.model, None, self.optimizer, state, keep))

    def load(self, path: str) -> None:
        checkpoint.load(Path(path), self.model, None, self.optimizer)

    def export(self, path: str) -> None:
        """Write a directory in Hugging Face's sequence-classification layout."""
        from r1mega.models.hf_weights import export_hf

        export_hf(self.model, path, self.config.model.path)
