"""The tokenizer of a run, read once, with one clear line when it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, ModelConfig
from r1mega.data.tokenizer import read_tokenizer


def load_tokenizer(model: ModelConfig) -> Any:
    """transformers' tokenizer from `model.tokenizer`, or from `model.path`. Raises ConfigError."""
    path = Path(model.tokenizer or model.path)
    if not path.is_dir():
        raise ConfigError(f"no tokenizer directory at {path}: set model.tokenizer=PATH or model.path=PATH")
    if not any(
        (path / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise ConfigError(
            f"{path} holds no tokenizer (tokenizer.json): set model.tokenizer=PATH to a directory that does"
        )
    try:
        return read_tokenizer(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from error
