"""EPLB in plain Python: the published algorithm, one layer at a time, and bounds that no placement can undercut.

The algorithm (https://github.com/deepseek-ai/EPLB, README and DeepSeek-V3, section 3.4): (1) pack the groups of experts
into nodes, equally many in each; (2) in every node, give one redundant slot after another to the expert with the
largest load per replica; (3) pack the node's replicas into its GPUs, equally many in each. Packing takes the heaviest
first and puts it into the lightest bin that is not full. All arithmetic is float32; the lowest index wins ties.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def balanced_packing(weights: np.ndarray, bins: int) -> list[tuple[int, int]]:
    """(bin, place in the bin) of every item."""
    capacity = len(weights) // bins
    if capacity == 1:
        return [(item, 0) for item in range(len(weights))]
    filled, total = [0] * bins, [np.float32(0)] * bins
    result = [(-1, -1)] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((b for b in range(bins) if filled[b] < capacity), key=lambda b: total[b])
        result[item] = (lightest, filled[lightest])
        filled[lightest] += 1
        total[lightest] += weights[item]
    return result


def replicate_experts(weights: np.ndarray, slots: int) -> tuple[list[int], list[int], list[int]]:
    """(expert of each slot, which of the expert's replicas it is, replicas of each expert)."""
    expert, replica, count = list(range(len(weights))), [0] * len(weights), [1] * len(weights)
    while len(expert) < slots:
        hottest = max(range(len(weights)), key=lambda e: weights[e] / np.float32(count[e]))
        expert.append(hottest)
        replica.append(count[hottest])
        count[hottest] += 1
    return expert, replica, count


def rebalance_layer(
    load_E: Tensor, slots: int, groups: int, nodes: int, gpus: int
) -> tuple[list, list, list]:
    """(expert of each slot, which replica it is, replicas of each expert) of one layer; load_E: float32."""
    if groups % nodes:
        groups, nodes = 1, 1
    size, per_node, per_gpu = len(load_E) // groups, slots // nodes, slots // gpus
    place_of_group = balanced_packing(load_E.view(groups, size).sum(-1).numpy(), nodes)
    load = load_E.numpy()
    expert_of_slot, replica_of_slot, replicas = [-1] * slots, [-1] * slots, [-1] * len(load)
    for node in range(nodes):
        here = sorted((place, group) for group, (at, place) in enumerate(place_of_group) if at == node)
        experts = [group * size + i for _, group in here for i in range(size)]
        expert, replica, count = replicate_experts(load[experts], per_node)
        share = np.array([load[experts[e]] / np.float32(count[e]) for e in expert])
        for item, (gpu, place) in enumerate(balanced_packing(share, gpus // nodes)):
            slot = node * per_node + gpu * per_gpu + place
            expert_of_slot[slot], replica_of_slot[slot] = experts[expert[item]], replica[item]
        for e, number in zip(experts, count, strict=True):
            replicas[e] = number
    return expert_of_slot, replica_of_slot, replicas


def rebalance_experts(load_LE: Tensor, slots: int, groups: int, nodes: int, gpus: int) -> tuple[Tensor, ...]:
    """The same for all layers: int64 [L, slots], [L, slots], [L, E]."""
    layers = [rebalance_layer(load_E, slots, groups, nodes, gpus) for load_E in load_LE.float()]
    return tuple(torch.tensor(part) for part in zip(*layers, strict=True))


def lower_bound(load_LE: Tensor, slots: int, gpus: int) -> Tensor:
    """float64 [L]: no placement has a smaller load of the heaviest GPU over the mean.

    That is at least 1, and at least the heaviest replica where replicas are given out as well as they can be (step 2).
    """
    bounds = []
    for load_E in load_LE.double():
        mean = float(load_E.sum()) / gpus
        expert, _, count = replicate_experts(load_E.numpy(), slots)
        heaviest = max(float(load_E[e]) / count[e] for e in set(expert))
        bounds.append(max(mean, heaviest) / mean if mean > 0 else 1.0)
    return torch.tensor(bounds, dtype=torch.float64)
