"""This project's placement of expert replicas (r1mega_kernels/eplb) as vLLM's EPLB policy, and weight sync beside it.

vLLM balances experts itself where `enable_eplb` is set: it counts loads, asks a policy for a placement, and moves weights.
Its one policy is named "default"; `install` puts this one in its place.

Its weight loader, however, knows only the placement that a model starts with, and writes expert e into every slot that had
e then. A sync therefore begins by declaring that placement to be the present one (all experts are about to be overwritten,
so nothing moves), and ends by moving the loaded weights to where they were.

Imported in vLLM's workers only. Never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.eplb.eplb_state import EplbModelState, EplbState, _commit_eplb_maps
from vllm.distributed.eplb.policy import EPLB_POLICIES, DefaultEplbPolicy
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

from r1mega_kernels.eplb import rebalance_experts


class HotExpertsPolicy(DefaultEplbPolicy):
    """Never a heavier GPU than vLLM's own policy has; every expert keeps a replica in its group's node."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Tensor | None = None,
    ) -> Tensor:
        """weight: loads [layers, experts]. Returns int64 [layers, num_replicas], the expert of each slot, on the CPU.

        Experts that stay on a GPU keep their slots there where old_global_expert_indices says what the slots held.
        """
        placement = rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, "across_nodes")
        expert_of_slot: np.ndarray = placement.expert_of_slot_LP.numpy()
        if old_global_expert_indices is not None and old_global_expert_indices.shape == expert_of_slot.shape:
            expert_of_slot = cls.preserve_intragpu_slots(
                expert_of_slot, num_ranks, old_global_expert_indices.cpu().numpy()
            )
        return torch.from_numpy(expert_of_slot)


def install() -> None:
    """Let vLLM's EPLB use this policy; before its model is loaded."""
    EPLB_POLICIES["default"] = HotExpertsPolicy


def loading_order(state: EplbModelState) -> Tensor:
    """int64 [layers, slots]: the placement that vLLM's weight loader writes."""
    layers, slots = state.physical_to_logical_map.shape
    experts = state.logical_to_physical_map.shape[1]
    row = EplbState.build_initial_global_physical_to_logical_map(experts, slots - experts)
    return torch.tensor(row).expand(layers, -1).contiguous()


def begin_loading(states: Iterable[EplbModelState]) -> list[Tensor]:
    """Call it before a weight sync; returns the present placements, for `finish_loading`."""
    former = []
    for state in states:
        former.append(state.physical_to_logical_map.cpu().clone())
        _commit_eplb_maps(state, loading_order(state))
    return former


def finish_loading(states: Iterable[EplbModelState], former: list[Tensor], group: Any) -> None:
    """Move what was loaded to the placements of before. Collective over `group`, the expert-parallel ranks."""
    for state, expert_of_slot in zip(states, former, strict=True):
        rearrange_expert_weights_inplace(
            loading_order(state),
            expert_of_slot,
            state.model.expert_weights,
            state.expert_buffer,
            group,
            state.communicator,
        )
        _commit_eplb_maps(state, expert_of_slot)
