"""Reward models served for scoring: a group of processes around one model, and a client for many coroutines.

The directory that training leaves says in reward_model.json how its model reads: the template, the part of the
response, the objective. So whoever scores with it cannot read it another way than it was trained.

A score is a number without bounds, and where it lies says little: Bradley-Terry only learns differences. What a
reward term makes of it is rewards/terms.py's choice.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1mega import cluster, platforms
from r1mega.config import ConfigError, ModelConfig, ParallelConfig, RewardModelConfig, RunConfig
from r1mega.data.preferences import Encoder
from r1mega.stages.placement import place
from r1mega.stages.run_directory import write_json
from r1mega.stages.tokenizer import load_tokenizer
from r1mega.training.reward_trainer import RewardModel

CARD = "reward_model.json"


@dataclass(frozen=True)
class Reading:
    """How a reward model reads, kept beside its weights."""

    objective: str
    """"pairwise" | "pointwise"."""
    reads: str
    """"summary" | "response"."""
    template: str
    """Key of data/chat.py's TEMPLATES."""

    @classmethod
    def of(cls, config: RunConfig) -> Reading:
        kind: RewardModelConfig = config.reward_model
        return cls(kind.objective, kind.reads, config.data.template)

    @classmethod
    def read(cls, path: Path) -> Reading:
        """Raises ConfigError where `path` is no directory that training a reward model left."""
        try:
            return cls(**json.loads((path / CARD).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: no readable {CARD} ({error}); take the hf/ directory of a run with stage=reward_model"
            ) from error

    def write(self, path: Path) -> None:
        write_json(path / CARD, asdict(self))


class RewardClient:
    """A reward model that coroutines ask one response at a time and that answers them in batches.

    While one batch is being scored, the next one collects. A failure of the server rises in every call that waits.
    For one event loop.
    """

    def __init__(self, group: cluster.WorkerGroup, encode: Encoder, tokens_per_batch: int):
        self._group, self._encode, self._tokens_per_batch = group, encode, tokens_per_batch
        self._waiting: deque[tuple[tuple[int, ...], asyncio.Future[float]]] = deque()
        self._loop: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self.batches = 0
        """Batches scored so far."""

    @classmethod
    async def start(
        cls,
        path: str | Path,
        config: RunConfig,
        parallel: ParallelConfig | None = None,
        name: str = "reward model",
    ) -> RewardClient:
        """Serve the reward model in `path` on parallel.tensor * parallel.data processes (default: one).

        Platform, dtype and seed are the run's. Needs cluster.start. Raises ConfigError, FileNotFoundError or
        ValueError for a directory that holds no reward model.
        """
        path, parallel = Path(path), parallel or ParallelConfig()
        reading = Reading.read(path)
        model = ModelConfig(path=str(path), dtype=config.model.dtype)
        encode = Encoder(load_tokenizer(model), reading.template, reading.reads)
        served = replace(config, stage="reward_model", model=model, parallel=parallel)
        placement = place(served, platforms.detect(config.platform))
        group = await cluster.WorkerGroup.create(
            RewardModel,
            served,
            placement.trainer_threads,
            size=served.world_size,
            name=name,
            **placement.trainer,
        )
        if not (await group.call("brought_head"))[0]:
            group.kill()
            raise ConfigError(f"{path}: its weights hold no score.weight; take the hf/ of a reward-model run")
        return cls(group, encode, parallel.tokens_per_chunk * parallel.data)

    async def score(self, question: str, response: str) -> float | None:
        """The model's score of a response to a question (outside any template); None where it has nothing to read."""
        ids = self._encode(question, response)
        if ids is None:
            return None
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, answer))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._answer_all())
        return await answer

    async def score_ids(self, token_id_lists: Sequence[Sequence[int]]) -> list[float]:
        """The scores of these sequences, in order, in one batch."""
        async with self._one_at_a_time:  # ranks must meet in their collectives in one order
            return (await self._group.call("score", token_id_lists))[0]

    async def _answer_all(self) -> None:
        while self._waiting:
            batch = self._take_batch()
            try:
                scores = await self.score_ids([ids for ids, _ in batch])
                assert len(scores) == len(batch), f"{len(scores)} scores for {len(batch)} texts"
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            self.batches += 1
            for (_, answer), score in zip(batch, scores, strict=True):
                if not answer.done():  # whoever asked may have been cancelled
                    answer.set_result(score)

    def _take_batch(self) -> list[tuple[tuple[int, ...], asyncio.Future[float]]]:
        """What waits, up to the token budget; at least one."""
        batch = [self._waiting.popleft()]
        tokens = len(batch[0][0])
        while self._waiting and tokens + len(self._waiting[0][0]) <= self._tokens_per_batch:
            batch.append(self._waiting.popleft())
            tokens += len(batch[-1][0])
        return batch

    def close(self) -> None:
        """End the processes."""
        self._group.kill()
