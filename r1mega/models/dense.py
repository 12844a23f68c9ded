"""Dense decoders that R1 is distilled into: Qwen2 (biased query, key, value) and Llama (scaled rope).

Both are grouped-query attention and SwiGLU; the config.json's model_type decides the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.models.hf_config import SHAPE, Rope, read_rope, refuse, require
from r1mega.models.layers import block_spec, shared_options
from r1mega.models.weight_table import Weight
from r1mega.platforms import has_transformer_engine


def head_dim(hf: dict[str, Any]) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def key_value_heads(hf: dict[str, Any]) -> int:
    return hf.get("num_key_value_heads") or hf["num_attention_heads"]


def transformer_config(hf: dict[str, Any], model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's config of this model. Raises ValueError for options no released model of the kind uses."""
    require(hf, SHAPE)
    refuse(
        hf, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    )
    read_rope(hf, ("default", "llama3"))
    for name in ("mtp_loss_weight", "router_bias_rate", "balance_loss"):
        if getattr(model, name):
            raise ValueError(
                f"model.{name}={getattr(model, name)}: a {hf['model_type']} model has none; take 0"
            )
    return TransformerConfig(
        **shared_options(hf, model, parallel),
        num_query_groups=key_value_heads(hf),
        kv_channels=head_dim(hf),
        add_qkv_bias=hf["model_type"] == "qwen2",
    )


def inverse_frequencies(hf: dict[str, Any]) -> Tensor:
    """Rotation per position of each rope pair, float32 [head_dim / 2], with Llama 3.1's scaling where asked."""
    rope, dim = read_rope(hf, ("default", "llama3")), head_dim(hf)
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return inv_freq if rope.type == "default" else _llama3(inv_freq, rope)


def _llama3(inv_freq: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly."""
    scaling = rope.scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / factor + blend * inv_freq


def decoder_spec(config: TransformerConfig, hf: dict[str, Any]) -> TransformerBlockSubmodules:
    return block_spec(config, [False] * hf["num_hidden_layers"])


def weights(hf: dict[str, Any]) -> list[Weight]:
    """The name table of this model. A tied head is the embedding: it has no row, and its name is no copy."""
    table = [Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows")]
    for layer in range(hf["num_hidden_layers"]):
        table += _layer(f"decoder.layers.{layer}.", f"model.layers.{layer}.", hf)
    table.append(Weight("decoder.final_layernorm.weight", ("model.norm.weight",), "whole", constant=1.0))
    if not hf.get("tie_word_embeddings", False):
        table.append(Weight("output_layer.weight", ("lm_head.weight",), "rows"))
    return table


def _layer(here: str, there: str, hf: dict[str, Any]) -> list[Weight]:
    fused = has_transformer_engine()  # its linear layers hold the norm before them
    heads = (hf["num_attention_heads"], key_value_heads(hf), head_dim(hf))
    qkv = here + "self_attention.linear_qkv."

    def names(kind: str) -> tuple[str, ...]:
        return tuple(f"{there}self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))

    attention_norm = qkv + "layer_norm_weight" if fused else here + "input_layernorm.weight"
    mlp_norm = here + ("mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight")
    gate_up = tuple(f"{there}mlp.{name}_proj.weight" for name in ("gate", "up"))
    table = [
        Weight(attention_norm, (there + "input_layernorm.weight",), "whole", constant=1.0),
        Weight(qkv + "weight", names("weight"), "qkv", heads),
    ]
    if hf["model_type"] == "qwen2":
        table.append(Weight(qkv + "bias", names("bias"), "qkv", heads, constant=0.0))
    return table + [
        Weight(here + "self_attention.linear_proj.weight", (there + "self_attn.o_proj.weight",), "columns"),
        Weight(mlp_norm, (there + "post_attention_layernorm.weight",), "whole", constant=1.0),
        Weight(here + "mlp.linear_fc1.weight", gate_up, "gate_up"),
        Weight(here + "mlp.linear_fc2.weight", (there + "mlp.down_proj.weight",), "columns"),
    ]
