"""Writes the tiny DeepSeek-V3's config and its character-level tokenizer: configs/tiny/model, model_mtp.

    python tools/make_tiny_model.py [configs/tiny]

The model has every part of DeepSeek-V3 (MLA with compressed queries, a dense first layer, sigmoid routing
in groups with a bias, a shared expert; in model_mtp one multi-token-prediction layer) at about a
millionth of its size. Weights are drawn when a run starts (model.init="random").
"""

from __future__ import annotations

import json
import os
import string
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 128
SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each; not "special", so that decoding keeps them."""


def vocabulary() -> list[str]:
    """Tokens by id: special, tags, newline, printable ASCII, then reserved ones up to VOCAB_SIZE."""
    characters = ["\n", *sorted(c for c in string.printable if c == " " or not c.isspace())]
    tokens = [*SPECIAL, *TAGS, *characters]
    return tokens + [f"<reserved_{i}>" for i in range(VOCAB_SIZE - len(tokens))]


def build_tokenizer() -> Tokenizer:
    """One token per character. Characters it does not know become <unk>."""
    tokens = vocabulary()
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    return tokenizer


def model_config(mtp_layers: int) -> dict[str, Any]:
    """config.json in DeepSeek-V3's own field names."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "kv_lora_rank": 32,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 96,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": mtp_layers,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "rope_theta": 100.0,  # answers have some 40 tokens: short wavelengths tell positions apart
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "float32",
        "use_cache": True,
        "v_head_dim": 32,
        "vocab_size": VOCAB_SIZE,
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
}

GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
}


def write(directory: Path, mtp_layers: int) -> None:
    """Writes all files of one model directory, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(model_config(mtp_layers), indent=2),
        "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2),
        "tokenizer.json": build_tokenizer().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
    }
    for name, text in files.items():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, directory / name)


def main(root: Path) -> None:
    write(root / "model", mtp_layers=0)
    write(root / "model_mtp", mtp_layers=1)
    print(f"wrote {root}/model and {root}/model_mtp")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "configs/tiny"))
