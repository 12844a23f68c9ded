"""Routing replay: the policy's gates take the experts that the engines chose while they sampled ("rollout routing replay",
R3: Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers).

Weights and gradients are those of the trainer's own scores of these experts (r1mega_kernels/grouped_topk). Only the layers
of the decoder replay, for the engine runs nothing else: multi-token prediction keeps its own choice.

Dims: T tokens, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from r1mega.models.attention import PackedSequences
from r1mega.models.balance import of_this_rank

if TYPE_CHECKING:
    from r1mega.models.trunk import Trunk


def replay_routing(stages: Iterable[Trunk]) -> None:
    """From now on these stages of a model route as their batches say, with gradients or without."""
    for stage in stages:
        dense = stage.hf_config["first_k_dense_replace"]
        layer: Any
        for number, layer in zip(stage.part.layers, stage.decoder.layers, strict=True):
            if number >= dense:
                layer.mlp.router.replayed = number - dense


def replayed_experts(packed: PackedSequences | None, router: Any) -> Tensor:
    """int64 [T, K]: of the tokens that this router sees. ValueError where the batch does not say."""
    assert packed is not None
    assert packed.batch is not None
    experts_TLK = packed.batch.experts_TLK
    if experts_TLK is None:
        raise ValueError("grpo.routing_replay=true: a packed batch came without its tokens' routed experts")
    return of_this_rank(experts_TLK[:, router.replayed], packed, router).long().contiguous()
