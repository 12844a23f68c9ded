"""The trunk of every model: Megatron's GPTModel up to its final norm, fed a packed batch.

A head on top says what it computes: log-probs of tokens (language_model.py) or one number a token (heads.py).

A pipeline stage is a trunk of its own, with its part of the layers. Megatron builds it as a whole model of that many
layers and knows of no pipeline; parallel/pipeline.py joins the stages.

Dims: T packed tokens, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.models import deepseek_v3, dense, hf_weights, rotation
from r1mega.models.attention import PackedSequences, packed_sequences
from r1mega.models.balance import tell_routers
from r1mega.models.dispatch import replace_dispatchers
from r1mega.models.hf_config import check_model_type
from r1mega.models.layers import norm_module
from r1mega.models.weight_table import Weight
from r1mega.parallel.mesh import check_mesh, current_mesh
from r1mega.parallel.stages import StagePart
from r1mega.platforms import has_transformer_engine
from r1mega.samples import PackedBatch

VOCABULARY_HEAD = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Hidden:
    """What a stage hands to the next."""

    states_T1D: Tensor
    """With sequence parallelism this tensor rank's slice of T."""
    after_layers: bool = False
    """It has been through this part's layers already, in pieces (parallel/overlap.py)."""


class Trunk(GPTModel):
    """Embedding, decoder and final norm, the weights' names, and the config.json that they came from.

    A stage has its part of them.
    """

    hf_config: dict[str, Any]
    share_embeddings_and_output_weights: bool
    mtp_process: bool
    pre_process: bool
    part: StagePart
    weight_table: list[Weight]
    """Of this part, under its own parameter names: a stage counts its layers from 0."""
    all_weights: list[Weight]
    """Of the whole model."""
    copy_of_embedding: str = ""
    """The parameter of a last stage that repeats the first stage's embedding in another rank (a tied head, multi-token
    prediction): it starts equal, and parallel/pipeline.py keeps it equal."""
    borrows_embedding: bool = False
    """A last stage uses the embedding of the first stage, which lies in the same rank."""

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """[T, D] after the final norm, whole on every tensor rank (the input of a value or reward head)."""
        packed = self._packed(batch)
        return packed.whole(self._whole(self._decode(batch, packed, None)))

    def _packed(self, batch: PackedBatch) -> PackedSequences:
        return packed_sequences(batch, self.pg_collection.cp)

    def hidden_shape(self, batch: PackedBatch) -> tuple[int, int, int]:
        """Of the hidden states that a stage hands on, in this process."""
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        tokens = len(batch.tokens_T) // self.config.context_parallel_size
        return tokens // ranks, 1, self.config.hidden_size

    def borrow_embedding(self, first: Trunk) -> None:
        """Use the embedding of the first stage, a module of the same process, instead of a copy.

        It stays a parameter of the first stage alone: one gradient, one optimizer state.
        """
        assert self.copy_of_embedding
        if self.copy_of_embedding == EMBEDDING:
            del self.embedding
        else:
            del self.output_layer
        self.__dict__["embedding"] = first.embedding  # not registered as a submodule
        self.weight_table = [row for row in self.weight_table if row.parameter != self.copy_of_embedding]
        self.copy_of_embedding, self.borrows_embedding = "", True

    def name_in_model(self, parameter: str) -> str:
        """A parameter's name as a model that is not cut into stages has it."""
        first = self.part.layers.start
        return _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first}.", parameter)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, each layer under its number in the whole model, so that any layout reads it."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        first = self.pre_process
        self.pre_process = first or self.borrows_embedding  # else Megatron saves a copy, and there is none
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        self.pre_process = first
        shift = {
            f"{prefix}decoder.layers.{here}.": f"{prefix}decoder.layers.{there}."
            for here, there in enumerate(self.part.layers)
        }
        if self.part.layers.start:
            apply_prefix_mapping(state, shift)
        return state

    def _decode(self, batch: PackedBatch, packed: PackedSequences, hidden: Hidden | None) -> Tensor:
        """[T, 1, D] after the last layer of this part, and after the final norm where the part has it.

        hidden: what the stage before handed on; None in the first. All are this context rank's part of T, and with
        sequence parallelism this tensor rank's slice of that.
        """
        tokens_T, ranks = packed.mine(batch.tokens_T), self.config.tensor_model_parallel_size
        if self.config.sequence_parallel and len(tokens_T) % ranks:
            raise ValueError(
                f"{len(tokens_T)} packed tokens do not divide by parallel.tensor={ranks}: pack with align={ranks}"
            )
        if hidden is not None and hidden.after_layers:
            return self.decoder.final_layernorm(hidden.states_T1D)
        assert self.part.first == (hidden is None)
        embedded = self.embedding(input_ids=tokens_T[None], position_ids=None) if hidden is None else None
        if hidden is not None:
            self.decoder.set_input_tensor(hidden.states_T1D)
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self._rotation(packed),
            packed_seq_params=packed,
        )

    def enter(self, batch: PackedBatch, packed: PackedSequences, hidden: Hidden | None) -> Tensor:
        """What the first layer of this part reads."""
        if hidden is not None:
            return hidden.states_T1D
        return self.embedding(input_ids=packed.mine(batch.tokens_T)[None], position_ids=None)

    def layer_arguments(self, batch: PackedBatch) -> dict[str, Any]:
        """What every layer reads beside the hidden states, under Megatron's names."""
        packed = self._packed(batch)
        return {"rotary_pos_emb": self._rotation(packed), "packed_seq_params": packed}

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
    part: StagePart | None = None,
) -> AnyTrunk:
    """A `cls` of the architecture that a config.json describes, its weights not yet set: `initialise` must follow.

    Without `vocabulary_head` nothing is allocated for the language model's head. part: a pipeline stage's; None builds
    the whole model. Raises ValueError for an unsupported architecture or option, or a layout that cannot divide the model.
    """
    check_model_type(hf_config)
    check_mesh(parallel, hf_config)
    rotation.teach_megatron()
    if model.init not in ("random", "checkpoint"):
        raise ValueError(f'model.init={model.init!r} is unknown: take "checkpoint" or "random"')
    part = part or StagePart(range(hf_config["num_hidden_layers"]), first=True, last=True)
    own = _config_of(part, hf_config)
    at_least_one = own | {"num_hidden_layers": max(1, len(part.layers))}  # Megatron divides by it
    if hf_config["model_type"] == "deepseek_v3":
        config: Any = deepseek_v3.transformer_config(at_least_one, model, parallel)
        decoder = deepseek_v3.decoder_spec(config, own)
        table = deepseek_v3.weights(hf_config)
    else:
        config = dense.transformer_config(at_least_one, model, parallel)
        decoder, table = dense.decoder_spec(config, own), dense.weights(hf_config)
    # Set when Megatron's checks are past: they take it for a part of its own schedules.
    config.delay_wgrad_compute = has_transformer_engine() and parallel.pipeline > 1
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = _NoPipeline()
    with _without_pipeline():
        built = cls(
            config=config,
            transformer_layer_spec=decoder,
            vocab_size=hf_config["vocab_size"],
            max_sequence_length=hf_config["max_position_embeddings"],
            pre_process=part.first,
            post_process=part.last,
            position_embedding_type="rope",
            # A shared head has no weight of its own, so "shared" is also how to ask Megatron for none.
            share_embeddings_and_output_weights=hf_config.get("tie_word_embeddings", False)
            or not vocabulary_head,
            mtp_block_spec=deepseek_v3.mtp_spec(config) if hf_config["model_type"] == "deepseek_v3" else None,
            pg_collection=groups,
        )
    built.hf_config, built.part = hf_config, part
    if (
        part.last and built.decoder.final_layernorm is None
    ):  # with MTP Megatron looks for it after the last layer
        built.decoder.final_layernorm = norm_module()(
            config, config.hidden_size, eps=config.layernorm_epsilon
        )
    built.all_weights = [row for row in table if vocabulary_head or row.parameter != VOCABULARY_HEAD]
    if part.last and not part.first:
        if not vocabulary_head:
            del built.output_layer  # there is no embedding here whose weight it could share
        elif built.mtp_process:
            built.copy_of_embedding = EMBEDDING
        elif built.share_embeddings_and_output_weights:
            built.copy_of_embedding = VOCABULARY_HEAD
    built.weight_table = list(_rows_of(part, built))
    _share_rotation(built, hf_config)
    tell_routers(built)
    replace_dispatchers(built)
    _mark_split_weights(built)
    return built


