"""How much of a slow reward a step hides: half of the steps have a reward that takes two seconds per output.

The reward waits and computes nothing, as a remote code executor would; it runs for every output at once. The
last output's reward begins when generation ends, so what can hide it is the reference model's forward pass:
steps are sized so that this takes about as long.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from r1mega import cluster
from r1mega.bench import model, step
from r1mega.bench.reward_rows import Row
from r1mega.config import RunConfig
from r1mega.data.prompts import PromptSet, read_prompts
from r1mega.rewards.scoring import Scorer
from r1mega.samples import Rollout
from r1mega.stages.console import Console
from r1mega.stages.rl import ReinforcementLearning
from r1mega.stages.run_directory import RunDirectory
from r1mega.stages.tokenizer import load_tokenizer

LATENCY_SECONDS = 2.0
QUESTIONS = 96
WARM_STEPS = 1
PAIRS = 4
RESPONSES = "varying"


class SlowReward:
    """A term that answers `seconds` later."""

    seconds = 0.0

    async def __call__(self, rollout: Rollout) -> tuple[float, str]:
        await asyncio.sleep(self.seconds)
        return 0.0, "waited"


def measure(_shared: Path | None = None, *, trace: Path | None = None, pairs: int = PAIRS) -> list[Row]:
    """Rows; the Chrome trace of a step with the slow reward is written to `trace`. Needs no labelled set."""
    with tempfile.TemporaryDirectory(prefix="r1mega-bench-") as folder:
        work = Path(folder)
        model.write_model(work / "model", RESPONSES)
        config = step.run_config(work / "model", RESPONSES, WARM_STEPS + 2 * pairs)
        config = replace(
            config,
            grpo=replace(config.grpo, questions_per_step=QUESTIONS),
            rewards=replace(config.rewards, weights={"accuracy": 1.0, "format": 1.0, "slow": 0.0}),
        )
        prompts = read_prompts(config.data, load_tokenizer(config.model), seed=config.seed)
        with RunDirectory(work / "run", config) as directory, cluster.start(config):
            steps = asyncio.run(_steps(config, directory, prompts, pairs))
        if trace is not None:
            shutil.copyfile(work / "run" / "trace.json", trace)
    return _rows(steps)


async def _steps(
    config: RunConfig, directory: RunDirectory, prompts: PromptSet, pairs: int
) -> list[tuple[float, dict[str, float]]]:
    """(latency, metrics) of every measured step."""
    slow, steps = SlowReward(), []
    async with Scorer(config.rewards, extra={"slow": slow}) as scorer:
        job = await ReinforcementLearning.start(config, directory, prompts, scorer, Console())
        try:
            for number in range(WARM_STEPS + 2 * pairs):
                with_it = (number - WARM_STEPS) % 4 in (0, 3)  # drift cancels
                slow.seconds = LATENCY_SECONDS if with_it else 0.0
                _, metrics = await job.one_rollout()
                if number >= WARM_STEPS:
                    steps.append((slow.seconds, metrics))
        finally:
            await job.stop()
    return steps


def _rows(steps: list[tuple[float, dict[str, float]]]) -> list[Row]:
    def median(name: str, latency: float) -> float:
        return statistics.median(metrics[name] for seconds, metrics in steps if seconds == latency)

    with_it, without = (median("time/step", seconds) for seconds in (LATENCY_SECONDS, 0.0))
    exposed = median("time/score", LATENCY_SECONDS)
    outputs = f"{QUESTIONS * 16} outputs a step"
    return [
        Row("step without the slow reward", without, "s", note=f"median of {len(steps) // 2}, {outputs}"),
        Row(f"step with a {LATENCY_SECONDS:g} s reward", with_it, "s"),
        Row(
            "growth of the step",
            (with_it - without) / LATENCY_SECONDS,
            "of the reward",
            "< 0.20",
            "difference of medians; noise of the machine included",
        ),
        Row("waited for the reward", exposed / LATENCY_SECONDS, "of the reward", "< 0.20", "inside the step"),
        Row("reference model beside it", median("time/reference", LATENCY_SECONDS), "s"),
    ]
