"""How tokens reach their experts: Megatron's dispatchers, sorting tokens by r1mega_kernels.moe_permute.

Megatron's own sort writes a token's outputs back by a scatter whose order a GPU does not fix, and in the outputs' dtype;
here a token gathers its rows, in the order of its experts, and adds them in float32. In float32 on a CPU both give the
same bits. Communication, and the exchange of whole chunks after an all-to-all, are Megatron's.

In fp8 the rows that go to the experts take a byte a value and a scale for each 128 (DeepSeek-V3, section 3.3.2, but
scales are amax / 448, not rounded to powers of two). What comes back, and all gradients, keep the model's dtype.

Dims: T tokens (of this process), E experts, K experts of a token, N rows, D hidden, Q = ceil(D / 128) scales of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from torch import Tensor

from r1mega import platforms
from r1mega_kernels.fp8_block import dequantize_rows
from r1mega_kernels.moe_permute import (
    Permutation,
    indices_of,
    permute,
    permute_fp8,
    permute_values,
    sort_by_expert,
    unpermute,
)


class AllToAll(MoEAlltoAllTokenDispatcher):
    """Every token goes to exactly `moe_router_topk` experts: the number of rows is known without asking the device."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rows_ND, probs_N) for the all-to-all, sorted by expert. routing_map bool and probs: [T, E]."""
        self.hidden_shape, self.routing_map, self.probs = hidden_states.shape, routing_map, probs
        tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        counts_E = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts_E)
        indices_TK = indices_of(routing_map, self.config.moe_router_topk)
        self.permutation = sort_by_expert(indices_TK, self.num_experts)
        probs_TK = probs.gather(1, indices_TK.long())
        return self.rows_of(tokens_TD), permute_values(probs_TK, self.permutation)

    def rows_of(self, tokens_TD: Tensor) -> Tensor:
        return permute(tokens_TD, self.permutation)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Each token's sum over its experts, in the shape that the hidden states had."""
        return unpermute(permutated_local_input_tokens, self.permutation).view(self.hidden_shape)


class AllToAllFloat8(AllToAll):
    """The same, of tokens rounded to fp8. Autograd knows no gradient of an fp8 tensor in another dtype, so the rows travel
    beside it, and it follows a stand-in of their shape that takes no memory."""

    def rows_of(self, tokens_TD: Tensor) -> Tensor:
        stand_in_ND, self.rows_ND, self.scale_NQ = _Quantized.apply(tokens_TD, self.permutation)
        return stand_in_ND

    def token_dispatch(self, stand_in_ND: Tensor, probs_N: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the experts here, in the dtype that the tokens had, and their probs."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        splits = self.output_splits, self.input_splits
        rows_ND = _Dispatched.apply(stand_in_ND, self.rows_ND, self.scale_NQ, self.ep_group, *splits)
        del self.rows_ND, self.scale_NQ
        return rows_ND, all_to_all(self.ep_group, probs_N, *splits)


class _Quantized(torch.autograd.Function):
    """tokens_TD -> (the stand-in, rows_ND in fp8, scale_NQ). Rounding counts as the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor, Tensor]:
        ctx.permutation = permutation
        rows_ND, scale_NQ = permute_fp8(tokens_TD, permutation)
        ctx.mark_non_differentiable(rows_ND, scale_NQ)
        return tokens_TD.new_zeros(()).expand(rows_ND.shape), rows_ND, scale_NQ

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor, *_: Any) -> tuple[Tensor, None]:
        return unpermute(gradient_ND.contiguous(), ctx.permutation), None


class _Dispatched(torch.autograd.Function):
    """Rows and scales to the experts' processes; gradients back, in the stand-in's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        stand_in_ND: Tensor,
        rows_ND: Tensor,
        scale_NQ: Tensor,
        group: Any,
        arriving: Any,
        leaving: Any,
    ) -> Tensor:
        ctx.way_back = group, leaving, arriving
        platforms.keep_for_this_stream(rows_ND, scale_NQ)  # overlapped, this is not the stream that made them
        bytes_ND = all_to_all(group, rows_ND.view(torch.uint8), arriving, leaving)
        scale_NQ = all_to_all(group, scale_NQ, arriving, leaving)
        return dequantize_rows(bytes_ND.view(rows_ND.dtype), scale_NQ, stand_in_ND.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        group, arriving, leaving = ctx.way_back
        return all_to_all(group, gradient_ND, arriving, leaving), None, None, None, None, None


class AllGather(MoEAllGatherTokenDispatcher):
    """Every rank has all tokens and takes those of its experts."""

    routing_map: Tensor | None

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows_ND, tokens per local expert on the host, probs_N). hidden_states [T, D] and probs [T, E] of all."""
        assert self.routing_map is not None
        first, num_local = self.local_expert_indices[0], self.num_local_experts
        map_TE = self.routing_map[:, first : first + num_local].contiguous()
        counts_E = map_TE.sum(dim=0).cpu()
        indices_TK = indices_of(map_TE, min(self.router_topk, num_local))
        self.permutation = sort_by_expert(indices_TK, num_local, num_rows=int(counts_E.sum()))
        self.local_probs = probs[:, first : first + num_local]
        probs_TK = self.local_probs.gather(1, indices_TK.long().clamp(min=0))
        self.routing_map = None
        return permute(hidden_states, self.permutation), counts_E, permute_values(probs_TK, self.permutation)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return unpermute(hidden_states, self.permutation)


DISPATCHERS: dict[str, Any] = {"alltoall": AllToAll, "alltoall_fp8": AllToAllFloat8, "allgather": AllGather}
"""By `parallel.dispatcher`."""


def replace_dispatchers(model: torch.nn.Module) -> None:
    """Megatron's MoE layer names its dispatchers itself and offers no place to pass one."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            given = layer.token_dispatcher
            groups = ProcessGroupCollection(
                ep=given.ep_group, expt_tp=given.tp_group, tp_ep=given.tp_ep_group
            )
            own = DISPATCHERS[layer.config.dispatcher]
            layer.token_dispatcher = own(
                layer.num_local_experts, layer.local_expert_indices, layer.config, groups
            )
