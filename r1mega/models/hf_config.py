"""Reading a Hugging Face config.json: what every architecture shares, and refusing what none supports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = ("deepseek_v3", "qwen2", "llama")
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
"""Fields every architecture needs."""


def load_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of the model directory `path`.

    Raises FileNotFoundError without one, ValueError for a model type this project does not know.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; model.path must be a Hugging Face model directory")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    check_model_type(config)
    return config


def check_model_type(config: dict[str, Any]) -> None:
    """ValueError for a model type this project does not know."""
    if config.get("model_type") not in SUPPORTED:
        raise ValueError(
            f"model_type={config.get('model_type')!r} is not supported: {', '.join(SUPPORTED)} are"
        )


def require(config: dict[str, Any], names: tuple[str, ...]) -> None:
    """ValueError where config.json lacks a field that the model's shape needs."""
    absent = [name for name in names if config.get(name) is None]
    if absent:
        raise ValueError(f"config.json ({config['model_type']}): {', '.join(absent)} missing")


def refuse(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError where the config holds another value than the only supported one (an absent field is fine)."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name}={config[name]!r} is not supported, only {value!r}")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, read from either generation of config.json."""

    type: str
    """"default" | "yarn" | "llama3"."""
    theta: float
    scaling: dict[str, Any]
    """The fields of the scaling type."""


def read_rope(config: dict[str, Any], supported: tuple[str, ...]) -> Rope:
    """`rope_parameters` (transformers 5), else `rope_scaling` and `rope_theta` (before).

    Raises ValueError for a rope type outside `supported`.
    """
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    theta = fields.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if rope_type not in supported:
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported: {', '.join(supported)} are")
    for name in ("attention_factor", "partial_rotary_factor"):
        if fields.get(name) not in (None, 1.0):
            raise ValueError(f"config.json: rope {name}={fields[name]} is not supported")
    return Rope(rope_type, float(theta), fields)
