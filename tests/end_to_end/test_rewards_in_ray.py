"""Scoring inside a Ray actor: workers and jails start, judge and end there as anywhere else."""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import pytest

from r1mega import cluster
from r1mega.config import RewardConfig
from r1mega.rewards.scoring import Scorer
from r1mega.samples import Prompt, Rollout

pytestmark = pytest.mark.end_to_end

TESTS = json.dumps({"asserts": ["assert double(2) == 4"]})


class ScoringActor:
    """A Scorer in a process of Ray's, with an event loop of its own."""

    async def verdicts(self, code: bool) -> list[str]:
        items = [
            ("math", "\\sqrt{8}", "<answer>2\\sqrt{2}</answer>"),
            ("math", "\\sqrt{8}", "<answer>3\\sqrt{2}</answer>"),
            ("math", "\\sqrt{8}", "<answer>9^{9^{9^{9}}}!</answer>"),
        ]
        if code:
            items += [
                ("code", TESTS, "```python\ndef double(x): return 2 * x\n```"),
                ("code", TESTS, "```python\ndef double(x): return x\n```"),
            ]
        rewards = RewardConfig(weights={"accuracy": 1.0}, workers=1, jails=2, cpu_seconds=0.5)
        async with Scorer(rewards) as scorer:
            rollouts = [
                Rollout(Prompt(str(i), "?", answer, task, "?", (1,)), 0, (2,), (-0.1,), text, "stop", 0)
                for i, (task, answer, text) in enumerate(items)
            ]
            rewards_of = await asyncio.gather(*(scorer.score(rollout) for rollout in rollouts))
            self.pids = scorer.services.pool.pids()
            return [reward.verdicts["accuracy"] for reward in rewards_of]

    async def left_behind(self) -> list[int]:
        return [pid for pid in self.pids if os.path.exists(f"/proc/{pid}")]


def test_scoring_works_in_a_ray_actor(ray_cluster: None) -> None:
    jailed = shutil.which("bwrap") is not None

    async def scenario() -> tuple[list[str], list[int]]:
        handle = cluster.spawn(ScoringActor, name="scoring", threads=1)
        try:
            return await handle.verdicts(jailed), await handle.left_behind()
        finally:
            cluster.kill(handle)

    verdicts, left = asyncio.run(scenario())
    assert verdicts[:2] == ["equal", "unequal"]
    assert verdicts[2] in ("timeout", "unequal", "unparsable", "memory"), "never a fault, never equal"
    assert verdicts[3:] == (["passed", "wrong_answer"] if jailed else [])
    assert left == []
