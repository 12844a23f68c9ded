"""Accuracy of the engine's current weights on held-out questions: sampled as in training, and greedy.

The paper evaluates by sampling and never greedily (greedy decoding repeats); both are reported here
because a toy answer is short enough for greedy decoding to be meaningful.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from r1mega.config import RunConfig
from r1mega.rewards.scoring import Scorer
from r1mega.rollout.engine import RolloutGroup, Sampling, greedy_sampling, rollout_sampling
from r1mega.samples import Prompt, ScoredRollout
from r1mega.stages.summary import term_means

EVAL_STEP = -1
"""Evaluation draws its sampling seeds from a step that training never has."""


@dataclass(frozen=True)
class Score:
    accuracy: float
    ci: float
    """Half-width of the 95 % confidence interval: normal approximation, over problems (a problem's answers are alike)."""
    format: float
    response_length: float
    truncated: float
    n: int
    """Problems."""


@dataclass(frozen=True)
class Evaluation:
    sampled: Score
    greedy: Score
    examples: list[ScoredRollout]

    def as_dict(self) -> dict:
        return {"sampled": asdict(self.sampled), "greedy": asdict(self.greedy)}


async def evaluate(
    engines: RolloutGroup, scorer: Scorer, prompts: Sequence[Prompt], config: RunConfig, step: int
) -> Evaluation:
    """`eval.samples` sampled answers and a greedy one for every prompt."""
    sampling = replace(rollout_sampling(config, step), n=config.eval.samples)
    sampled = await answers(engines, scorer, prompts, sampling)
    greedy = await answers(engines, scorer, prompts, greedy_sampling(config, step))
    return Evaluation(score(sampled), score(greedy), sampled[:: sampling.n][:3])


async def answers(
    engines: RolloutGroup, scorer: Scorer, prompts: Sequence[Prompt], sampling: Sampling
) -> list[ScoredRollout]:
    """Scored answers in the order of the prompts."""
    stream = scorer.score_stream(engines.generate(prompts, sampling, EVAL_STEP))
    scored = [item async for item in stream]
    position = {prompt.id: i for i, prompt in enumerate(prompts)}
    return sorted(scored, key=lambda item: (position[item.rollout.prompt.id], item.rollout.index))


def score(scored: Sequence[ScoredRollout]) -> Score:
    """Accuracy over the outputs whose task has a rule; 0 of a term that no output has."""
    n = max(1, len(scored))
    means = {"accuracy": 0.0, "format": 0.0} | term_means(scored)
    of_problem: dict[str, list[float]] = defaultdict(list)
    for item in scored:
        if "accuracy" in item.reward.terms:
            of_problem[item.rollout.prompt.id].append(item.reward.terms["accuracy"])
    shares = [statistics.fmean(values) for values in of_problem.values()] or [0.0]
    return Score(
        accuracy=means["accuracy"],
        ci=1.96 * statistics.pstdev(shares) / math.sqrt(len(shares)),
        format=means["format"],
        response_length=sum(len(item.rollout.response_ids) for item in scored) / n,
        truncated=sum(item.rollout.finish_reason == "length" for item in scored) / n,
        n=len({item.rollout.prompt.id for item in scored}),
    )