def _mark_split_weights(model: Trunk) -> None:
    """Say which weights are parts of a whole.

    Megatron marks them only where it initialises them. It takes unmarked parts of all tensor ranks but the first for
    copies and leaves them out of the gradient's norm (optimizer.py, get_main_grads_for_grad_norm).
    """
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _config_of(part: StagePart, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model that is this part alone."""
    changes: dict[str, Any] = {"num_hidden_layers": len(part.layers)}
    if "first_k_dense_replace" in hf_config:
        changes["first_k_dense_replace"] = max(0, hf_config["first_k_dense_replace"] - part.layers.start)
    if not part.last and "num_nextn_predict_layers" in hf_config:
        changes["num_nextn_predict_layers"] = 0
    return hf_config | changes


def _rows_of(part: StagePart, built: Trunk) -> Iterator[Weight]:
    """The rows of a part, with its own names."""
    for row in built.all_weights:
        match = _LAYER.match(row.parameter)
        if match:
            if int(match[1]) in part.layers:
                here = f"decoder.layers.{int(match[1]) - part.layers.start}."
                yield replace(row, parameter=_LAYER.sub(here, row.parameter))
        elif row.parameter != EMBEDDING:
            if part.last:
                yield row
        elif part.first:
            yield row
        elif built.copy_of_embedding:
            yield replace(row, parameter=built.copy_of_embedding)


class _NoPipeline:
    """The pipeline group of a model that is not cut."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@contextmanager
def _without_pipeline() -> Iterator[None]:
    """Megatron asks a global for its place in the pipeline where it counts layers (multi_token_prediction.py:463)."""
    parallel_state.set_pipeline_model_parallel_rank(0)
    parallel_state.set_pipeline_model_parallel_world_size(1)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_pipeline_model_parallel_world_size(None)


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
