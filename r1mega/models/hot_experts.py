"""Replicas of hot experts while a model computes: `hot.place()` now and then, `with hot.placed(): ...` around each pass.

Inside, every layer's tokens go to slots instead of experts: the gate names the slot of each token's expert
(r1mega_kernels/grouped_topk), a dispatcher of as many "experts" as there are slots brings the tokens there, and the experts
compute with the weights of their slots, copied from the experts' homes at every forward pass (parallel/replicas.py). What
comes out is the same to rounding; the gradients of replicas return to their homes. Gates, their loads and their biases know
experts only.

Dims: as in r1mega_kernels/eplb and parallel/replicas.py.
"""

from __future__ import annotations

import copy
import itertools
import socket
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from r1mega.models.expert_load import ExpertLoad
from r1mega.parallel.replicas import copy_plans, replicate
from r1mega_kernels.eplb import Placement, rebalance_experts
from r1mega_kernels.grouped_topk import Replicas

WINDOW = 16
"""How many placements ago load still counts."""


class HotExperts:
    """The replicas of one model's busiest experts.

    Passes that are compared with each other (old log-probs and the first update) must have one placement between them: another
    one rounds otherwise. The load is not in checkpoints, so a run that resumes goes on to rounding, not bit for bit.
    """

    def __init__(self, stages: Iterable[torch.nn.Module], replicas: int) -> None:
        """stages: those of this process. replicas: slots of each expert-parallel rank beside its experts' own. Collective."""
        self.stages = list(stages)
        self.layers = expert_layers(self.stages)
        everyone = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self.load = ExpertLoad(self.stages, WINDOW, everyone)
        group = parallel_state.get_expert_model_parallel_group()
        self.replicas, self.num_ranks, self.num_nodes = replicas, group.size(), _nodes(group)
        self.balance: dict[str, tuple[float, int]] = {}
        """Load of the busiest rank over the mean, as the last placement foresaw it: summed over the layers, and their number."""
        self._placement: Placement | None = None

    def place(self) -> None:
        """Anew, by the load of the passes until now. Collective over the ranks that compute the same layers."""
        self.load.observe()
        if not self.layers:
            return
        shares_LE = self.load.shares_LE()
        num_slots = shares_LE.shape[1] + self.replicas * self.num_ranks
        groups = self.layers[0].config.moe_router_num_groups or 1
        self._placement = placement = rebalance_experts(
            shares_LE, num_slots, groups, self.num_nodes, self.num_ranks, solver="across_nodes"
        )
        of_slot_LP = (shares_LE / placement.replicas_LE).gather(1, placement.expert_of_slot_LP)
        self.balance = {
            "without_replicas": self._busiest(shares_LE),
            "with_replicas": self._busiest(of_slot_LP),
        }

    def placed(self) -> AbstractContextManager[None]:
        """Around one pass."""
        if self.layers and self._placement is None:
            self.place()
        return replicated_experts(self.stages, self._placement) if self._placement else nullcontext()

    def _busiest(self, load_LX: Tensor) -> tuple[float, int]:
        of_ranks = load_LX.view(len(load_LX), self.num_ranks, -1).sum(dim=-1)
        return float((of_ranks.amax(dim=-1) / of_ranks.mean(dim=-1).clamp(min=1e-30)).sum()), len(load_LX)


def expert_layers(stages: Iterable[torch.nn.Module]) -> list[MoELayer]:
    """In the order of the layers."""
    return [part for stage in stages for part in stage.modules() if isinstance(part, MoELayer)]


@contextmanager
def replicated_experts(stages: Iterable[torch.nn.Module], placement: Placement) -> Iterator[None]:
    """placement: one row for each expert layer of this process, the same in all its expert-parallel ranks.

    The forward passes inside are collective over the expert-parallel group, and so are their backward passes, which may
    run outside where nothing is recomputed. Every layer holds the weights of its slots only while it computes and, where
    gradients are taken, until its backward pass.
    """
    layers = expert_layers(stages)
    if len(layers) != len(placement.expert_of_slot_LP):
        raise ValueError(
            f"a placement of {len(placement.expert_of_slot_LP)} layers for {len(layers)} expert layers"
        )
    plain = [layer.token_dispatcher for layer in layers]
    try:
        for layer, *parts in zip(layers, *placement, strict=True):
            _install(layer, Placement(*parts))
        yield
    finally:
        for layer, dispatcher in zip(layers, plain, strict=True):
            layer.token_dispatcher = dispatcher
            layer.experts.weights_of_slots = layer.router.replicas = None


def _install(layer: Any, placement: Placement) -> None:
    """placement: of this layer alone."""
    group, config = layer.ep_group, layer.config
    plans = copy_plans(placement.expert_of_slot_LP, config.num_moe_experts, group.size())
    device, num_slots = layer.router.weight.device, len(placement.expert_of_slot_LP)
    layer.router.replicas = Replicas(placement.slots_LEX.to(device), placement.replicas_LE.to(device))
    layer.router.num_slots = num_slots
    layer.token_dispatcher = _dispatcher(layer.token_dispatcher, num_slots, group)
    layer.experts.weights_of_slots = partial(replicate, plan=plans[group.rank()], group=group)


def _dispatcher(plain: Any, num_slots: int, group: Any) -> Any:
    """One like `plain`, for slots."""
    config = copy.copy(plain.config)
    config.num_moe_experts = num_slots
    here = num_slots // group.size()
    groups = SimpleNamespace(ep=plain.ep_group, expt_tp=plain.tp_group, tp_ep=plain.tp_ep_group)
    slots = list(range(group.rank() * here, (group.rank() + 1) * here))
    return type(plain)(here, slots, config=config, pg_collection=groups)


def _nodes(group: Any) -> int:
    """Over how many machines the ranks lie in equal blocks; 1 where they lie otherwise."""
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    blocks = [len(list(block)) for _, block in itertools.groupby(hosts)]
    return len(blocks) if len(set(hosts)) == len(blocks) and len(set(blocks)) == 1 else 1
