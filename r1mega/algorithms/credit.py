"""Scored rollouts -> training samples: advantages per group, then mini-batches, then token weights.

Advantages are computed over the whole group before the split, because a random split by output tears
groups apart. Departure from the paper (which does not say): outputs cut at the length limit can be left
out of the loss (`grpo.mask_truncated`); their reward still counts in their group's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from r1mega.algorithms.advantages import group_advantages, split_mini_batches, token_weights
from r1mega.config import RunConfig, value_at
from r1mega.samples import Sample, ScoredRollout


@dataclass(frozen=True)
class Credit:
    """What one rollout teaches."""

    mini_batches: list[list[Sample]]
    """One list per policy update, in order; shorter than planned where outputs were lost or masked."""
    num_groups: int
    num_zero_std: int
    """Groups whose rewards were all equal: advantage 0, only the KL term trains on them."""
    num_masked: int
    """Truncated outputs left out (grpo.mask_truncated)."""


def build_samples(scored: Sequence[ScoredRollout], config: RunConfig, step: int) -> Credit:
    """Turn the outputs of one rollout into the samples of its mini-batches.

    scored: in any order, groups complete or not (a question that was drawn twice forms one larger group).
    step: the rollout's first policy update, which picks the length limit and, with the seed, the shuffle:
    the same rollouts give the same mini-batches in whatever order they arrived.
    """
    ordered = sorted(scored, key=_identity)
    groups = [list(group) for _, group in groupby(ordered, key=lambda item: item.rollout.prompt.id)]
    advantages, num_zero_std = group_advantages(
        [torch.tensor([item.reward.total for item in group], dtype=torch.float64) for group in groups],
        config.grpo,
    )
    credited = [
        [(item, float(value)) for item, value in zip(group, values_G, strict=True) if _trained(item, config)]
        for group, values_G in zip(groups, advantages, strict=True)
    ]
    flat = [pair for group in credited for pair in group]
    parts = split_mini_batches(
        [len(group) for group in credited],
        config.grpo.mini_batches,
        config.grpo.split,
        np.random.default_rng([config.seed, step]),
    )
    max_tokens = value_at(config.rollout.max_tokens, step)
    mini_batches = []
    for part in parts:
        lengths = [len(flat[index][0].rollout.response_ids) for index in part]
        weights = token_weights(lengths, config.grpo.aggregation, max_tokens)
        mini_batches.append(
            [_sample(*flat[index], weight) for index, weight in zip(part, weights, strict=True)]
        )
    return Credit(mini_batches, len(groups), num_zero_std, len(ordered) - len(flat))


def _identity(item: ScoredRollout) -> tuple[str, int, tuple[int, ...]]:
    return item.rollout.prompt.id, item.rollout.index, item.rollout.response_ids


def _trained(item: ScoredRollout, config: RunConfig) -> bool:
    return not (config.grpo.mask_truncated and item.rollout.finish_reason == "length")


def _sample(item: ScoredRollout, advantage: float, weight: float) -> Sample:
    """One output as a shifted sequence: entry t concerns the prediction of token t + 1."""
    rollout = item.rollout
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
    return Sample(
        token_ids=np.array(rollout.prompt.token_ids + rollout.response_ids, dtype=np.int64),
        loss_mask=loss_mask,
        token_weights=loss_mask * np.float32(weight),
        advantages=loss_mask * np.float32(advantage),
        rollout_logprobs=logprobs,
    )
