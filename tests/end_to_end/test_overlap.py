"""Slow rewards hide behind generation and the reference model: a whole step with a reward that insists on it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from commands import WholeRun, sums, write_jsonl

from r1mega import checks, overrides
from r1mega.config import RunConfig
from r1mega.data.prompts import read_prompts
from r1mega.rewards.scoring import Scorer
from r1mega.samples import Rollout
from r1mega.stages.console import Console
from r1mega.stages.rl import ReinforcementLearning
from r1mega.stages.run_directory import RunDirectory
from r1mega.stages.tokenizer import load_tokenizer

pytestmark = pytest.mark.end_to_end

PATIENCE_SECONDS = 120.0


def run_config(model: Path, data: str, directory: Path) -> RunConfig:
    config = overrides.load(
        "configs/tiny/r1_zero.py",
        [
            f"model={model}", f"data={data}", f"dir={directory}", "num_steps=2", "parallel.data=1",
            "rollout.engines=1", "grpo.group_size=4", "grpo.questions_per_step=4", "rollout.max_tokens=24",
            "data.eval_size=4", "optimizer.warmup_steps=0", "rewards.weights=accuracy:1,format:1,late:1",
        ],
    )  # fmt: skip
    checks.check(config)
    return config


def test_the_reference_model_runs_while_rewards_are_computed(
    ray_cluster: None, sft_run: WholeRun, tmp_path: Path
) -> None:
    """No reward comes in before the reference model is done; a step that waited for rewards first would hang."""
    data = write_jsonl(tmp_path / "sums.jsonl", sums())
    config = run_config(sft_run.directory / "hf", data, tmp_path / "run")
    prompts = read_prompts(config.data, load_tokenizer(config.model), seed=config.seed)
    jobs: list[ReinforcementLearning] = []

    async def late(_: Rollout) -> tuple[float, str]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not any(event.name == "reference" for event in jobs[0].trace.events):
                await asyncio.sleep(0.01)
        return 1.0, "late"

    async def two_steps() -> None:
        async with Scorer(config.rewards, extra={"late": late}) as scorer:
            job = await ReinforcementLearning.start(config, directory, prompts, scorer, Console())
            jobs.append(job)
            try:
                for _ in range(2):
                    scored, metrics = await job.one_rollout()
                    assert [item.reward.verdicts["late"] for item in scored] == ["late"] * 16
                    assert metrics["kl"] >= 0
            finally:
                await job.stop()

    with RunDirectory(tmp_path / "run", config) as directory:
        asyncio.run(two_steps())
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    scoring = [event for name, event in spans.items() if " output " in name]
    assert len(scoring) == 16
    reference_end = spans["reference"]["ts"] + spans["reference"]["dur"]
    assert all(event["ts"] < spans["reference"]["ts"] for event in scoring)
    assert all(event["ts"] + event["dur"] >= reference_end for event in scoring)
