"""grouped_topk in plain torch: its definition, and what runs on CPU.

A maximum at a time: torch's takes the first of equal values, where topk takes any, and on CPU K of them are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-20
"""Added to a sum before dividing by it."""


def forward(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    num_groups: int,
    kept_groups: int,
    normalise: bool,
    scale: float,
    counted_T: Tensor | None,
    sequence_T: Tensor | None,
    num_sequences: int,
    replay_TK: Tensor | None,
    table_ER: Tensor | None,
    count_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight_TK, expert_TK (empty if given), slot_TK (empty without replicas), load_E, chosen_SE, share_SE."""
    num_experts = logits_TE.shape[1]
    score_TE = logits_TE.sigmoid()
    expert_TK = replay_TK
    if expert_TK is None:
        biased_TE = score_TE + bias_E
        if kept_groups < num_groups:
            drop_groups_(biased_TE, num_groups, kept_groups)
        expert_TK = best_(biased_TE, top_k)
    weight_TK = score_TE.gather(1, expert_TK)
    if normalise:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + TINY)
    weight_TK = weight_TK * scale
    counted_TK = expert_TK if counted_T is None else expert_TK[counted_T]
    load_E = torch.bincount(counted_TK.flatten(), minlength=num_experts)
    slot_TK = expert_TK.new_empty(0, top_k)
    if table_ER is not None and count_E is not None:
        replica_TK = torch.arange(len(logits_TE), device=logits_TE.device)[:, None] % count_E[expert_TK]
        slot_TK = table_ER[expert_TK, replica_TK]
    chosen_SE, share_SE = expert_TK.new_empty(0, num_experts), score_TE.new_empty(0, num_experts)
    if sequence_T is not None:
        share_TE = score_TE / (score_TE.sum(dim=-1, keepdim=True) + TINY)
        share_SE = score_TE.new_zeros(num_sequences, num_experts).index_add_(0, sequence_T, share_TE)
        place_TK = best_(score_TE, top_k) + sequence_T[:, None] * num_experts
        chosen_SE = torch.bincount(place_TK.flatten(), minlength=num_sequences * num_experts)
        chosen_SE = chosen_SE.view(num_sequences, num_experts)
    expert_TK = expert_TK if replay_TK is None else replay_TK.new_empty(0, top_k)
    return weight_TK, expert_TK, slot_TK, load_E, chosen_SE, share_SE


def backward(
    grad_weight_TK: Tensor,
    grad_share_SE: Tensor | None,
    logits_TE: Tensor,
    expert_TK: Tensor,
    sequence_T: Tensor | None,
    normalise: bool,
    scale: float,
) -> Tensor:
    """d logits. With s the scores, w = scale s / sum(s) and p = s / sum(s):

    ds_k = scale (dw_k - sum_j dw_j s_j / sum(s)) / sum(s),  ds_i += (dp_i - sum_j dp_j p_j) / sum(s).
    """
    score_TK = logits_TE.gather(1, expert_TK).sigmoid_()
    grad_TK = grad_weight_TK
    if normalise:
        sum_T1 = score_TK.sum(dim=-1, keepdim=True) + TINY
        grad_TK = (grad_TK - (grad_TK * score_TK).sum(dim=-1, keepdim=True) / sum_T1) / sum_T1
    grad_TK = grad_TK * (scale * score_TK * (1 - score_TK))
    if grad_share_SE is None or sequence_T is None:
        return torch.zeros_like(logits_TE).scatter_(1, expert_TK, grad_TK)
    score_TE = logits_TE.sigmoid()
    sum_T1 = score_TE.sum(dim=-1, keepdim=True) + TINY
    grad_share_TE = grad_share_SE[sequence_T]
    mean_T1 = (grad_share_TE * score_TE).sum(dim=-1, keepdim=True) / sum_T1
    grad_TE = (grad_share_TE - mean_T1) / sum_T1 * score_TE * (1 - score_TE)
    return grad_TE.scatter_add_(1, expert_TK, grad_TK)


def best_(value_TN: Tensor, count: int) -> Tensor:
    """int64 [T, count]: the places of the largest values, largest first, of equals the first. They become -inf."""
    places = []
    for _ in range(count):
        places.append(value_TN.max(dim=-1, keepdim=True).indices)
        value_TN.scatter_(1, places[-1], float("-inf"))
    return torch.cat(places, dim=1)


def drop_groups_(biased_TE: Tensor, num_groups: int, kept: int) -> None:
    """-inf outside the `kept` groups of largest sum of their two largest scores."""
    biased_TGE = biased_TE.unflatten(1, (num_groups, -1))
    members = biased_TGE.unbind(-1)
    if len(members) <= 2:
        score_TG = members[0] + members[-1] if len(members) == 2 else members[0].clone()
    else:
        rest_TGE = biased_TGE.clone()
        first_TG, place_TG = rest_TGE.max(dim=-1)
        rest_TGE.scatter_(2, place_TG[..., None], float("-inf"))
        score_TG = first_TG + rest_TGE.amax(dim=-1)
    loss_TG = torch.full_like(score_TG, float("-inf")).scatter_(1, best_(score_TG, kept), 0.0)
    for member_TG in members:  # groups of a tiny model are small: faster than one sum with a broadcast
        member_TG += loss_TG
