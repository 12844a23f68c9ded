"""Rewards of a group -> advantages, and how a rollout is cut into mini-batches.

Follows DeepSeekMath eq. 3 and R1 eq. 3: A_i = (r_i - mean r) / std r over the outputs of one question.
Departures: an epsilon joins the denominator, a group whose rewards are all equal gets exactly 0 (it
carries no signal, whatever the rounding), and the division by the standard deviation can be left out
(Dr. GRPO). Dims: Q questions, G outputs of one question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from r1mega.config import GRPOConfig


def group_advantages(groups: Sequence[Tensor] | Tensor, config: GRPOConfig) -> tuple[list[Tensor], int]:
    """Advantages of each group (DeepSeekMath eq. 3), and how many groups had equal rewards throughout.

    groups: rewards, one tensor [G] per question (sizes may differ: outputs get lost), or a tensor [Q, G].
    Returns float64 tensors of the same sizes; a group of equal rewards, or of one output, is all 0.
    """
    advantages: list[Tensor] = []
    num_zero_std = 0
    for group in groups:
        rewards_G = group.to(torch.float64)
        if rewards_G.numel() == 0 or rewards_G.max() == rewards_G.min():
            num_zero_std += 1
            advantages.append(torch.zeros_like(rewards_G))
            continue
        centred_G = rewards_G - rewards_G.mean()
        if config.scale_by_std:
            centred_G = centred_G / (rewards_G.std(correction=config.std_ddof) + config.std_epsilon)
        advantages.append(centred_G)
    return advantages, num_zero_std


def token_weights(lengths: Sequence[int], aggregation: str, max_tokens: int) -> list[float]:
    """Weight of every response token of each output, so that the loss is one plain sum.

    lengths: response tokens of all N outputs of the *global* mini-batch; max_tokens: the response limit.
    "sequence_mean" 1/(N |o_i|) is DeepSeekMath eq. 3; "token_mean" 1/sum |o_i| is DAPO eq. 8;
    "fixed_length" 1/(N max_tokens) is Dr. GRPO's constant normaliser.
    """
    if min(lengths, default=1) < 1:
        raise ValueError(
            f"output {list(lengths).index(min(lengths))} has {min(lengths)} response tokens, need 1 or more"
        )
    count = len(lengths)
    if aggregation == "sequence_mean":
        return [1 / (count * length) for length in lengths]
    if aggregation == "token_mean":
        return [1 / sum(lengths) for _ in lengths]
    if aggregation == "fixed_length":
        return [1 / (count * max_tokens) for _ in lengths]
    raise ValueError(f"aggregation {aggregation!r} is not one of sequence_mean, token_mean, fixed_length")


def split_mini_batches(
    group_sizes: Sequence[int], mini_batches: int, split: str, rng: np.random.Generator
) -> list[list[int]]:
    """Cut a rollout into `mini_batches` lists of output indices; every output is in exactly one.

    Outputs are numbered through the groups laid end to end. "output" shuffles single outputs (R1: "randomly
    split into 16 mini-batches"; tears groups apart), "group" shuffles whole groups. Where the counts do not
    divide evenly, lists differ by at most one output (or group).
    """
    ends = np.cumsum(group_sizes, dtype=np.int64)
    if split == "output":
        units = [[index] for index in range(int(ends[-1]) if len(ends) else 0)]
    elif split == "group":
        units = [list(range(end - size, end)) for end, size in zip(ends.tolist(), group_sizes, strict=True)]
    else:
        raise ValueError(f"split {split!r} is not one of output, group")
    parts = np.array_split(rng.permutation(len(units)), mini_batches)
    return [sorted(index for unit in part for index in units[unit]) for part in parts]
