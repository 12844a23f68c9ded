"""A tiny random DeepSeek-V3 with an MTP layer and a character tokenizer, and engines on it."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from r1mega.config import RunConfig

SPECIAL = ["<pad>", "<eos>", "<think>", "</think>", "<answer>", "</answer>"]
HIDDEN, LAYERS, EXPERTS, HEADS, MOE = 32, 3, 8, 4, 16


def save_tokenizer(path: Path) -> int:
    """A character-level tokenizer with the tags as special tokens; returns its size."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_lowercase + string.digits + " +-*=?.:"
    vocabulary = {token: i for i, token in enumerate(SPECIAL + list(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[2:],
    ).save_pretrained(path)
    return len(vocabulary)


def deepseek(vocab_size: int, seed: int) -> Any:
    """transformers' DeepSeek-V3 in fp32, with weights large enough for log-probs to differ from uniform."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=vocab_size, hidden_size=HIDDEN, intermediate_size=48, moe_intermediate_size=MOE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, n_shared_experts=1,
        n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=1,
        kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=16,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.15,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).float().eval()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.uniform_(-0.1, 0.1)
    return model


def mtp_tensors(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """An MTP layer (V3 section 2.2): a decoder layer like the last one, two norms, a projection, the shared ends."""
    generator = torch.Generator().manual_seed(seed)
    last, mtp = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    tensors = {
        mtp + name.removeprefix(last): t.clone() for name, t in weights.items() if name.startswith(last)
    }
    tensors[mtp + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    tensors[mtp + "shared_head.head.weight"] = weights["lm_head.weight"].clone()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[mtp + norm + ".weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
    tensors[mtp + "eh_proj.weight"] = 0.15 * torch.randn(HIDDEN, 2 * HIDDEN, generator=generator)
    return tensors


def checkpoint_weights(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors under their checkpoint names, with those of an MTP layer."""
    from safetensors.torch import load_file

    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    return weights | mtp_tensors(weights, seed=1)


def spawn_engine(config: RunConfig, index: int = 0, name: str = "engine") -> Any:
    from r1mega import cluster
    from r1mega.rollout.engine import RolloutEngine

    path = config.model.path
    return cluster.spawn(
        RolloutEngine, config, path, path, index, config.rollout.engines, name=f"{name} {index}"
    )
