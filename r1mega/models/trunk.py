"""The trunk of every model: Megatron's GPTModel up to its final norm, fed a packed batch.

A head on top says what it computes: log-probs of tokens (language_model.py) or one number a token (heads.py).

Dims: T packed tokens, D hidden.
"""

from __future__ import annotations

from typing import Any, TypeVar

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.models import deepseek_v3, dense, hf_weights
from r1mega.models.attention import PackedSequences, packed_sequences
from r1mega.models.hf_config import check_model_type
from r1mega.models.weight_table import Weight
from r1mega.parallel.mesh import check_mesh, current_mesh
from r1mega.samples import PackedBatch

VOCABULARY_HEAD = "output_layer.weight"


class Trunk(GPTModel):
    """Embedding, decoder and final norm, the weights' names, and the config.json that they came from."""

    hf_config: dict[str, Any]
    weight_table: list[Weight]

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

    def _whole(self, hidden: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden.squeeze(1)


AnyTrunk = TypeVar("AnyTrunk", bound=Trunk)


def assemble(
    cls: type[AnyTrunk],
    hf_config: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocabulary_head: bool,
) -> AnyTrunk:
    """A `cls` of the architecture that a config.json describes, its weights not yet set: `initialise` must follow.

    Without `vocabulary_head` nothing is allocated for the language model's head.
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
    built = cls(
        config=config,
        transformer_layer_spec=decoder,
        vocab_size=hf_config["vocab_size"],
        max_sequence_length=hf_config["max_position_embeddings"],
        position_embedding_type="rope",
        # A shared head has no weight of its own, so "shared" is also how to ask Megatron for none.
        share_embeddings_and_output_weights=hf_config.get("tie_word_embeddings", False)
        or not vocabulary_head,
        mtp_block_spec=mtp,
    )
    built.hf_config = hf_config
    built.weight_table = [row for row in table if vocabulary_head or row.parameter != VOCABULARY_HEAD]
    _share_rotation(built, hf_config)
    return built


def initialise(model: Trunk, init: str, seed: int) -> None:
    """init == "random" draws weights from `initializer_range` and `seed`, the same in every layout.

    "checkpoint" leaves NaN everywhere: `hf_weights.import_hf` or a checkpoint must follow.
    """
    hf_weights.check_table(model)
    if init == "random":
        hf_weights.draw(model, current_mesh(), model.hf_config.get("initializer_range", 0.02), seed)
    else:
        hf_weights.fill_with_nan(model)


def _share_rotation(model: Trunk, hf_config: dict[str, Any]) -> None:
    """One rope table for all layers, and for dense models the frequencies that config.json asks."""
    if not model.config.multi_latent_attention:
        model.rotary_pos_emb.inv_freq = dense.inverse_frequencies(hf_config).to(
            model.rotary_pos_emb.inv_freq.device
        )
        return
    attentions = [module for module in model.modules() if hasattr(module, "linear_kv_up_proj")]
    for attention in attentions:
        attention.rotary_pos_emb = attentions[0].rotary_pos_emb
