"""Rewards -> advantages, of a group (GRPO) or of a critic (PPO), and how a rollout is cut into mini-batches.

Follows DeepSeekMath eq. 3 and R1 eq. 3: A_i = (r_i - mean r) / std r over the outputs of one question.
Departures: an epsilon joins the denominator, a group whose rewards are all equal gets exactly 0 (it
carries no signal, whatever the rounding), and the division by the standard deviation can be left out
(Dr. GRPO). PPO's advantages are Schulman's generalised advantage estimates (arXiv 1506.02438, eq. 16) with
gamma = 1. Dims: Q questions, G outputs of one question, T packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from r1mega.config import GRPOConfig
from r1mega.samples import PackedBatch

STD_EPSILON = 1e-6
"""Added to a group's standard deviation. [open]"""


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
        if config.advantage_std != "none":
            deviation = rewards_G.std(correction=int(config.advantage_std == "sample"))
            centred_G = centred_G / (deviation + STD_EPSILON)
        advantages.append(centred_G)
    return advantages, num_zero_std


def outcome_rewards(rewards_S: Tensor, batch: PackedBatch) -> Tensor:
    """[T]: a sequence's reward at its last token and 0 elsewhere. Padding's must be 0."""
    rewards_T = rewards_S.new_zeros(len(batch.tokens_T))
    rewards_T[batch.cu_seqlens_S[1:].long() - 1] = rewards_S
    return rewards_T


def gae(rewards_T: Tensor, values_T: Tensor, batch: PackedBatch, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns the critic learns from, 0 where the loss mask is.

    A_t = sum_k lambda^k delta_(t+k) to the end of the sequence, delta_t = r_t + V_(t+1) - V_t, and R_t = A_t + V_t.
    V_t is the value before the t-th token is predicted; the value after a sequence's last token is 0. The masked-in
    tokens of a sequence must be its last ones (the response). The sum is built in log2(T) steps of double length.
    """
    mask_T, sequence_T = batch.loss_mask_T > 0, batch.sequence_of_T
    values_T = torch.where(mask_T, values_T, torch.zeros_like(values_T))
    advantages_T = torch.where(
        mask_T, rewards_T + _from(values_T, 1, sequence_T) - values_T, torch.zeros_like(values_T)
    )
    reach = 1
    while reach < len(sequence_T) and gae_lambda**reach > 0:
        advantages_T = advantages_T + gae_lambda**reach * _from(advantages_T, reach, sequence_T)
        reach *= 2
    advantages_T = torch.where(mask_T, advantages_T, torch.zeros_like(advantages_T))
    return advantages_T, advantages_T + values_T


def _from(values_T: Tensor, distance: int, sequence_T: Tensor) -> Tensor:
    """The values `distance` tokens later, 0 beyond the sequence's end."""
    later_T = torch.zeros_like(values_T)
    same_T = sequence_T[:-distance] == sequence_T[distance:]
    later_T[:-distance] = values_T[distance:] * same_T
    return later_T


def moments(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """float64 [3]: number, sum and sum of squares of the masked-in values; these add up over chunks and ranks."""
    values_N = values_T[mask_T > 0].double()
    return torch.stack([values_N.new_tensor(len(values_N)), values_N.sum(), values_N.square().sum()])


def whiten(values_T: Tensor, mask_T: Tensor, moments_3: Tensor) -> Tensor:
    """To mean 0 and standard deviation 1 by the moments of a whole rollout; 0 where the mask is."""
    count, total, squares = moments_3.tolist()
    mean = total / max(count, 1)
    deviation = max(squares / max(count, 1) - mean**2, 0.0) ** 0.5
    return (values_T - mean) / (deviation + STD_EPSILON) * (mask_T > 0)


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
