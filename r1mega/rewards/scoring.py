"""Scores rollouts while others are still being generated, and while the reference model runs (R1, appendix B.1).

What is scored stands in terms.py, how terms add up in sums.py. Here: concurrency, accounting, and the gate
against rewards that nobody earned.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from r1mega.config import JudgeConfig, RewardConfig
from r1mega.rewards.endpoint import EndpointFault
from r1mega.rewards.services import ModelClient, Services
from r1mega.rewards.sums import weights_of
from r1mega.rewards.terms import REWARDS, RewardTerm
from r1mega.rewards.workers import WorkerError
from r1mega.samples import Reward, Rollout, ScoredRollout

IN_FLIGHT = 1024
"""Rollouts whose terms are being computed at once; it bounds the queues of workers, jails and endpoints."""
MAX_FAULTS = 16
MAX_FAULT_SHARE = 0.05
"""More faults than both, and the scorer gives up rather than train on zeros that nobody earned."""
FAULTS = ("fault", "sandbox_fault")
"""Verdicts that say something about us and nothing about the answer."""


class Scorer:
    """Scores rollouts while the context is open (`async with Scorer(config.rewards) as scorer`).

    Owns the worker processes, the jails and the judge's connections, each started when first needed. May be
    used from any event loop, a Ray actor's included. `models` has a client for each reward model in use;
    `extra` adds terms to those of terms.py, by name.
    """

    def __init__(
        self,
        rewards: RewardConfig,
        *,
        judge: JudgeConfig | None = None,
        models: Mapping[str, ModelClient] | None = None,
        extra: Mapping[str, RewardTerm] | None = None,
    ) -> None:
        self.rewards = rewards
        self.services = Services(rewards, judge or JudgeConfig(), models or {})
        self._terms: dict[str, RewardTerm] = dict(extra or {})
        self._verdicts: dict[str, Counter[str]] = {}
        self._scored = 0
        self._faults = 0

    async def __aenter__(self) -> Scorer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.services.close()

    def prepare(self, tasks: Iterable[str]) -> None:
        """Start what these tasks need, so that a machine that cannot serve them says so before the run.

        Raises ConfigError.
        """
        for task in tasks:
            row = weights_of(self.rewards, task)
            if task == "math" and "accuracy" in row:
                self.services.pool.start()
            if task == "code" and "accuracy" in row:
                _ = self.services.code
            for name in row:
                self._term(name)

    async def score(self, rollout: Rollout) -> Reward:
        """The weighted sum over the terms of the rollout's task, and each term's value and verdict."""
        weights = weights_of(self.rewards, rollout.prompt.task)
        results = await asyncio.gather(*(self._term(name)(rollout) for name in weights))
        terms = {name: value for name, (value, _) in zip(weights, results, strict=True)}
        verdicts = {name: verdict for name, (_, verdict) in zip(weights, results, strict=True)}
        for name, verdict in verdicts.items():
            self._verdicts.setdefault(name, Counter())[verdict] += 1
        self._scored += 1
        at_fault = [name for name, verdict in verdicts.items() if verdict in FAULTS]
        self._faults += bool(at_fault)
        if self._faults > max(MAX_FAULTS, MAX_FAULT_SHARE * self._scored):
            if at_fault == ["judge"]:
                judge = self.services.judge_config
                raise EndpointFault(
                    f"{judge.url}, model {judge.model}: no verdict of the judge, and {self._faults} of {self._scored} "
                    "answers could not be judged"
                )
            raise WorkerError(
                f"{self._faults} of {self._scored} answers could not be judged ({', '.join(FAULTS)}): "
                "something kills or breaks the reward workers; the log has each case"
            )
        return Reward(sum(weights[name] * terms[name] for name in weights), terms, verdicts)

    def _term(self, name: str) -> RewardTerm:
        if name not in self._terms:
            self._terms[name] = REWARDS[name](self.services)
        return self._terms[name]

    def begin(self, rollouts: AsyncIterator[Rollout], *, in_flight: int = IN_FLIGHT) -> Scoring:
        """Take and score all of a finite stream: `async with scorer.begin(stream) as scoring`."""
        return Scoring(self, rollouts, in_flight)

    async def score_stream(
        self, rollouts: AsyncIterator[Rollout], *, in_flight: int = IN_FLIGHT
    ) -> AsyncIterator[ScoredRollout]:
        """Every rollout, scored, in order of completion; at most `in_flight` are taken and not yet handed on.

        So a slow reader slows the source down. An error of the source or of a term rises here.
        """
        done: asyncio.Queue[asyncio.Task[ScoredRollout | None]] = asyncio.Queue()
        slots = asyncio.Semaphore(in_flight)
        scoring: set[asyncio.Task[ScoredRollout | None]] = set()

        async def score_one(rollout: Rollout) -> ScoredRollout | None:
            return ScoredRollout(rollout, await self.score(rollout))

        async def feed() -> ScoredRollout | None:
            async for rollout in rollouts:
                await slots.acquire()
                task = asyncio.create_task(score_one(rollout))
                scoring.add(task)
                task.add_done_callback(done.put_nowait)
            return None

        feeder = asyncio.create_task(feed())
        feeder.add_done_callback(done.put_nowait)
        fed = False
        try:
            while scoring or not fed:
                task = await done.get()
                scored = task.result()
                if scored is None:
                    fed = True
                    continue
                scoring.discard(task)
                slots.release()
                yield scored
        finally:
            await _cancel([feeder, *scoring])

    def verdict_counts(self) -> dict[str, dict[str, int]]:
        """{term: {verdict: how often}} since the last call."""
        counts = {name: dict(counter) for name, counter in self._verdicts.items()}
        self._verdicts.clear()
        return counts


@dataclass(frozen=True)
class Span:
    """When one rollout was being scored, in seconds of time.monotonic()."""

    rollout: Rollout
    began: float
    ended: float


class Scoring:
    """The rollouts of one step: generation's end and scoring's end can be awaited apart.

    Generation is never held up: rollouts wait here for one of the `in_flight` places, and there are no more
    of them than the step asked for. The first error of the source or of a term rises from whichever method
    is awaited, at once.
    """

    def __init__(self, scorer: Scorer, source: AsyncIterator[Rollout], in_flight: int):
        self._scorer, self._source = scorer, source
        self._slots = asyncio.Semaphore(in_flight)
        self._rollouts: list[Rollout] = []
        self._tasks: list[asyncio.Task[ScoredRollout]] = []
        self._error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._feeder = asyncio.create_task(self._feed())
        self._feeder.add_done_callback(self._note_failure)
        self.spans: list[Span] = []

    async def __aenter__(self) -> Scoring:
        return self

    async def __aexit__(self, *_: object) -> None:
        await _cancel([self._feeder, *self._tasks])
        self._error.cancel()

    async def rollouts(self) -> Sequence[Rollout]:
        """All rollouts, as soon as they are generated, scored or not; in order of arrival."""
        await self._until([self._feeder])
        return self._rollouts

    async def scored(self) -> list[ScoredRollout]:
        """All rollouts with their rewards, in the order of prompts and indices."""
        await self.rollouts()
        await self._until(self._tasks)
        scored = [task.result() for task in self._tasks]
        return sorted(scored, key=lambda item: (item.rollout.prompt.id, item.rollout.index))

    async def _feed(self) -> None:
        async for rollout in self._source:
            self._rollouts.append(rollout)
            task = asyncio.create_task(self._score(rollout))
            task.add_done_callback(self._note_failure)
            self._tasks.append(task)

    async def _score(self, rollout: Rollout) -> ScoredRollout:
        async with self._slots:
            began = time.monotonic()
            reward = await self._scorer.score(rollout)
            self.spans.append(Span(rollout, began, time.monotonic()))
        return ScoredRollout(rollout, reward)

    def _note_failure(self, task: asyncio.Task) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._error.done():
            self._error.set_exception(error)

    async def _until(self, tasks: Sequence[asyncio.Task]) -> None:
        """Waits for all of the tasks, or for the first failure of any task."""
        everything: asyncio.Future = asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait([everything, self._error], return_when=asyncio.FIRST_COMPLETED)
        if self._error.done():
            self._error.result()


async def _cancel(tasks: Sequence[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
