"""Replicas of hot experts while a model computes: `with replicated_experts(stages, placement): ...`.

Inside, every layer's tokens go to slots instead of experts (parallel/replicas.py): the gate's choices are mapped to
slots, a dispatcher of as many "experts" as there are slots brings the tokens there, and the experts compute with the
weights of their slots, copied from the experts' homes at every forward pass. What comes out is the same to rounding; the
gradients of replicas return to their homes. Gates, their loads and their biases know experts only.

Dims: as in r1mega_kernels/eplb and parallel/replicas.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from r1mega.parallel.replicas import copy_plans, on_slots, replicate, slots_of_tokens
from r1mega_kernels.eplb import Placement, rebalance_experts


def place_experts(shares_LE: Tensor, layer: Any, num_slots: int, num_nodes: int) -> Placement:
    """The best placement for these loads over the expert-parallel ranks of `layer`, one of the model's expert layers."""
    groups = layer.config.moe_router_num_groups or 1
    return rebalance_experts(
        shares_LE, num_slots, groups, num_nodes, layer.ep_group.size(), solver="across_nodes"
    )


def expert_layers(stages: Iterable[torch.nn.Module]) -> list[MoELayer]:
    """In the order of the layers."""
    return [part for stage in stages for part in stage.modules() if isinstance(part, MoELayer)]


@contextmanager
def replicated_experts(stages: Iterable[torch.nn.Module], placement: Placement) -> Iterator[None]:
    """placement: one row for each expert layer of this process, the same in all its expert-parallel ranks.

    The forward passes inside are collective over the expert-parallel group, and so are their backward passes, which may
    run outside. Every layer holds the weights of its slots only while it computes and, where gradients are taken, until
    its backward pass.
    """
    layers = expert_layers(stages)
    if len(layers) != len(placement.expert_of_slot_LP):
        raise ValueError(
            f"a placement of {len(placement.expert_of_slot_LP)} layers for {len(layers)} expert layers"
        )
    plain = [layer.token_dispatcher for layer in layers]
    hooks = []
    try:
        for layer, *parts in zip(layers, *placement, strict=True):
            hooks.append(_install(layer, Placement(*parts)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, dispatcher in zip(layers, plain, strict=True):
            layer.token_dispatcher = dispatcher
            layer.experts.weights_of_slots = None


def _install(layer: Any, placement: Placement) -> Any:
    """placement: of this layer alone."""
    group, config = layer.ep_group, layer.config
    plans = copy_plans(placement.expert_of_slot_LP, config.num_moe_experts, group.size())
    plan, num_slots = plans[group.rank()], len(placement.expert_of_slot_LP)
    device = layer.router.weight.device
    slots_EX, replicas_E = placement.slots_LEX.to(device), placement.replicas_LE.to(device)

    def to_slots(_router: Any, _args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slot_TE = slots_of_tokens(slots_EX, replicas_E, output[0].shape[0])
        return on_slots(*output, slot_TE, num_slots)

    layer.token_dispatcher = _dispatcher(layer.token_dispatcher, num_slots, group)
    layer.experts.weights_of_slots = partial(replicate, plan=plan, group=group)
    return layer.router.register_forward_hook(to_slots)


def _dispatcher(plain: Any, num_slots: int, group: Any) -> Any:
    """One like `plain`, for slots."""
    config = copy.copy(plain.config)
    config.num_moe_experts = num_slots
    here = num_slots // group.size()
    groups = SimpleNamespace(ep=plain.ep_group, expt_tp=plain.tp_group, tp_ep=plain.tp_ep_group)
    slots = list(range(group.rank() * here, (group.rank() + 1) * here))
    return type(plain)(here, slots, config=config, pg_collection=groups)
