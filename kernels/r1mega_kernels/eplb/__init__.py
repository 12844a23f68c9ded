"""Expert-parallel load balancing: which experts get replicas, and on which GPU every replica lies.

`rebalance_experts` is DeepSeek's published algorithm (https://github.com/deepseek-ai/EPLB), written anew in C++ with
the same results bit for bit; `solver` asks for a placement that is better, and never worse. reference.py is the
algorithm in plain Python.

Dims: L layers, E experts, P slots (physical experts: replicas of all experts, over all GPUs), X the most replicas
that an expert has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1mega_kernels._C import place_experts

SOLVERS = ("published", "within_nodes", "across_nodes")


class Placement(NamedTuple):
    expert_of_slot_LP: Tensor
    """int64: the expert in each slot. Slot p lies on GPU p // (P / GPUs)."""
    slots_LEX: Tensor
    """int64: the slots of each expert, padded with -1."""
    replicas_LE: Tensor
    """int64: how many slots each expert has."""


def rebalance_experts(
    load_LE: Tensor,
    num_slots: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    solver: str = "published",
) -> Placement:
    """load_LE: each expert's load, in any unit; it is spread evenly over the expert's replicas.

    Hierarchical where num_groups is a multiple of num_nodes: the experts of a group (gates limited to some groups) share
    a node. Global otherwise: groups and nodes play no part.

    solver: "published"; "within_nodes", the same rules, with exchanges between GPUs that lighten the heaviest;
    "across_nodes", where every expert keeps a replica in its group's node and its others may lie in any node. The last
    two are the same in the global mode. Equal loads: the lowest index first (the published code leaves the order of
    equal experts to torch.sort, which is the same wherever that sort is stable).

    Raises ValueError for loads that are negative, infinite or NaN, and for numbers that do not divide.
    """
    load_LE = load_LE.detach().to("cpu", torch.float32).contiguous()
    groups, nodes = (num_groups, num_nodes) if _is_hierarchical(num_groups, num_nodes) else (1, 1)
    _check(load_LE, num_slots, groups, nodes, num_gpus, solver)
    group_load_LG = load_LE.unflatten(1, (groups, -1)).sum(-1)  # torch's own order of summation
    expert_of_slot, replica_of_slot, replicas = (
        torch.from_numpy(array)
        for array in place_experts(load_LE.numpy(), group_load_LG.numpy(), num_slots, nodes, num_gpus, solver)
    )
    return Placement(expert_of_slot, slots_of_experts(expert_of_slot, replica_of_slot, replicas), replicas)


def slots_of_experts(expert_of_slot_LP: Tensor, replica_of_slot_LP: Tensor, replicas_LE: Tensor) -> Tensor:
    """int64 [L, E, X], padded with -1: the slot of each expert's first, second, ... replica."""
    layers, num_slots = expert_of_slot_LP.shape
    most = int(replicas_LE.max()) if replicas_LE.numel() else 0
    slots_LEX = torch.full((layers, replicas_LE.shape[1], most), -1)
    place_LP = expert_of_slot_LP * most + replica_of_slot_LP
    slots_LEX.view(layers, -1).scatter_(1, place_LP, torch.arange(num_slots).expand(layers, -1))
    return slots_LEX


def gpu_loads(load_LE: Tensor, placement: Placement, num_gpus: int) -> Tensor:
    """float64 [L, GPUs]: the load of each GPU."""
    share_LE = load_LE.double().cpu() / placement.replicas_LE
    return share_LE.gather(1, placement.expert_of_slot_LP).unflatten(1, (num_gpus, -1)).sum(-1)


def imbalance(load_LE: Tensor, placement: Placement, num_gpus: int) -> Tensor:
    """float64 [L]: load of the heaviest GPU over the mean; 1 is perfect, and that of a layer without load."""
    loads = gpu_loads(load_LE, placement, num_gpus)
    heaviest, mean = loads.max(dim=1).values, loads.mean(dim=1)
    return torch.where(mean > 0, heaviest / mean, 1.0)


def _is_hierarchical(groups: int, nodes: int) -> bool:
    return nodes > 0 and groups % nodes == 0


def _check(load_LE: Tensor, slots: int, groups: int, nodes: int, gpus: int, solver: str) -> None:
    if load_LE.dim() != 2 or load_LE.shape[1] == 0:
        raise ValueError(f"loads of shape {tuple(load_LE.shape)}: they are [layers, experts]")
    experts = load_LE.shape[1]
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown: take one of {', '.join(SOLVERS)}")
    for name, value in (("num_slots", slots), ("num_groups", groups), ("num_gpus", gpus)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if slots < experts:
        raise ValueError(f"{slots} slots hold no {experts} experts: num_slots must be at least {experts}")
    for what, value, by, parts in (
        ("slots", slots, "GPUs", gpus),
        ("experts", experts, "groups", groups),
        ("GPUs", gpus, "nodes", nodes),
    ):
        if value % parts:
            raise ValueError(f"{value} {what} do not divide into {parts} {by}")
    bad = ~(torch.isfinite(load_LE) & (load_LE >= 0))
    if bad.any():
        layer, expert = bad.nonzero()[0].tolist()
        raise ValueError(f"layer {layer}, expert {expert}: load {load_LE[layer, expert].item()} is no load")
