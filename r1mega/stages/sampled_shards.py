"""Sampling and scoring of data stages: prompts through Ray and vLLM shard by shard, a shard scored while the next is sampled.

Samples and scores are kept apart, so that a judge that is down costs no sample.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1mega import cluster, platforms
from r1mega.config import JudgeConfig, RunConfig, value_at
from r1mega.data.cold_start import Source
from r1mega.data.recipes import GenerateData
from r1mega.data.shards import Rows, shards
from r1mega.rewards.endpoint import EndpointFault
from r1mega.rewards.scoring import FAULTS, Scorer
from r1mega.rollout.engine import EngineDied, RolloutEngine, RolloutGroup, Sampling
from r1mega.samples import Prompt, Rollout
from r1mega.stages.console import Console
from r1mega.stages.placement import place

DATA_STEP = -2
"""Sampling seeds are those of a step that neither training nor evaluation has."""
NOTES = 10
"""Lines of progress for each source, about."""


class SampledShards:
    """A source with its prompts, and the shards they are made in: samples/<source>-…, scored/<source>-…."""

    def __init__(self, source: Source, prompts: Sequence[Prompt], config: GenerateData, folder: Path):
        self.source, self.config = source, config
        self.by_id = {prompt.id: prompt for prompt in prompts}
        self.samples = shards(prompts, config.shard_size, folder / "samples", source.name, lambda p: p.id)
        self.scores = shards(prompts, config.shard_size, folder / "scored", source.name, lambda p: p.id)

    @property
    def waiting(self) -> bool:
        """Something has yet to be sampled."""
        return not all(shard.done for shard in self.samples)

    def scored_samples(self) -> Iterator[dict[str, Any]]:
        """Every sample with its terms and verdicts, once all shards are there."""
        for samples, scores in zip(self.samples, self.scores, strict=True):
            for sample, score in zip(samples.read(), scores.read(), strict=True):
                assert (sample["prompt"], sample["index"]) == (score["prompt"], score["index"])
                yield sample | score

    async def make(self, run: RunConfig, scorer: Scorer, judge: JudgeConfig, console: Console) -> None:
        """Sample and score what is not there yet. Raises EngineDied, and EndpointFault where the judge is silent."""
        total, began, name = len(self.samples), time.monotonic(), self.source.name
        done = sum(shard.done for shard in self.samples)
        console.phase(
            f"{name}: {len(self.by_id):,} prompts, {self.config.samples} samples each, {total} shards"
            + (f", {done} of them there" if done else "")
        )
        scoring: asyncio.Task[Rows] | None = None
        async with AsyncExitStack() as stack:
            config = replace(run, model=self.source.model)
            engines = await stack.enter_async_context(started(config)) if self.waiting else None
            try:
                for number, shard in enumerate(self.samples):
                    samples = await shard.rows(lambda prompts: self._sampled(engines, prompts))
                    if scoring:
                        await scoring
                    scoring = asyncio.create_task(self._scored(number, samples, scorer, judge))
                    console.progress(name, number + 1, total)
                    if (number + 1) % max(1, total // NOTES) == 0:
                        console.note(
                            f"{name}: shard {number + 1} of {total}, {time.monotonic() - began:.0f} s"
                        )
                if scoring:
                    await scoring
            finally:
                if scoring:
                    scoring.cancel()

    async def _sampled(self, engines: RolloutGroup | None, prompts: Sequence[Prompt]) -> Rows:
        assert engines is not None
        position = {prompt.id: number for number, prompt in enumerate(prompts)}
        rollouts = [item async for item in engines.generate(prompts, sampling_of(self.config), DATA_STEP)]
        rollouts.sort(key=lambda item: (position[item.prompt.id], item.index))
        assert len(rollouts) == len(prompts) * self.config.samples
        return [self._sample(item) for item in rollouts]

    def _sample(self, item: Rollout) -> dict[str, Any]:
        text, ended = self.source.cut(item.response_text)
        return {
            "prompt": item.prompt.id,
            "index": item.index,
            "text": text,
            "tokens": len(item.response_ids),
            "finish_reason": "stop" if ended else item.finish_reason,
        }

    async def _scored(self, number: int, samples: Rows, scorer: Scorer, judge: JudgeConfig) -> Rows:
        rollouts = [
            as_rollout(self.by_id[sample["prompt"]], sample["index"], sample["text"], sample["finish_reason"])
            for sample in samples
        ]
        return await self.scores[number].rows(lambda _: scores_of(rollouts, scorer, judge))


async def scores_of(rollouts: Sequence[Rollout], scorer: Scorer, judge: JudgeConfig) -> Rows:
    """Terms and verdicts in the order of the rollouts."""

    async def given() -> AsyncIterator[Rollout]:
        for rollout in rollouts:
            yield rollout

    slots = {(rollout.prompt.id, rollout.index): slot for slot, rollout in enumerate(rollouts)}
    rows: Rows = [{}] * len(rollouts)
    async for item in scorer.score_stream(given()):
        id, index, reward = item.rollout.prompt.id, item.rollout.index, item.reward
        _check_judge(reward.verdicts, id, judge)
        rows[slots[id, index]] = {
            "prompt": id, "index": index, "terms": reward.terms, "verdicts": reward.verdicts,
        }  # fmt: skip
    return rows


def _check_judge(verdicts: Mapping[str, str], id: str, judge: JudgeConfig) -> None:
    """A judge that is silent stops the run. (A rule's fault is the sample's own; the scorer bounds how many there are.)"""
    if verdicts.get("judge") in FAULTS:
        raise EndpointFault(f"{judge.url}, model {judge.model}: no verdict of the judge on {id}")


def as_rollout(prompt: Prompt, index: int, text: str, finish_reason: str = "stop") -> Rollout:
    """A text as the reward terms read it: its tokens are not kept."""
    return Rollout(prompt, index, (), (), text, finish_reason, 0)


def sampling_of(config: GenerateData) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.temperature, rollout.top_p, value_at(rollout.max_tokens, 0), n=config.samples)


@asynccontextmanager
async def started(config: RunConfig) -> AsyncIterator[RolloutGroup]:
    """Engines on config.model, ended in any case. Needs cluster.start."""
    placement = place(config, platforms.detect(config.platform))
    cluster.require_gpus(config.rollout.engines * placement.engine_gpus)
    path, tokenizer = config.model.path, config.model.tokenizer or config.model.path
    handles = [
        cluster.spawn(
            RolloutEngine, config, path, tokenizer, index, config.rollout.engines, placement.engine_threads,
            name=f"engine {index}", **placement.engine,
        )
        for index in range(config.rollout.engines)
    ]  # fmt: skip
    group = RolloutGroup(handles)
    try:
        await asyncio.gather(*(handle.ready() for handle in handles))
        yield group
        with suppress(EngineDied):
            await group.close()
    finally:
        for handle in handles:
            cluster.kill(handle)
