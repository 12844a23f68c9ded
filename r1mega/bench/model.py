"""The model of the step benchmark: a DeepSeek-V3 of about a million parameters whose responses have known lengths.

Every layer has random weights. Only the embedding and the head are set, so that the next token depends on the
current one (layers add less than a percent of noise) and each response reads

    some letters <answer> a random digit </answer> <eos>

"varying" ends the letters by chance, which gives geometric lengths; "uniform" spells 32 letters one after the
other, so that every response has exactly 36 tokens. Any system that loads a Hugging Face directory sees the
same lengths without being told anything; a tenth of the answers is right, so groups have advantages.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch

RESPONSES = ("varying", "uniform")
MAX_TOKENS = {"varying": 256, "uniform": 64}
MEAN_LETTERS = 57
"""Mean number of letters of a "varying" response, before the cap: 60 tokens with answer and end."""
OPERATIONS = 3
"""Of data/chain.py: prompts of 19 tokens."""

SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyzBCDEFG")
VOCABULARY = (*SPECIAL, *TAGS, *DIGITS, *"+-*=?:QA", *LETTERS, " ", "\n")
ID = {token: i for i, token in enumerate(VOCABULARY)}

NEVER = -40.0
"""Logit of a token that must not come."""
SURE = 20.0
"""Logit of a token that must, where the letters have 0 (or NEVER)."""
EMBEDDING = 8.0
"""Size of the embedding against what the layers add to it (about 0.05)."""

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": ID["<bos>"],
    "eos_token_id": ID["<eos>"],
    "pad_token_id": ID["<pad>"],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 320,
    "kv_lora_rank": 32,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": len(VOCABULARY),
}


def write_model(directory: Path, responses: str, seed: int = 0) -> int:
    """Write config, weights and tokenizer for responses of that kind; returns the number of parameters."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding())
        model.lm_head.weight.copy_(head(next_token_logits(responses)))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    _write_tokenizer(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def next_token_logits(responses: str) -> torch.Tensor:
    """[current token, next token] logits that spell a response of that kind (see the module's text)."""
    if responses not in RESPONSES:
        raise ValueError(f"responses={responses}: it is one of {', '.join(RESPONSES)}")
    logits_VV = torch.full((len(VOCABULARY), len(VOCABULARY)), NEVER)
    if responses == "varying":
        logits_VV[:, [ID[letter] for letter in LETTERS]] = 0.0
        logits_VV[:, ID["<answer>"]] = math.log(len(LETTERS) / MEAN_LETTERS)
    else:
        spelled = (":", *LETTERS, "<answer>")
        for current, following in itertools.pairwise(spelled):
            logits_VV[ID[current], ID[following]] = SURE
    for digit in DIGITS:
        logits_VV[ID["<answer>"], ID[digit]] = SURE
        logits_VV[ID[digit], ID["</answer>"]] = SURE
    logits_VV[ID["</answer>"], ID["<eos>"]] = SURE
    return logits_VV


def embedding() -> torch.Tensor:
    """[V, D]: each token its own coordinate, and one coordinate that all tokens share."""
    weight_VD = torch.zeros(len(VOCABULARY), CONFIG["hidden_size"])
    weight_VD[:, : len(VOCABULARY)] = torch.eye(len(VOCABULARY)) * EMBEDDING
    weight_VD[:, len(VOCABULARY)] = EMBEDDING
    return weight_VD


def head(logits_VV: torch.Tensor) -> torch.Tensor:
    """[V, D] head that gives `logits_VV` on `embedding()` after the last RMS norm.

    What most tokens agree on goes into the shared coordinate, so that noise in the others hardly counts.
    """
    common_V = logits_VV.median(dim=0).values
    size = len(VOCABULARY)
    weight_VD = torch.zeros(size, CONFIG["hidden_size"])
    weight_VD[:, :size] = (logits_VV - common_V).T
    weight_VD[:, size] = common_V
    return weight_VD / math.sqrt(CONFIG["hidden_size"] / 2)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
