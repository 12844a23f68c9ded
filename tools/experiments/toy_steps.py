"""What process_reward.py and mcts.py share: steps of the toy chains, samples of a policy, a scorer of prefixes.

A step of a toy solution (r1mega/data/bilingual.py) is one worked operation, "plus 4 is 7"; the last step is the whole
response, whose result is the answer as the accuracy rule reads it. A scorer is the project's own pointwise reward
model (stages/reward_model.py), given responses that stop after a step.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from r1mega.data.bilingual import LANGUAGES
from r1mega.data.chain import ChainProblem, apply
from r1mega.data.preferences import Encoder
from r1mega.data.prompts import read_prompts
from r1mega.rewards.math_answer import extract_answer
from r1mega.rewards.terms import as_reward
from r1mega.rollout.engine import RolloutEngine, Sampling
from r1mega.samples import Prompt, Rollout
from r1mega.stages import reward_model
from r1mega.stages.console import Console
from r1mega.stages.reward_server import RewardClient
from r1mega.stages.run_directory import RunDirectory
from r1mega.stages.tokenizer import load_tokenizer

TEMPLATE = "tiny_bilingual"
MAX_TOKENS = 48
SIGNS = {word.strip(): sign for words in LANGUAGES for sign, word in words.operators.items()}
STEP = re.compile(
    rf" ?({'|'.join(SIGNS)}) ?(\d)(?:{'|'.join(sorted(words.gives for words in LANGUAGES))})(\d)"
)


# ---------------------------------------------------------------- steps and their labels


def problem_of(prompt: Prompt) -> ChainProblem:
    """The chain behind a generated prompt ("chain:3 + 4 * 2")."""
    start, *rest = prompt.id.removeprefix("chain:").split()
    return ChainProblem(
        int(start), tuple((sign, int(digit)) for sign, digit in zip(rest[::2], rest[1::2], strict=True))
    )


def prefixes(response: str) -> list[str]:
    """The response up to the end of each worked step, and all of it."""
    ends = [match.end() for match in STEP.finditer(response)]
    return [response[:end] for end in ends if end < len(response)] + [response]


def step_labels(problem: ChainProblem, response: str) -> list[bool]:
    """By rule, one for each of prefixes(response): is the step's result the chain's true value at that point?

    A worked step must also name the question's operation; the whole response is right if its tagged answer is.
    """
    labels, value = [], problem.start
    for number, prefix in enumerate(prefixes(response)[:-1]):
        sign, digit, result = list(STEP.finditer(prefix))[-1].groups()
        expected = problem.steps[number] if number < len(problem.steps) else None
        if expected:
            value = apply(value, *expected)
        labels.append(expected == (SIGNS[sign], int(digit)) and int(result) == value)
    return [*labels, is_right(problem, response)]


def is_right(problem: ChainProblem, response: str) -> bool:
    return extract_answer(response) == problem.answer


# ---------------------------------------------------------------- samples


def questions(options: argparse.Namespace, count: int, *, heldout: bool) -> list[Prompt]:
    data = DataConfig(
        path="generated:bilingual",
        template=TEMPLATE,
        max_prompt_tokens=64,
        operations=options.operations,
        size=1 if heldout else count,
        eval_size=count if heldout else 1,
    )
    read = read_prompts(data, load_tokenizer(ModelConfig(path=options.model)), seed=options.seed)
    return read.heldout if heldout else read.train


def policy(model: str, options: argparse.Namespace) -> RolloutEngine:
    config = RunConfig(
        platform="cpu",
        seed=options.seed,
        model=ModelConfig(path=model, dtype="float32"),
        data=DataConfig(max_prompt_tokens=128),
        rollout=RolloutConfig(
            max_tokens=((0, MAX_TOKENS),), dtype="float32", kv_cache_gib=0.25, max_concurrent=256
        ),
    )
    return RolloutEngine(config, model, model)


async def sample(
    engine: RolloutEngine, prompts: Sequence[Prompt], k: int, *, max_tokens: int = MAX_TOKENS, step: int = 0
) -> dict[str, list[Rollout]]:
    """k responses of each prompt at temperature 1, by its id."""
    found: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
    async for rollouts in engine.generate(prompts, Sampling(1.0, 1.0, max_tokens, n=k), step):
        for rollout in rollouts:
            found[rollout.prompt.id].append(rollout)
    return {id: sorted(group, key=lambda rollout: rollout.index) for id, group in found.items()}


async def sampled(options: argparse.Namespace, prompts: Sequence[Prompt], k: int) -> dict[str, list[Rollout]]:
    """The same with an engine of its own."""
    engine = policy(options.model, options)
    samples = await sample(engine, prompts, k)
    await engine.close()
    return samples


def tokens_in(samples: dict[str, list[Rollout]]) -> int:
    return sum(len(rollout.response_ids) for group in samples.values() for rollout in group)


# ---------------------------------------------------------------- a scorer of prefixes


def scorer_config(model: str, options: argparse.Namespace, path: Path, heldout: int) -> RunConfig:
    return RunConfig(
        stage="reward_model",
        platform="cpu",
        seed=options.seed,
        model=ModelConfig(path=model, dtype="float32"),
        data=DataConfig(path=str(path), template=TEMPLATE, eval_size=heldout),
        reward_model=RewardModelConfig(objective="pointwise", reads="response"),
        sft=SFTConfig(batch_size=64, max_length=256, num_epochs=options.epochs),
        parallel=ParallelConfig(tokens_per_chunk=8192),
        optimizer=OptimizerConfig(
            lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=10, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )


def train_scorer(rows: Sequence[dict[str, Any]], options: argparse.Namespace, out: Path) -> Path:
    """Rows prompt, response (a prefix) and safe (the label) -> the directory of a trained scorer; starts Ray."""
    path = out / "labels.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    config = scorer_config(options.model, options, path, heldout=max(1, len(rows) // 10))
    with RunDirectory(out / "scorer", config) as directory:
        reward_model.run(config, directory, Console())
    return out / "scorer/hf"


class PrefixScorer:
    """P(the label is true) of (question, prefix), each computed once."""

    def __init__(self, client: RewardClient, encode: Encoder):
        self._client, self._encode = client, encode
        self._known: dict[tuple[str, str], float] = {}
        self.tokens, self.seconds = 0, 0.0

    @classmethod
    async def start(cls, path: Path, options: argparse.Namespace) -> PrefixScorer:
        """Needs cluster.start."""
        config = scorer_config(str(path), options, path, 0)
        encode = Encoder(load_tokenizer(config.model), TEMPLATE, "response")
        return cls(await RewardClient.start(path, config, config.parallel), encode)

    async def score(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        pairs = list(pairs)
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known and pair[1].strip()]
        ids = [self._encode(*pair) or () for pair in new]
        began = time.monotonic()
        for pair, score in zip(new, await self._client.score_ids(ids) if ids else [], strict=True):
            self._known[pair] = as_reward(score)[0]
        self.seconds += time.monotonic() - began
        self.tokens += sum(map(len, ids))
        return [self._known.get(pair, 0.0) for pair in pairs]

    def close(self) -> None:
        self._client.close()
