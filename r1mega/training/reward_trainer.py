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
from r1mega.parallel.stages import StagePart
from r1mega.samples import PackedBatch
from r1mega.training.checkpoint import Saver
from r1mega.training.optimizer import Optimizer
from r1mega.training.pipelined_model import PipelinedModel
from r1mega.training.process import join, on_device, update_report

if TYPE_CHECKING:  # r1mega.models imports Megatron, which Platform.prepare_megatron must meet first
    from r1mega.models.heads import ScalarModel
    from r1mega.models.trunk import Hidden


class RewardModel:
    """A scalar model that scores; built in every process of a group (process.py says what it finds there)."""

    def __init__(self, config: RunConfig, threads: int = 1):
        self.config = config
        self.process = join(config, threads)
        self.rank, self.mesh = self.process.rank, self.process.mesh
        self.had_head = False
        """Whether the model's directory brought a head; else it began at zero."""
        self.model = self._build()

    def _build(self) -> PipelinedModel:
        from r1mega.models.heads import build_scalar_model, import_scalar_model
        from r1mega.models.hf_config import load_hf_config

        config = self.config
        hf_config = load_hf_config(config.model.path)

        def build(part: StagePart) -> ScalarModel:
            stage = build_scalar_model(hf_config, config.model, config.parallel, seed=config.seed, part=part)
            stage = stage.to(self.process.device)
            if config.model.init == "checkpoint":
                self.had_head = import_scalar_model(stage, config.model.path)
            return stage

        return PipelinedModel(build, hf_config, config.model, config.parallel, self.mesh)

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
        self.model.place_experts()
        config = self.config
        capacity = max(config.parallel.tokens_per_chunk, *map(len, token_id_lists)) + config.token_alignment
        examples = [[sequence] for sequence in token_id_lists]
        chunks = pack_whole(examples, self.mesh.data_size, capacity, config.token_alignment)
        scores_N = torch.zeros(len(examples), dtype=torch.float32, device=self.process.device)
        self.model.eval()
        mine = chunks[self.mesh.data_rank]
        batches = [on_device(chunk, self.process.device) for chunk in mine]
        outputs = self.model.outputs(batches, _compute)
        if self.model.has_last:
            for chunk, batch, scores_T in zip(mine, batches, outputs, strict=True):
                members = torch.tensor(chunk.members, dtype=torch.int64, device=scores_N.device)
                scores_N[members] = scores_T[batch.loss_mask_T > 0]
        dist.all_reduce(scores_N, group=self.mesh.data_group)
        dist.all_reduce(scores_N, group=self.mesh.pipeline_group)
        return scores_N.tolist()

    def close(self) -> None:
        destroy_mesh()


class RewardTrainer(RewardModel):
    """A reward model with its optimizer."""

    def __init__(self, config: RunConfig, threads: int = 1):
        super().__init__(config, threads)
        self.optimizer = Optimizer(self.model.stages, config.optimizer, config.parallel, config.num_steps)
        self.saver = Saver(self.model.stages, None, self.optimizer)

    def update(self, chunks: list[PreferenceBatch], step: int) -> dict[str, Any]:
        """One optimizer step over this rank's chunks; returns process.update_report's dict."""
        self.saver.check()
        self.model.place_experts()
        parts = self._accumulate(chunks)
        report = self.optimizer.step(step)
        return update_report(self.process, parts, [report.grad_norm], report.lr, self.model)

    def _accumulate(self, chunks: list[PreferenceBatch]) -> list[Metrics]:
        """Forward and backward of this rank's chunks; gradients are left in the buffers."""
        self.model.train()
        self.optimizer.zero_grad()
        batches = [on_device(chunk.packed, self.process.device) for chunk in chunks]
        parts: list[Metrics] = []

        def loss(scores_T: Tensor, micro_batch: int) -> Tensor:
            value, metrics = _preference_loss(scores_T, batches[micro_batch], chunks[micro_batch].labels_N)
            parts.append(metrics)
            return value

        self.model.forward_backward(self.optimizer.wrapped, batches, _compute, loss)
        return parts

    def save(self, root: str, step: int, state: dict[str, Any]) -> str:
        settings = self.config.checkpoint
        path = self.saver.save(Path(root), step, state, keep=settings.keep, background=settings.background)
        return str(path)

    def finish_save(self) -> None:
        self.saver.wait()

    def close(self) -> None:
        self.saver.wait()
        super().close()

    def load(self, path: str) -> None:
        self.saver.load(Path(path))

    def export(self, path: str) -> None:
        """Write a directory in Hugging Face's sequence-classification layout."""
        from r1mega.models.hf_weights import export_hf

        export_hf(self.model.stages, path, self.config.model.path)


def _compute(stage: torch.nn.Module, batch: PackedBatch, hidden: Hidden | None) -> Any:
    return stage(batch, hidden)


def _preference_loss(scores_T: Tensor, batch: PackedBatch, labels_N: Tensor | None) -> tuple[Tensor, Metrics]:
    """A sequence's score is the one at its last token, the only one that counts."""
    ends_T = batch.loss_mask_T > 0
    scores_N, weights_N = scores_T[ends_T], batch.token_weights_T[ends_T]
    if labels_N is None:
        loss, metrics = bradley_terry(scores_N.view(-1, 2), weights_N[::2])
    else:
        loss, metrics = binary_cross_entropy(scores_N, labels_N.to(scores_N), weights_N)
    tokens = torch.tensor(float(len(batch.tokens_T) - batch.num_padding), dtype=torch.float64)
    return loss, metrics | {"tokens": tokens}
