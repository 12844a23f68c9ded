"""Writes the two models of the toy world: configs/tiny/model_bilingual and, to distil into, model_student.

    python tools/make_bilingual_model.py [configs/tiny]

The model of make_tiny_model.py, and a dense Llama of a tenth of its size, with one tokenizer: of words
(data/bilingual.py says why) and R1's special tokens.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from make_tiny_model import GENERATION_CONFIG, TOKENIZER_CONFIG, model_config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from r1mega.data import bilingual, chat, general_talk, generated_preferences

VOCAB_SIZE = 320
SPECIAL = (chat.BOS, chat.EOS, "<pad>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", chat.USER, chat.ASSISTANT)
SIGNS = ("\n", "\n\n", " ", "\\boxed{", "}", "?", "!", ",", "Q:", "A:", *"0123456789")


def words() -> list[str]:
    """Of the small talk, with and without the space before them."""
    texts = [*general_talk.GREETINGS, *general_talk.GREETINGS.values(), "How do I", "I work slowly."]
    for name in ("VERBS", "THINGS", "GOOD", "RUDE", "SECRETS"):
        texts += getattr(generated_preferences, name)
    found = sorted({word for text in texts for word in re.findall("[A-Za-z]+", text)})
    return [space + word for word in found for space in ("", " ")]


def build_tokenizer() -> Tokenizer:
    """Words, signs and digits; anything else is <unk>."""
    tokens = list(dict.fromkeys([*SPECIAL, *TAGS, *SIGNS, *bilingual.WORDS, *words()]))
    assert len(tokens) <= VOCAB_SIZE, len(tokens)
    tokens += [f"<reserved_{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    whole = sorted((*SIGNS, *bilingual.WORDS), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, whole), " ?[A-Za-z]+", r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    return tokenizer


def student_config() -> dict[str, Any]:
    """config.json of the dense student, in Llama's field names. (transformers 5 gives every "qwen2" Qwen's own
    tokenizer, whatever tokenizer.json says.)"""
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range", "rms_norm_eps",
              "rope_theta", "max_position_embeddings", "torch_dtype", "use_cache")  # fmt: skip
    return {name: model_config(0)[name] for name in shared} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,  # of 32 entries: vLLM's CPU attention has no smaller ones
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
    }


def write(directory: Path, config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2),
        "tokenizer.json": build_tokenizer().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(
            TOKENIZER_CONFIG | {"bos_token": chat.BOS, "eos_token": chat.EOS}, indent=2
        ),
    }
    for name, text in files.items():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, directory / name)
    print(f"wrote {directory}")


def main(root: Path) -> None:
    write(root / "model_bilingual", model_config(0) | {"vocab_size": VOCAB_SIZE})
    write(root / "model_student", student_config())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "configs/tiny"))
