"""Writes configs/tiny/model_text: the tiny DeepSeek-V3 for running text, with a byte-level BPE tokenizer.

    python tools/make_text_model.py FILE.jsonl[.gz] [configs/tiny/model_text]

The model of make_tiny_model.py reads printable ASCII one character a token and 512 of them; this one reads any
text, about three characters a token, and 2,048 tokens. The merges are learnt from the texts of FILE: for the
directory in git the first 1,712 rows of Anthropic's hh-rlhf harmless-base test file (MIT licence), that is
without the 600 rows that the reward model's accuracy is measured on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from make_tiny_model import GENERATION_CONFIG, SPECIAL, TAGS, TOKENIZER_CONFIG, model_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from r1mega.data.prompts import read_rows

VOCAB_SIZE = 2048
POSITIONS = 2048
ROWS = 1712


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """Ids: special tokens, tags, the 256 bytes, merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL, *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def text_config() -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": POSITIONS, "rope_theta": 10_000.0}
    return model_config(mtp_layers=0) | sizes


def main(corpus: str, directory: Path) -> None:
    rows = read_rows(corpus, "FILE")[:ROWS]
    texts = [value for row in rows for value in row.columns.values() if isinstance(value, str)]
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(text_config(), indent=2),
        "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2),
        "tokenizer.json": build_tokenizer(texts).to_str(pretty=False),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG | {"model_max_length": POSITIONS}, indent=2),
    }
    for name, text in files.items():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, directory / name)
    print(f"wrote {directory}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "configs/tiny/model_text"))
