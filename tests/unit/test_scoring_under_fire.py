"""Reward workers and jails that are killed at random lose no sample."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from r1mega.config import RewardConfig
from r1mega.rewards.scoring import FAULTS, Scorer
from r1mega.samples import Prompt, Rollout

SCORINGS = 5000
KILL_EVERY_SECONDS = 0.15
TESTS = json.dumps({"stdin": ["1 2\n"], "stdout": ["3\n"]})
PROGRAMS = {True: "print(sum(map(int, input().split())))", False: "print(4)"}


def math_rollout(index: int, right: bool, hard: bool) -> Rollout:
    """Hard answers need the workers: text and fractions cannot tell."""
    answer = f"\\frac{{{index}}}{{\\sqrt{{2}}}}" if hard else str(index)
    said = (
        (f"\\frac{{{index if right else index + 1}\\sqrt{{2}}}}{{2}}") if hard else str(index + (not right))
    )
    return _rollout(index, "math", answer, f"<think></think><answer>{said}</answer>")


def code_rollout(index: int, right: bool) -> Rollout:
    return _rollout(index, "code", TESTS, f"<think></think>\n```python\n{PROGRAMS[right]}\n```\n")


def _rollout(index: int, task: str, answer: str, text: str) -> Rollout:
    return Rollout(Prompt(str(index), "?", answer, task, "?", (1,)), 0, (2,), (-0.1,), text, "stop", 0)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs the package bubblewrap")
def test_workers_killed_at_random_lose_no_sample() -> None:
    rng = random.Random(5)
    right = [rng.random() < 0.5 for _ in range(SCORINGS)]
    kinds = rng.choices(("quick", "hard", "code"), (0.86, 0.12, 0.02), k=SCORINGS)
    items = [
        code_rollout(i, right[i]) if kind == "code" else math_rollout(i, right[i], kind == "hard")
        for i, kind in enumerate(kinds)
    ]

    async def source() -> AsyncIterator[Rollout]:
        for number, item in enumerate(items):
            if number % 25 == 0:
                await asyncio.sleep(0)
            yield item

    async def killer(scorer: Scorer, killed: list[int]) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * KILL_EVERY_SECONDS)
            pids = scorer.services.pool.pids() + scorer.services.code.sandbox.server_pids()
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(pid := rng.choice(pids), signal.SIGKILL)
                    killed.append(pid)

    async def scenario() -> tuple[list, list[int]]:
        killed: list[int] = []
        rewards = RewardConfig(weights={"accuracy": 1.0}, workers=2, jails=2)
        async with Scorer(rewards) as scorer:
            scorer.prepare({"math", "code"})
            killing = asyncio.create_task(killer(scorer, killed))
            async with scorer.begin(source(), in_flight=64) as scoring:
                scored = await scoring.scored()
            killing.cancel()
            assert sum(scorer.verdict_counts()["accuracy"].values()) == SCORINGS
            return scored, killed

    scored, killed = asyncio.run(scenario())
    assert len(killed) >= 3
    assert Counter(item.rollout.prompt.id for item in scored) == Counter(map(str, range(SCORINGS)))
    faults = [item for item in scored if item.reward.verdicts["accuracy"] in FAULTS]
    assert len(faults) < 0.05 * SCORINGS
    for item in scored:
        if item.reward.verdicts["accuracy"] not in FAULTS:
            assert item.reward.total == float(right[int(item.rollout.prompt.id)]), item
