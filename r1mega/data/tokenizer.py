"""A model directory's tokenizer, as its tokenizer.json says.

transformers chooses a class by the model's type, and some classes build their own splitting rules over the file's
vocabulary (Qwen2's and Llama's in version 5): a model with another tokenizer would train on tokens it has never seen.
So what was loaded is compared with the file, which wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROBED = 500
"""Tokens of the vocabulary that make the text of the comparison."""


def read_tokenizer(path: str | Path) -> Any:
    """transformers' tokenizer. OSError, ValueError or KeyError where there is none or it cannot be read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    file = Path(path) / "tokenizer.json"
    loaded = getattr(tokenizer, "backend_tokenizer", None)
    if loaded is None or not file.exists() or _reads_alike(loaded, file):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def _reads_alike(loaded: Any, file: Path) -> bool:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    size = own.get_vocab_size()
    text = " ".join(own.decode([i]) for i in range(0, size, max(1, size // PROBED)))
    read, expected = (each.encode(text, add_special_tokens=False).ids for each in (loaded, own))
    return bool(read == expected)
