"""The language model: Megatron's GPTModel, fed a packed batch and giving log-probs instead of logits.

The head's output is never materialised: hidden states and the head's weight go to one fused operator.

Dims: T packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import checkpoint, gather_from_sequence_parallel_region
from torch import Tensor

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.models import deepseek_v3, dense, hf_weights
from r1mega.models.attention import PackedSequences, packed_sequences
from r1mega.models.hf_config import check_model_type
from r1mega.models.weight_table import Weight
from r1mega.parallel.mesh import check_mesh, current_mesh
from r1mega.samples import PackedBatch
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


class LanguageModel(GPTModel):
    """A Megatron GPTModel whose forward takes a `PackedBatch`; see `build_model`."""

    hf_config: dict[str, Any]
    weight_table: list[Weight]
    mtp_loss_weight: float

    def forward(
        self, batch: PackedBatch, *, temperature: float = 1.0, need_entropy: bool = True
    ) -> TokenOutputs:
        """Log-prob and entropy of every target. T must be a multiple of the tensor axis (pack's `align`).

        Without `need_entropy` the entropy carries no gradient.
        """
        packed = packed_sequences(batch.cu_seqlens_S)
        hidden = self._decode(batch.tokens_T, packed)
        head_VD = self._head()
        logprobs_T, entropy_T = self._logprobs(hidden, head_VD, batch.targets_T, temperature)
        mtp_loss_sum = None
        if self.mtp_process and self.mtp_loss_weight:
            mtp_loss_sum = self._mtp_loss(hidden, head_VD, batch, packed)
        return TokenOutputs(logprobs_T, entropy_T if need_entropy else entropy_T.detach(), mtp_loss_sum)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """[T, D] after the final norm, whole on every tensor rank (the input of a value or reward head)."""
        return self._whole(self._decode(batch.tokens_T, packed_sequences(batch.cu_seqlens_S)))

    def _decode(self, tokens_T: Tensor, packed: PackedSequences) -> Tensor:
        """[T, 1, D] after the final norm; with sequence parallelism this tensor rank's slice of T."""
        ranks = self.config.tensor_model_parallel_size
        if self.config.sequence_parallel and len(tokens_T) % ranks:
            raise ValueError(
                f"{len(tokens_T)} packed tokens do not divide by parallel.tensor={ranks}: pack with align={ranks}"
            )
        return self.decoder(
            hidden_states=self.embedding(input_ids=tokens_T[None], position_ids=None),
            attention_mask=None,
            rotary_pos_emb=self._rotation(packed),
            packed_seq_params=packed,
        )

    def _rotation(self, packed: PackedSequences) -> Tensor | None:
        if self.config.multi_latent_attention:
            return None  # its attention holds its own
        return self.rotary_pos_emb(packed.max_seqlen_q, packed_seq=True)

    def _head(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _whole(self, hidden: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden.squeeze(1)

    def _logprobs(
        self, hidden: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        group = self.pg_collection.tp
        return linear_logprob(
            self._whole(hidden),
            head_VD,
            targets_T,
            temperature=temperature,
            group=group if group.size() > 1 else None,
            vocab_start=group.rank() * head_VD.shape[0],
        )

    def _mtp_loss(
        self, hidden: Tensor, head_VD: Tensor, batch: PackedBatch, packed: PackedSequences
    ) -> Tensor:
        """V3 eq. 21-24, depth 1: h_t and the embedding of token t+1 predict token t+2, inside a sequence.

        A token's weight is that of the token it predicts; a sequence's last position predicts nothing.
        """
        rotation, embedded = (
            self._rotation(packed),
            self.embedding(input_ids=batch.targets_T[None], position_ids=None),
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
        logprobs_T, _ = self._logprobs(predicted, head_VD, targets_T, 1.0)
        return -(weights_T * logprobs_T).sum()


def build_model(
    hf_config: dict[str, Any], model: ModelConfig, parallel: ParallelConfig, *, seed: int
) -> LanguageModel:
    """The model that a config.json describes, on the mesh that `init_mesh(parallel)` made.

    model.init == "random" draws weights from `initializer_range` and `seed`, the same in every layout.
    "checkpoint" leaves NaN everywhere: `hf_weights.import_hf` or a checkpoint must follow.

    Raises ValueError for an unsupported architecture or option, or a layout that cannot divide the model.
    """
    check_model_type(hf_config)
    check_mesh(parallel, hf_config)
    if model.init not in ("random", "checkpoint"):
        raise ValueError(f'model.init={model.init!r} is unknown: take "checkpoint" or "random"')
    if hf_config["model_type"] == "deepseek_v3":
        config: Any = deepseek_v3.transformer_config(hf_config, model, parallel)
        decoder, mtp = deepseek_v3.decoder_spec(config, hf_config), deepseek_v3.mtp_spec(config)
        table = deepseek_v3.weights(hf_config)
    else:
        config = dense.transformer_config(hf_config, model, parallel)
        decoder, mtp = dense.decoder_spec(config, hf_config), None
        table = dense.weights(hf_config)
    built = LanguageModel(
        config=config,
        transformer_layer_spec=decoder,
        vocab_size=hf_config["vocab_size"],
        max_sequence_length=hf_config["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=hf_config.get("tie_word_embeddings", False),
        mtp_block_spec=mtp,
    )
    built.hf_config, built.weight_table = hf_config, table
    built.mtp_loss_weight = model.mtp_loss_weight
    _share_rotation(built, hf_config)
    if mtp is not None and not model.mtp_loss_weight:
        built.mtp.requires_grad_(False)  # weight decay must not move what no loss trains
    hf_weights.check_table(built)
    if model.init == "random":
        hf_weights.draw(built, current_mesh(), hf_config.get("initializer_range", 0.02), seed)
    else:
        hf_weights.fill_with_nan(built)
    return built


def _share_rotation(model: LanguageModel, hf_config: dict[str, Any]) -> None:
    """One rope table for all layers, and for dense models the frequencies that config.json asks."""
    if not model.config.multi_latent_attention:
        model.rotary_pos_emb.inv_freq = dense.inverse_frequencies(hf_config).to(
            model.rotary_pos_emb.inv_freq.device
        )
        return
    attentions = [module for module in model.modules() if hasattr(module, "linear_kv_up_proj")]
    for attention in attentions:
        attention.rotary_pos_emb = attentions[0].rotary_pos_emb


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters on this process."""
    return sum(parameter.numel() for parameter in model.parameters())
