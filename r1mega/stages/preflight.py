"""What a run needs of its model directory, checked before any process starts.

checks.py has the checks that need no file; these read the model's config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, RunConfig
from r1mega.models.hf_config import load_hf_config
from r1mega.parallel.mesh import check_mesh
from r1mega.rewards.sums import check_sums
from r1mega.rewards.terms import ACCURACY, REFERENCES, REWARDS
from r1mega.rollout.vllm_engine import max_model_len
from r1mega.samples import Prompt


def check_model(config: RunConfig) -> None:
    """Refuse a model that cannot be read, divided over the mesh, or made long enough for the run.

    Raises FileNotFoundError without a config.json, ValueError otherwise.
    """
    hf_config = load_hf_config(config.model.path)
    _check_weights(config)
    check_mesh(config.parallel, hf_config)
    _check_mtp(config, hf_config)
    _check_replay(config, hf_config)
    if config.stage == "rl":
        max_model_len(config, hf_config)
        return
    positions = hf_config.get("max_position_embeddings", config.sft.max_length)
    if config.sft.max_length > positions:
        raise ConfigError(
            f"sft.max_length={config.sft.max_length}: the model has {positions} positions "
            f"(max_position_embeddings); set it to {positions} or less"
        )


def check_vocabulary(config: RunConfig, sequences: Iterable[Sequence[int]]) -> None:
    """Refuse token ids that the model has no embedding for."""
    size = load_hf_config(config.model.path)["vocab_size"]
    largest = max(max(token_ids) for token_ids in sequences)
    if largest >= size:
        raise ConfigError(
            f"{config.model.tokenizer or config.model.path}: its tokenizer gives {config.data.path} token {largest}, the "
            f"model has {size} (vocab_size in {config.model.path}/config.json); set model.tokenizer= to the model's own"
        )


def check_rewards(config: RunConfig, tasks: Iterable[str]) -> None:
    """Refuse sums of rewards that cannot be computed for the prompts' tasks."""
    check_sums(config.rewards, config.judge, tasks, terms=REWARDS, ruled=ACCURACY)


def check_references(prompts: Iterable[Prompt]) -> None:
    """Refuse a prompt whose reference answer its rule cannot use."""
    for prompt in prompts:
        if prompt.task in REFERENCES:
            try:
                REFERENCES[prompt.task](prompt.answer)
            except ValueError as error:
                raise ConfigError(f"prompt {prompt.id} (task {prompt.task}): {error}") from error


def _check_weights(config: RunConfig) -> None:
    if config.model.init == "checkpoint" and not any(Path(config.model.path).glob("*.safetensors")):
        raise FileNotFoundError(
            f"{config.model.path}: no *.safetensors; model.init=random would draw the weights"
        )


def _check_replay(config: RunConfig, hf_config: dict[str, Any]) -> None:
    if config.stage == "rl" and config.grpo.routing_replay and not hf_config.get("n_routed_experts"):
        raise ConfigError(
            f"grpo.routing_replay=true: {config.model.path} ({hf_config['model_type']}) has no experts to route to; "
            "set it to false"
        )


def _check_mtp(config: RunConfig, hf_config: dict[str, Any]) -> None:
    if hf_config.get("num_nextn_predict_layers"):
        return
    model, rollout = config.model, config.rollout
    wanting = {
        f"model.mtp_loss_weight={model.mtp_loss_weight}": model.mtp_loss_weight > 0,
        f"rollout.speculative_tokens={rollout.speculative_tokens}": config.stage == "rl"
        and rollout.speculative_tokens > 0,
    }
    for setting, wants in wanting.items():
        if wants:
            raise ConfigError(
                f"{setting}: {model.path} has no multi-token-prediction layer (num_nextn_predict_layers in its "
                "config.json); set it to 0"
            )
