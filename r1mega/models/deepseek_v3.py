"""DeepSeek-V3 / R1: multi-head latent attention, DeepSeekMoE, multi-token prediction (V3 sections 2.1-2.2).

From a config.json of model_type deepseek_v3. Not read: the sequence-wise balance loss and the bias update
rate of pre-training, which a run's config sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.models.hf_config import SHAPE, read_rope, refuse, require
from r1mega.models.layers import block_spec, layer_spec, norm_module, shared_options
from r1mega.models.weight_table import Weight
from r1mega.platforms import has_transformer_engine

REQUIRED = (
    *SHAPE,
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "routed_scaling_factor",
)


@dataclass
class DeepSeekV3Config(MLATransformerConfig):
    norm_topk_prob: bool = True
    """Divide the chosen experts' weights by their sum (V3 eq. 13)."""
    balance_loss: float = 0.0
    """alpha of the sequence-wise balance loss (V3 eq. 17)."""
    dispatcher: str = "alltoall"
    """parallel.dispatcher (dispatch.py)."""


def layers_with_experts(hf: dict[str, Any]) -> list[bool]:
    return [layer >= hf["first_k_dense_replace"] for layer in range(hf["num_hidden_layers"])]


def transformer_config(hf: dict[str, Any], model: ModelConfig, parallel: ParallelConfig) -> DeepSeekV3Config:
    """Megatron's config of this model. Raises ValueError for what config.json asks and nobody released."""
    require(hf, REQUIRED)
    refuse(
        hf,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "moe_layer_freq": 1,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    )
    if (hf.get("num_nextn_predict_layers") or 0) > 1:
        raise ValueError(
            f"config.json: num_nextn_predict_layers={hf['num_nextn_predict_layers']}, at most 1 works"
        )
    grouped = (hf.get("n_group") or 1) > 1
    shared = (hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"]
    options = shared_options(hf, model, parallel)
    if model.recompute == "selective":
        options["recompute_modules"] = ["layernorm", "mla_up_proj"]
    return DeepSeekV3Config(
        **options,
        **_rope_options(hf),
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        qk_layernorm=True,  # false would turn the latent norms into identities, silently
        num_moe_experts=hf["n_routed_experts"],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_shared_expert_intermediate_size=shared or None,
        moe_layer_freq=[int(has) for has in layers_with_experts(hf)],
        moe_router_topk=hf["num_experts_per_tok"],
        moe_router_num_groups=hf["n_group"] if grouped else None,
        moe_router_group_topk=hf["topk_group"] if grouped else None,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=model.router_bias_rate,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
        moe_token_dispatcher_type=parallel.dispatcher.removesuffix("_fp8"),
        dispatcher=parallel.dispatcher,
        norm_topk_prob=hf.get("norm_topk_prob", True),
        balance_loss=model.balance_loss,
        mtp_num_layers=hf.get("num_nextn_predict_layers") or None,
    )


def _rope_options(hf: dict[str, Any]) -> dict[str, Any]:
    """V3's YaRN: the softmax scale grows by the square of the attention factor of mscale_all_dim."""
    rope = read_rope(hf, ("default", "yarn"))
    if rope.type == "default":
        return {
            "rope_type": "rope",
            "rotary_base": rope.theta,
            "rotary_scaling_factor": 1.0,
            "mscale_all_dim": 0.0,
        }
    mscale, mscale_all_dim = rope.scaling.get("mscale"), rope.scaling.get("mscale_all_dim")
    if not mscale and mscale_all_dim:
        raise ValueError("config.json: rope scaling with mscale_all_dim needs mscale too")
    return {
        "rope_type": "yarn",
        "rotary_base": rope.theta,
        "rotary_scaling_factor": float(rope.scaling["factor"]),
        "original_max_position_embeddings": rope.scaling["original_max_position_embeddings"],
        "beta_fast": rope.scaling.get("beta_fast") or 32.0,
        "beta_slow": rope.scaling.get("beta_slow") or 1.0,
        "mscale": mscale if mscale and mscale_all_dim else 1.0,
        "mscale_all_dim": mscale_all_dim or 0.0,
    }


def decoder_spec(config: DeepSeekV3Config, hf: dict[str, Any]) -> TransformerBlockSubmodules:
    return block_spec(config, layers_with_experts(hf))


def mtp_spec(config: DeepSeekV3Config) -> Any:
    """The multi-token-prediction block, or None without one."""
    if not config.mtp_num_layers:
        return None
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider as Provider
    else:
        from megatron.core.models.backends import LocalSpecProvider as Provider

    spec = get_gpt_mtp_block_spec_for_backend(config, layer_spec(config, with_experts=True), Provider())
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.enorm = parts.hnorm = parts.layer_norm = norm_module()
    return spec


def weights(hf: dict[str, Any]) -> list[Weight]:
    """The name table of this model."""
    table = [Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows")]
    for layer, has_experts in enumerate(layers_with_experts(hf)):
        table += _layer(f"decoder.layers.{layer}.", f"model.layers.{layer}.", hf, has_experts)
    table.append(Weight("decoder.final_layernorm.weight", ("model.norm.weight",), "whole", constant=1.0))
    table.append(Weight("output_layer.weight", ("lm_head.weight",), "rows"))
    if hf.get("num_nextn_predict_layers"):
        mtp, there = "mtp.layers.0.", f"model.layers.{hf['num_hidden_layers']}."
        table[0] = Weight(table[0].parameter, table[0].hf, "rows", copies=(there + "embed_tokens.weight",))
        table[-1] = Weight(
            table[-1].parameter, table[-1].hf, "rows", copies=(there + "shared_head.head.weight",)
        )
        table += [
            Weight(mtp + "enorm.weight", (there + "enorm.weight",), "whole", constant=1.0),
            Weight(mtp + "hnorm.weight", (there + "hnorm.weight",), "whole", constant=1.0),
            Weight(mtp + "eh_proj.weight", (there + "eh_proj.weight",), "rows"),
            *_layer(mtp + "transformer_layer.", there, hf, True),
            Weight(
                mtp + "final_layernorm.weight", (there + "shared_head.norm.weight",), "whole", constant=1.0
            ),
        ]
    return table


def _layer(here: str, there: str, hf: dict[str, Any], has_experts: bool) -> list[Weight]:
    fused = has_transformer_engine()  # its linear layers hold the norm before them

    def norm(parameter: str, hf_name: str) -> Weight:
        return Weight(here + parameter, (there + hf_name,), "whole", constant=1.0)

    def linear(parameter: str, hf_name: str, kind: str) -> Weight:
        return Weight(here + parameter + ".weight", (there + hf_name + ".weight",), kind)

    def gated(parameter: str, hf_name: str) -> list[Weight]:
        gate_up = tuple(f"{there}{hf_name}.{name}_proj.weight" for name in ("gate", "up"))
        return [
            Weight(f"{here}{parameter}.linear_fc1.weight", gate_up, "gate_up"),
            linear(f"{parameter}.linear_fc2", f"{hf_name}.down_proj", "columns"),
        ]

    table = [norm("input_layernorm.weight", "input_layernorm.weight")]
    attention = "self_attention."
    if hf.get("q_lora_rank") is None:
        table.append(linear(attention + "linear_q_proj", "self_attn.q_proj", "rows"))
    else:
        q_norm = "linear_q_up_proj.layer_norm_weight" if fused else "q_layernorm.weight"
        table += [
            linear(attention + "linear_q_down_proj", "self_attn.q_a_proj", "whole"),
            norm(attention + q_norm, "self_attn.q_a_layernorm.weight"),
            linear(attention + "linear_q_up_proj", "self_attn.q_b_proj", "rows"),
        ]
    kv_norm = "linear_kv_up_proj.layer_norm_weight" if fused else "kv_layernorm.weight"
    table += [
        linear(attention + "linear_kv_down_proj", "self_attn.kv_a_proj_with_mqa", "whole"),
        norm(attention + kv_norm, "self_attn.kv_a_layernorm.weight"),
        linear(attention + "linear_kv_up_proj", "self_attn.kv_b_proj", "rows"),
        linear(attention + "linear_proj", "self_attn.o_proj", "columns"),
    ]
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused and not has_experts else "pre_mlp_layernorm.weight"
    table.append(norm(mlp_norm, "post_attention_layernorm.weight"))
    if not has_experts:
        return table + gated("mlp", "mlp")
    expert = there + "mlp.experts.{expert}."
    gate_up = (expert + "gate_proj.weight", expert + "up_proj.weight")
    bias = there + "mlp.gate.e_score_correction_bias"
    table += [
        linear("mlp.router", "mlp.gate", "whole"),
        Weight(here + "mlp.router.expert_bias", (bias,), "whole", constant=0.0),
        Weight(here + "mlp.experts.gate_up_EID", gate_up, "expert_gate_up"),
        Weight(here + "mlp.experts.down_EDI", (expert + "down_proj.weight",), "expert_down"),
    ]
    return table + (gated("mlp.shared_experts", "mlp.shared_experts") if hf.get("n_shared_experts") else [])
