"""Tokenizers are read as their tokenizer.json says, whatever class transformers picks for a model's type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from r1mega.data.tokenizer import read_tokenizer

TEXT = "Take 3, then plus 4. What is the answer?"


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", "qwen2"])
def test_the_models_type_does_not_change_its_tokens(tmp_path: Path, model_type: str) -> None:
    expected = read_tokenizer("configs/tiny/model_bilingual")(TEXT)["input_ids"]
    path = tmp_path / "model"
    shutil.copytree("configs/tiny/model_student", path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": model_type}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(path)
    assert tokenizer(TEXT)["input_ids"] == expected
    assert tokenizer.decode(expected) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)
