"""DeepSeek-V3's sequence-wise balance loss (V3 eq. 17-20), on packed sequences divided over any axes.

For a sequence of T tokens: alpha sum_i f_i P_i over the experts, with f_i = E / (K T) times the tokens whose K largest
scores include expert i's, and P_i the mean over tokens of s'_i, a token's scores divided by their sum. The correction bias
and the groups of experts play no part.

A sequence counts with the weight that its tokens have in the batch's loss (samples.py), so the sum over a step is alpha
times a mean over its sequences, in SFT as in RL. All tokens of a sequence count, the prompt's too.

Dims: T tokens of this process, S sequences of the batch, E experts, K chosen.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from r1mega.models.attention import PackedSequences
from r1mega_kernels.grouped_topk import Routing


def tell_routers(model: torch.nn.Module) -> None:
    """Let the routers of the model's layers know which sequences their tokens are of, and which are padding.

    Megatron hands a router nothing but hidden states. It is told at each call of its layer's attention, recomputation and
    layers in pieces (parallel/overlap.py) included, so that micro-batches may follow in any order.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "self_attention") and hasattr(layer.mlp, "router"):
            tell = partial(_tell, layer.mlp.router)
            layer.self_attention.register_forward_pre_hook(tell, with_kwargs=True)


def _tell(router: Any, _attention: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    router.packed = kwargs["packed_seq_params"]


def of_this_rank(values_T: Tensor, packed: PackedSequences, router: Any) -> Tensor:
    """Of what the batch has for each token, the part whose hidden states the router of this process sees."""
    mine = packed.mine(values_T)
    if not router.config.sequence_parallel:
        return mine
    return mine.chunk(router.tp_group.size())[router.tp_group.rank()]


def real_tokens(packed: PackedSequences, router: Any) -> Tensor | None:
    """bool [T]: which tokens are no padding; None: all. How much there is depends on the layout, the load may not."""
    assert packed.batch is not None
    if not packed.batch.num_padding:
        return None
    tokens = packed.batch.tokens_T
    real_T = torch.arange(len(tokens), device=tokens.device) < len(tokens) - packed.batch.num_padding
    return of_this_rank(real_T, packed, router)


def sequences(packed: PackedSequences, router: Any) -> dict[str, Any]:
    """What asks grouped_topk for the statistics of the balance loss."""
    assert packed.batch is not None
    sequence_T = of_this_rank(packed.batch.sequence_of_T, packed, router)
    return {"sequence_T": sequence_T, "num_sequences": packed.batch.num_sequences}


def with_balance_loss(weights: Tensor, routing: Routing, packed: PackedSequences, router: Any) -> Tensor:
    """The gate's weights unchanged; their backward adds the gradient of the balance loss to that of the scores.

    router: Megatron's, for its process groups and settings.
    """
    batch, top_k, alpha = packed.batch, router.topk, router.config.balance_loss
    assert batch is not None
    with torch.no_grad():
        count_SE = routing.chosen_SE.to(routing.share_SE)
        if router.tp_cp_group.size() > 1:
            dist.all_reduce(count_SE, group=router.tp_cp_group)
        length_S = (batch.cu_seqlens_S[1:] - batch.cu_seqlens_S[:-1]).to(count_SE).clamp(min=1)
        weight_S = count_SE.new_zeros(batch.num_sequences)
        weight_S.index_add_(0, batch.sequence_of_T, batch.token_weights_T.to(count_SE))
        experts = count_SE.shape[1]
        factor_SE = (alpha * experts / top_k) * count_SE * (weight_S / length_S.square())[:, None]
    return MoEAuxLossAutoScaler.apply(weights, (factor_SE * routing.share_SE).sum())
