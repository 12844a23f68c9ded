"""One interface for every reward: a term is `async (Rollout) -> (value, verdict)`.

R1-Zero sums accuracy and format with equal weights and uses no neural reward model (R1, section 2.1). Scoring
overlaps decoding: `Scorer.score_stream` begins with each rollout as it finishes.

Answers that text or exact arithmetic can decide never leave this process; the others go to killable workers.
To add a term: write `async (Rollout) -> (value, verdict)`, name it in REWARDS and give RewardConfig a weight
of that name.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from r1mega.config import RewardConfig
from r1mega.rewards.format import check_format
from r1mega.rewards.math_answer import extract_answer, quick_compare
from r1mega.rewards.workers import WorkerError, WorkerPool
from r1mega.samples import Reward, Rollout, ScoredRollout

RewardTerm = Callable[[Rollout], Awaitable[tuple[float, str]]]
"""value (unweighted) and verdict (why)."""


def accuracy_term(pool: WorkerPool) -> RewardTerm:
    """1 for the right answer, judged by the rules of the prompt's task (ACCURACY)."""
    rules = {task: make(pool) for task, make in ACCURACY.items()}

    async def accuracy(rollout: Rollout) -> tuple[float, str]:
        task = rollout.prompt.task
        if task not in rules:
            raise ValueError(
                f"prompt {rollout.prompt.id}: task {task!r} has no rule; known are {', '.join(rules)}"
            )
        return await rules[task](rollout)

    return accuracy


def math_term(pool: WorkerPool) -> RewardTerm:
    """1 when the answer in <answer>...</answer> (or, without the tags, the last \\boxed{}) equals the reference.

    Verdicts: equal | unequal | unparsable | timeout | too_long | memory | fault, missing (no answer found) and
    truncated (cut at the length limit: worth 0 whatever it says).
    """

    async def math(rollout: Rollout) -> tuple[float, str]:
        if rollout.finish_reason == "length":
            return 0.0, "truncated"
        answer = extract_answer(rollout.response_text)
        if answer is None:
            return 0.0, "missing"
        verdict = quick_compare(rollout.prompt.answer, answer)
        if verdict is None:
            verdict = await pool.run("math", rollout.prompt.answer, answer)
        return float(verdict == "equal"), verdict

    return math


def format_term(_: WorkerPool) -> RewardTerm:
    """1 for exactly <think>...</think><answer>...</answer> (format.py has the verdicts)."""

    async def form(rollout: Rollout) -> tuple[float, str]:
        verdict = check_format(rollout.response_text, truncated=rollout.finish_reason == "length")
        return float(verdict == "ok"), verdict

    return form


MAX_FAULTS = 16
MAX_FAULT_SHARE = 0.05
"""More faults than both, and the scorer gives up rather than train on zeros that nobody earned."""

ACCURACY: dict[str, Callable[[WorkerPool], RewardTerm]] = {"math": math_term}
"""Prompt.task -> its rule."""

REWARDS: dict[str, Callable[[WorkerPool], RewardTerm]] = {"accuracy": accuracy_term, "format": format_term}
"""Term -> its maker; RewardConfig has the weight under the same name. A term of weight 0 is still measured."""


class Scorer:
    """Scores rollouts while the context is open (`async with Scorer(config.rewards) as scorer`).

    Owns the worker processes. May be used from any event loop, a Ray actor's included.
    """

    def __init__(self, rewards: RewardConfig) -> None:
        self._pool = WorkerPool(
            rewards.workers, cpu_seconds=rewards.cpu_seconds, memory_mib=rewards.memory_mib
        )
        self._weights: dict[str, float] = {name: getattr(rewards, name) for name in REWARDS}
        self._terms = {name: make(self._pool) for name, make in REWARDS.items()}
        self._verdicts: dict[str, Counter[str]] = {name: Counter() for name in REWARDS}
        self._scored = 0
        self._faults = 0

    async def __aenter__(self) -> Scorer:
        self._pool.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._pool.close)

    async def score(self, rollout: Rollout) -> Reward:
        """The weighted sum and each term's value and verdict."""
        terms, verdicts, total = {}, {}, 0.0
        for name, term in self._terms.items():
            value, verdict = await term(rollout)
            terms[name], verdicts[name] = value, verdict
            total += self._weights[name] * value
        for name, verdict in verdicts.items():
            self._verdicts[name][verdict] += 1
        self._scored += 1
        self._faults += "fault" in verdicts.values()
        if self._faults > max(MAX_FAULTS, MAX_FAULT_SHARE * self._scored):
            raise WorkerError(
                f"{self._faults} of {self._scored} answers could not be judged (verdict fault): "
                "something kills or breaks the reward workers; the log has each case"
            )
        return Reward(total, terms, verdicts)

    async def score_stream(
        self, rollouts: AsyncIterator[Rollout], *, in_flight: int = 1024
    ) -> AsyncIterator[ScoredRollout]:
        """Every rollout, scored, in order of completion; at most `in_flight` are taken and not yet handed on.

        An error of the source or of a term rises here.
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
            for task in (feeder, *scoring):
                task.cancel()
            await asyncio.gather(feeder, *scoring, return_exceptions=True)

    def verdict_counts(self) -> dict[str, dict[str, int]]:
        """{term: {verdict: how often}} since the last call."""
        counts = {name: dict(counter) for name, counter in self._verdicts.items()}
        for counter in self._verdicts.values():
            counter.clear()
        return counts
