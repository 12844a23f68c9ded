"""Scored rollouts -> training samples: mini-batches and token weights first, advantages when the rewards are in.

The two halves are apart so that the reference model runs while slow rewards are still being computed (R1, B.1).
Advantages are computed over the whole group before the split, because a random split by output tears
groups apart. Departure from the paper (which does not say): outputs cut at the length limit can be left
out of the loss (`grpo.mask_truncated`); their reward still counts in their group's mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from r1mega.algorithms.advantages import group_advantages, split_mini_batches, token_weights
from r1mega.config import RunConfig, value_at
from r1mega.samples import PackedBatch, Rollout, Sample, ScoredRollout

OutputKey = tuple[str, int]
"""Prompt id and index in its group: which output of a rollout."""


@dataclass(frozen=True)
class Plan:
    """The samples of one rollout before any reward is known."""

    mini_batches: list[list[Sample]]
    """One list per policy update, in order; shorter than planned where outputs were lost or masked."""
    keys: list[list[OutputKey]]
    """Which output each sample is."""
    num_masked: int
    """Truncated outputs left out (grpo.mask_truncated)."""


@dataclass(frozen=True)
class Credit:
    """What the rewards of one rollout say."""

    rewards: dict[OutputKey, float]
    """Of which PPO's critic makes advantages (training/critic.py)."""
    advantages: dict[OutputKey, float]
    num_groups: int
    num_zero_std: int
    """Groups whose rewards were all equal: advantage 0, only the KL term trains on them."""


def plan_samples(rollouts: Sequence[Rollout], config: RunConfig, step: int) -> Plan:
    """The mini-batches of a rollout and every token's weight; no reward is needed for them.

    rollouts: in any order, groups complete or not. step: the rollout's first policy update, which picks the
    length limit and, with the seed, the shuffle: the same rollouts give the same mini-batches in whatever
    order they arrived.
    """
    ordered = sorted(rollouts, key=_key)
    assert len({_key(rollout) for rollout in ordered}) == len(ordered), "an output came twice"
    flat = [rollout for rollout in ordered if _trained(rollout, config)]
    sizes = [len(list(group)) for _, group in groupby(flat, key=lambda rollout: rollout.prompt.id)]
    parts = split_mini_batches(
        sizes, config.grpo.mini_batches, config.grpo.split, np.random.default_rng([config.seed, step])
    )
    max_tokens = value_at(config.rollout.max_tokens, step)
    mini_batches = []
    for part in parts:
        lengths = [len(flat[index].response_ids) for index in part]
        weights = token_weights(lengths, config.grpo.aggregation, max_tokens)
        mini_batches.append(
            [_sample(flat[index], weight) for index, weight in zip(part, weights, strict=True)]
        )
    keys = [[_key(flat[index]) for index in part] for part in parts]
    return Plan(mini_batches, keys, len(ordered) - len(flat))


def credit(scored: Sequence[ScoredRollout], config: RunConfig) -> Credit:
    """Advantages of a rollout's outputs, each within the group of its question."""
    ordered = sorted(scored, key=lambda item: _key(item.rollout))
    groups = [list(group) for _, group in groupby(ordered, key=lambda item: item.rollout.prompt.id)]
    advantages, num_zero_std = group_advantages(
        [torch.tensor([item.reward.total for item in group], dtype=torch.float64) for group in groups],
        config.grpo,
    )
    values = torch.cat(advantages).tolist() if advantages else []
    rewards = {_key(item.rollout): item.reward.total for item in ordered}
    return Credit(rewards, dict(zip(rewards, values, strict=True)), len(groups), num_zero_std)


def build_samples(scored: Sequence[ScoredRollout], config: RunConfig, step: int) -> list[list[Sample]]:
    """Plan and credit in one: the mini-batches with their advantages, where all rewards are there already."""
    plan, of_output = (
        plan_samples([item.rollout for item in scored], config, step),
        credit(scored, config).advantages,
    )
    return [
        [
            replace(s, advantages=s.loss_mask * np.float32(of_output[key]))
            for s, key in zip(samples, keys, strict=True)
        ]
        for samples, keys in zip(plan.mini_batches, plan.keys, strict=True)
    ]


def of_sequences(
    chunk: PackedBatch, keys: Sequence[OutputKey], of_output: Mapping[OutputKey, float]
) -> Tensor:
    """fp32 [S] for one chunk of a mini-batch whose outputs are `keys`; padding has 0."""
    values = [of_output[keys[member]] for member in chunk.members]
    return torch.tensor(values + [0.0] * (chunk.num_sequences - len(values)), dtype=torch.float32)


def _key(rollout: Rollout) -> OutputKey:
    return rollout.prompt.id, rollout.index


def _trained(rollout: Rollout, config: RunConfig) -> bool:
    return not (config.grpo.mask_truncated and rollout.finish_reason == "length")


def _sample(rollout: Rollout, weight: float) -> Sample:
    """One output as a shifted sequence: entry t concerns the prediction of token t + 1."""
    prompt_length, length = len(rollout.prompt.token_ids), len(rollout.response_ids)
    name = f"output {rollout.index} of prompt {rollout.prompt.id}"
    if prompt_length == 0:
        raise ValueError(f"{name}: the prompt has no tokens, so its first response token has no context")
    if len(rollout.response_logprobs) != length:
        raise ValueError(f"{name}: {len(rollout.response_logprobs)} log-probs for {length} response tokens")
    loss_mask = np.zeros(prompt_length + length - 1, dtype=np.float32)
    response = slice(prompt_length - 1, None)
    loss_mask[response] = 1
    logprobs = np.zeros_like(loss_mask)
    logprobs[response] = rollout.response_logprobs
    experts = rollout.routed_experts
    if experts is not None and len(experts) != len(loss_mask):
        raise ValueError(f"{name}: the experts of {len(experts)} tokens, there must be {len(loss_mask)}")
    return Sample(
        token_ids=np.array(rollout.prompt.token_ids + rollout.response_ids, dtype=np.int64),
        loss_mask=loss_mask,
        token_weights=loss_mask * np.float32(weight),
        rollout_logprobs=logprobs,
        routed_experts=experts,
    )
