"""What a stage of a pipeline costs beside time: the GPUs that it holds, and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1mega.config import RewardConfig, RunConfig
from r1mega.data.recipes import GenerateData
from r1mega.platforms import Platform
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.placement import place


def gpus_of(config: Any, platform: Platform) -> int:
    """GPUs that a stage holds: trainer ranks, engines and reward models; 0 without GPUs, and of a program of one's own."""
    if isinstance(config, RunConfig) and config.stage == "rl":
        return place(config, platform).total_gpus(config, len(_reward_models(config.rewards)))
    if isinstance(config, RunConfig) and config.stage != "preference_pairs":
        return place(config, platform).trainer_gpus * config.world_size
    if isinstance(config, GenerateData) or (isinstance(config, EvaluationConfig) and config.model):
        return place(RunConfig(rollout=config.rollout), platform).engine_gpus * config.rollout.engines
    return 0


def _reward_models(rewards: RewardConfig) -> set[str]:
    return {"helpful", "safety"} & set().union(rewards.weights, *rewards.task_weights.values())


def tokens_of(folder: Path) -> int:
    """Of a finished stage: counted in its results.json, or summed over its steps."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    if "tokens" in results:
        return int(results["tokens"])
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return round(
        sum(row.get("tokens") or row.get("tokens_per_second", 0) * row.get("time/step", 0) for row in rows)
    )
