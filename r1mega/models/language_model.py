"""The language model: a trunk with the vocabulary head, giving log-probs instead of logits.

The head's output is never materialised: hidden states and the head's weight go to one fused operator, and with a
token-level objective the loss and its gradients come out of it too, while the logits are there.

Dims: T packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import checkpoint
from torch import Tensor

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.models.attention import PackedSequences
from r1mega.models.trunk import Hidden, Trunk, assemble, initialise
from r1mega.parallel.stages import StagePart
from r1mega.samples import PackedBatch
from r1mega_kernels.grpo_loss import Objective, Tokens, grpo_loss
from r1mega_kernels.linear_logprob import linear_logprob


@dataclass(frozen=True)
class TokenOutputs:
    logprobs_T: Tensor
    """float32: log pi(targets_T[t] | tokens up to t), of the distribution at the given temperature."""
    entropy_T: Tensor
    """float32: entropy of that distribution, in nats."""
    mtp_loss_sum: Tensor | None
    """Multi-token-prediction loss, sum over tokens of weight * -log-prob (V3 eq. 24, before lambda); None
    where the model has no such layer or model.mtp_loss_weight is 0."""
    loss_sum: Tensor | None = None
    """With an objective: its sum over this context rank's tokens. It alone carries the gradient then; log-probs and
    entropies are 0 where the loss mask is."""


class LanguageModel(Trunk):
    """A trunk with the vocabulary head, whose forward takes a `PackedBatch`; see `build_model`."""

    mtp_loss_weight: float

    def forward(
        self,
        batch: PackedBatch,
        hidden: Hidden | None = None,
        *,
        temperature: float = 1.0,
        need_entropy: bool = True,
        objective: Objective | None = None,
    ) -> Any:
        """TokenOutputs: log-prob and entropy of every target. T must be a multiple of the tensor axis (pack's `align`).

        Without `need_entropy` the entropy carries no gradient. A pipeline stage but the first takes what the one before
        gave, and all but the last give Hidden.

        objective: what to make of the log-probs of tokens with a loss mask. The gradients are computed here, and the
        head's is added to its main_grad at once, where it has one: it must be zeroed before, and the loss not be scaled.
        """
        packed = self._packed(batch)
        states = self._decode(batch, packed, hidden)
        if not self.part.last:
            return Hidden(states)
        head_VD, loss_sum = self._head(), None
        if objective is None:
            logprobs_T, entropy_T = self._logprobs(states, head_VD, batch.targets_T, packed, temperature)
        else:
            loss_sum, logprobs_T, entropy_T = self._loss(
                states, head_VD, batch, packed, temperature, objective
            )
        mtp_loss_sum = None
        if self.mtp_process and self.mtp_loss_weight:
            mtp_loss_sum = self._mtp_loss(states, head_VD, batch, packed)
        entropy_T = entropy_T if need_entropy else entropy_T.detach()
        return TokenOutputs(logprobs_T, entropy_T, mtp_loss_sum, loss_sum)

    def _head(self) -> Tensor:
        if self.share_embeddings_and_output_weights and not self.copy_of_embedding:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight

    def _logprobs(
        self, hidden: Tensor, head_VD: Tensor, targets_T: Tensor, packed: PackedSequences, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Of the whole batch, in every rank."""
        group = self.pg_collection.tp
        logprobs, entropy = linear_logprob(
            self._whole(hidden),
            head_VD,
            packed.mine(targets_T),
            temperature=temperature,
            group=group if group.size() > 1 else None,
            vocab_start=group.rank() * head_VD.shape[0],
        )
        return packed.whole(logprobs), packed.whole(entropy)

    def _loss(
        self,
        hidden: Tensor,
        head_VD: Tensor,
        batch: PackedBatch,
        packed: PackedSequences,
        temperature: float,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss_sum of this context rank's tokens, log-probs and entropies of the whole batch)."""
        assert batch.advantages_T is not None, "an objective needs advantages"

        def mine(values_T: Tensor | None) -> Tensor | None:
            return None if values_T is None else packed.mine(values_T)

        tokens = Tokens(
            packed.mine(batch.loss_mask_T) > 0,
            packed.mine(batch.token_weights_T),
            packed.mine(batch.advantages_T),
            mine(batch.old_logprobs_T),
            mine(batch.ref_logprobs_T),
            mine(batch.rollout_logprobs_T),
        )
        group = self.pg_collection.tp
        loss_sum, logprobs, entropy = grpo_loss(
            self._whole(hidden),
            head_VD,
            packed.mine(batch.targets_T),
            tokens,
            objective,
            temperature=temperature,
            group=group if group.size() > 1 else None,
            vocab_start=group.rank() * head_VD.shape[0],
            main_grad_VD=getattr(head_VD, "main_grad", None),
        )
        return loss_sum, packed.whole(logprobs), packed.whole(entropy)

    def _mtp_loss(
        self, hidden: Tensor, head_VD: Tensor, batch: PackedBatch, packed: PackedSequences
    ) -> Tensor:
        """V3 eq. 21-24, depth 1: h_t and the embedding of token t+1 predict token t+2, inside a sequence.

        A token's weight is that of the token it predicts; a sequence's last position predicts nothing.
        """
        rotation, embedded = (
            self._rotation(packed),
            self.embedding(input_ids=packed.mine(batch.targets_T)[None], position_ids=None),
        )

        def predict(hidden: Tensor, embedded: Tensor) -> Tensor:
            return self.mtp.layers[0]._proj_and_transformer_layer(
                hidden, embedded, rotary_pos_emb=rotation, packed_seq_params=packed
            )

        if self.config.recompute_granularity == "full" and self.training:
            predicted = checkpoint(predict, False, hidden, embedded)
        else:
            predicted = predict(hidden, embedded)
        targets_T, weights_T = batch.targets_T.roll(-1), batch.token_weights_T.roll(-1)
        lasts = (batch.cu_seqlens_S[1:][batch.cu_seqlens_S[1:] > batch.cu_seqlens_S[:-1]] - 1).long()
        weights_T = weights_T.index_fill(0, lasts, 0.0)
        logprobs_T, _ = self._logprobs(predicted, head_VD, targets_T, packed, 1.0)
        return -(weights_T * logprobs_T).sum()


def build_model(
    hf_config: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    seed: int,
    part: StagePart | None = None,
) -> LanguageModel:
    """The model that a config.json describes, on the mesh that `init_mesh(parallel)` made; or a stage's part of it.

    model.init == "random" draws weights from `initializer_range` and `seed`, the same in every layout.
    "checkpoint" leaves NaN everywhere: `hf_weights.import_hf` or a checkpoint must follow.

    Raises ValueError for an unsupported architecture or option, or a layout that cannot divide the model.
    """
    built = assemble(LanguageModel, hf_config, model, parallel, vocabulary_head=True, part=part)
    built.mtp_loss_weight = model.mtp_loss_weight
    if built.mtp_process and not model.mtp_loss_weight:
        built.mtp.requires_grad_(False)  # weight decay must not move what no loss trains
    initialise(built, model.init, seed)
    return built
