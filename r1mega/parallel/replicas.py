"""Replicas of experts over an expert-parallel group: who sends which expert to whom, and the copies themselves.

Expert e has its home in rank e // (E / ranks), as Megatron divides them; slot p lies in rank p // (P / ranks)
(r1mega_kernels/eplb). A rank sends an expert to another rank once, however many slots the expert has there, and all that
goes from one rank to another is one message. Gradients go the same way back and are summed at home, in float32, the
rank's own slots first and then the other ranks in their order: the same sum in every run.

Dims: P slots, H experts at home here, S slots here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Messages = dict[int, list[int]]
"""Rank -> experts, ascending."""


@dataclass(frozen=True)
class CopyPlan:
    """One rank's part of the copies."""

    num_ranks: int
    homes: range
    """The experts whose home is this rank."""
    slots: list[int]
    """The expert of each slot of this rank."""
    send: Messages
    """What other ranks have slots for."""
    receive: Messages
    """What this rank has slots for, from the experts' homes."""


def copy_plans(expert_of_slot_P: Tensor, num_experts: int, num_ranks: int) -> list[CopyPlan]:
    """Of every rank. Raises ValueError where experts or slots do not divide over the ranks, or an expert has no slot."""
    experts = expert_of_slot_P.tolist()
    for what, number in (("experts", num_experts), ("slots", len(experts))):
        if number % num_ranks:
            raise ValueError(f"{number} {what} do not divide over {num_ranks} ranks")
    missing = sorted(set(range(num_experts)) - set(experts))
    strange = sorted(set(experts) - set(range(num_experts)))
    if missing or strange:
        raise ValueError(f"experts {missing} have no slot, slots name experts {strange} of {num_experts}")
    at_home, per_rank = num_experts // num_ranks, len(experts) // num_ranks
    slots = [experts[rank * per_rank : (rank + 1) * per_rank] for rank in range(num_ranks)]
    receive: list[Messages] = [{} for _ in range(num_ranks)]
    send: list[Messages] = [{} for _ in range(num_ranks)]
    for rank in range(num_ranks):
        for expert in sorted(set(slots[rank])):
            home = expert // at_home
            if home != rank:
                receive[rank].setdefault(home, []).append(expert)
                send[home].setdefault(rank, []).append(expert)
    return [
        CopyPlan(
            num_ranks, range(rank * at_home, (rank + 1) * at_home), slots[rank], send[rank], receive[rank]
        )
        for rank in range(num_ranks)
    ]


def replicate(weights: tuple[Tensor, ...], plan: CopyPlan, group: Any) -> tuple[Tensor, ...]:
    """Each [H, ...] of the experts at home -> [S, ...] of the slots here. Collective over `group`, backward too."""
    if weights[0].shape[0] != len(plan.homes):
        raise ValueError(f"{weights[0].shape[0]} experts at home, the plan has {len(plan.homes)}")
    return _Replicate.apply(plan, group, *weights)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: CopyPlan, group: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.group = plan, group
        outgoing = {
            rank: [weight[_places(experts, plan)] for weight in weights]
            for rank, experts in plan.send.items()
        }
        incoming = {
            rank: [weight.new_empty(len(experts), *weight.shape[1:]) for weight in weights]
            for rank, experts in plan.receive.items()
        }
        _exchange(outgoing, incoming, group)
        result = []
        for number, weight in enumerate(weights):
            slots = weight.new_empty(len(plan.slots), *weight.shape[1:])
            for place, expert in enumerate(plan.slots):
                if expert in plan.homes:
                    slots[place] = weight[expert - plan.homes.start]
                else:
                    home = expert // len(plan.homes)
                    slots[place] = incoming[home][number][plan.receive[home].index(expert)]
            result.append(slots)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: CopyPlan = ctx.plan
        outgoing = {
            rank: [_sum_of_slots(gradient, experts, plan) for gradient in gradients]
            for rank, experts in plan.receive.items()
        }
        incoming = {
            rank: [
                gradient.new_empty(len(experts), *gradient.shape[1:], dtype=torch.float32)
                for gradient in gradients
            ]
            for rank, experts in plan.send.items()
        }
        _exchange(outgoing, incoming, ctx.group)
        result = []
        for number, gradient in enumerate(gradients):
            total = _sum_of_slots(gradient, list(plan.homes), plan)
            for rank in sorted(plan.send):
                total[_places(plan.send[rank], plan)] += incoming[rank][number]
            result.append(total.to(gradient.dtype))
        return None, None, *result


def _places(experts: list[int], plan: CopyPlan) -> list[int]:
    return [expert - plan.homes.start for expert in experts]


def _sum_of_slots(gradient_S: Tensor, experts: list[int], plan: CopyPlan) -> Tensor:
    """float32, for each of the experts: over its slots here, in their order."""
    total = gradient_S.new_zeros(len(experts), *gradient_S.shape[1:], dtype=torch.float32)
    for place, expert in enumerate(plan.slots):
        if expert in experts:
            total[experts.index(expert)] += gradient_S[place]
    return total


def _exchange(outgoing: dict[int, list[Tensor]], incoming: dict[int, list[Tensor]], group: Any) -> None:
    """One message a tensor and a pair of ranks, all of them under way at once."""
    operations = [
        dist.P2POp(send, tensor, dist.get_global_rank(group, rank), group)
        for send, messages in ((dist.isend, outgoing), (dist.irecv, incoming))
        for rank, tensors in sorted(messages.items())
        for tensor in tensors
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
