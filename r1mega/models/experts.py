"""Routed experts as two stacked weights and grouped matrix products, and the gate that routes to them.

The gate is V3's (eq. 12-16; r1mega_kernels/grouped_topk). Megatron sums the largest top-k / group-k scores of a
group, which is V3's rule only where that quotient is two, and always normalises the weights.

Dims: T tokens (of this process), E experts (here), P slots of replicas or else experts, K experts of a token, N token-expert
pairs, D hidden, I expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from r1mega.models.attention import PackedSequences
from r1mega.models.balance import real_tokens, sequences, with_balance_loss
from r1mega.models.replay import replayed_experts
from r1mega.parallel.weight_gradients import collector_of
from r1mega.platforms import parameter_device
from r1mega_kernels.grouped_topk import Replicas, grouped_topk


class GroupedExperts(MegatronModule):
    """SwiGLU experts of one process. Checkpoints are interchangeable with Megatron's SequentialMLP.

    Its weights are marked `allreduce=False`: experts have a data axis of their own, also where the expert
    axis has one rank (Megatron then takes them for dense parameters and, with a tensor axis, silently leaves
    their gradients unreduced).
    """

    def __init__(
        self, num_local_experts: int, config: Any, submodules: Any = None, pg_collection: Any = None
    ) -> None:
        super().__init__(config=config)
        self.expert_group, self.expert_data_group = pg_collection.ep, pg_collection.expt_dp
        self.expert_tensor_group = pg_collection.expt_tp
        hidden = config.moe_ffn_hidden_size // self.expert_tensor_group.size()
        options = {"dtype": config.params_dtype, "device": parameter_device()}
        self.gate_up_EID = torch.nn.Parameter(
            torch.empty(num_local_experts, 2 * hidden, config.hidden_size, **options)
        )
        self.down_EDI = torch.nn.Parameter(
            torch.empty(num_local_experts, config.hidden_size, hidden, **options)
        )
        for weight, dim in ((self.gate_up_EID, 1), (self.down_EDI, 2)):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
            weight.allreduce = False  # type: ignore[attr-defined]
        self.weights_of_slots: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
        """Where hot experts have replicas (hot_experts.py): the weights of the experts here -> those of the slots here."""

    def forward(self, tokens_ND: Tensor, tokens_per_expert_E: Tensor, probs_N: Tensor) -> tuple[Tensor, None]:
        """tokens_ND sorted by expert. The result is this expert_tensor rank's share of a sum."""
        weights: tuple[Tensor, ...] = (self.gate_up_EID, self.down_EDI)
        gate_up_EID, down_EDI = weights if self.weights_of_slots is None else self.weights_of_slots(weights)
        if tokens_ND.shape[0] == 0:  # keeps every weight in the graph: a gradient of zero, not a missing one
            return tokens_ND + 0.0 * (gate_up_EID.sum() + down_EDI.sum() + probs_N.sum()), None
        offsets_E = tokens_per_expert_E.to(tokens_ND.device).cumsum(0).to(torch.int32)
        gate_NI, up_NI = _grouped_linear(tokens_ND, gate_up_EID, offsets_E).chunk(2, dim=-1)
        hidden_NI = F.silu(gate_NI) * up_NI * probs_N[:, None].to(tokens_ND.dtype)
        return _grouped_linear(hidden_NI, down_EDI, offsets_E), None

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; there are none here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Keys and global shapes of SequentialMLP: linear_fc1 [E, 2 I, D] (all gates, then all ups) and
        linear_fc2 [E, D, I]."""
        axis = len(sharded_offsets)
        experts = (axis, self.expert_group.rank(), self.expert_group.size())
        rank, size = self.expert_tensor_group.rank(), self.expert_tensor_group.size()
        replica = (0, 0, self.expert_data_group.rank())

        def part(key: str, weight: Tensor, place: tuple[int, int, int], replica_id: Any) -> ShardedTensor:
            offsets = (*sharded_offsets, experts, place)
            return ShardedTensor.from_rank_offsets(
                key, weight, *offsets, replica_id=replica_id, prepend_axis_num=axis
            )

        def divide(key: str, weight: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            assert flattened_range is None
            gate, up = weight.chunk(2, dim=1)
            return [
                part(key, gate, (axis + 1, rank, 2 * size), replica_id),
                part(key, up, (axis + 1, rank + size, 2 * size), replica_id),
            ]

        def join(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, dim=1)

        keys = {name: f"{prefix}experts.{name}.weight" for name in ("linear_fc1", "linear_fc2")}
        down = part(keys["linear_fc2"], self.down_EDI, (axis + 2, rank, size), replica)
        return {
            f"{prefix}gate_up_EID": ShardedTensorFactory(
                keys["linear_fc1"], self.gate_up_EID, divide, join, replica
            ),
            f"{prefix}down_EDI": down,
        }


def _grouped_linear(rows_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """Row n times the weight of its expert: expert e has rows up to offsets_E[e]. Returns [N, O]."""
    return _GroupedLinear.apply(rows_NI, weight_EOI, offsets_E)


class _GroupedLinear(torch.autograd.Function):
    """The weight's gradient can be put off (parallel/weight_gradients.py)."""

    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NI, weight_EOI, offsets_E)
        return _grouped_product(rows_NI, weight_EOI.mT, offsets_E)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_NI, weight_EOI, offsets_E = ctx.saved_tensors
        gradient_NO = gradient_NO.contiguous()

        def weight_gradient() -> Tensor:
            return _grouped_outer_product(rows_NI, gradient_NO, offsets_E)

        gradient_EOI = None
        if ctx.needs_input_grad[1]:
            collector = collector_of(weight_EOI)
            if collector is None:
                gradient_EOI = weight_gradient()
            else:
                collector.add(weight_EOI, weight_gradient)
        return _grouped_product(gradient_NO, weight_EOI, offsets_E), gradient_EOI, None


def _grouped_product(rows_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """[N, O]. torch's grouped product wants every row to start on 16 bytes; odd sizes go one expert at a time."""
    if _is_aligned(rows_NI, *weight_EIO.shape[1:]):
        return torch._grouped_mm(rows_NI, weight_EIO, offs=offsets_E)
    parts = zip(rows_NI.split(_counts(offsets_E)), weight_EIO, strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


def _grouped_outer_product(rows_NI: Tensor, gradient_NO: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, O, I]: for each expert the sum over its rows of gradient x row."""
    if _is_aligned(rows_NI, rows_NI.shape[1], gradient_NO.shape[1]):
        return torch._grouped_mm(rows_NI.mT, gradient_NO, offs=offsets_E).mT
    counts = _counts(offsets_E)
    parts = zip(rows_NI.split(counts), gradient_NO.split(counts), strict=True)
    return torch.stack([gradient.mT @ rows for rows, gradient in parts])


def _is_aligned(tensor: Tensor, *sizes: int) -> bool:
    return all(size * tensor.element_size() % 16 == 0 for size in sizes)


def _counts(offsets_E: Tensor) -> list[int]:
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()


class GroupLimitedRouter(TopKRouter):
    """V3's gate. `config.norm_topk_prob`: whether the chosen weights are divided by their sum; `config.balance_loss`: alpha
    of the sequence-wise balance loss."""

    expert_bias: Tensor
    packed: PackedSequences | None = None
    """The batch whose tokens come next (balance.py)."""
    replicas: Replicas | None = None
    """The slots that hold each expert, where hot experts have replicas (hot_experts.py)."""
    num_slots = 0
    replayed: int | None = None
    """Which of the batch's layers with experts this gate's is, where it takes the experts from there (replay.py)."""
    seen_E: Tensor | None = None
    """int64: how many tokens chose each expert, in passes of any kind, where expert_load.py follows it."""

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """Module.bfloat16() and Module.to(dtype) leave the correction bias float32: it moves by steps of 0.001."""
        exact = self.expert_bias
        super()._apply(function, recurse)
        self.expert_bias = exact.to(self.expert_bias.device)
        return self

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, 1, experts] -> (weights [T, experts], zero where not chosen; chosen, bool [T, experts]).

        With replicas the columns are slots.
        """
        config, packed = self.config, self.packed
        balanced = packed if config.balance_loss and self.training and torch.is_grad_enabled() else None
        logits_TE = logits.view(-1, config.num_moe_experts).float()
        routing = grouped_topk(
            logits_TE,
            self.expert_bias,
            self.topk,
            num_groups=config.moe_router_num_groups or 1,
            kept_groups=config.moe_router_group_topk or 1,
            normalise=config.norm_topk_prob,
            scale=config.moe_router_topk_scaling_factor or 1.0,
            counted_T=None if packed is None else real_tokens(packed, self),
            replay_TK=None if self.replayed is None else replayed_experts(packed, self),
            replicas=self.replicas,
            **({} if balanced is None else sequences(balanced, self)),
        )
        width = config.num_moe_experts if self.replicas is None else self.num_slots
        weight_TP = logits_TE.new_zeros(len(logits_TE), width).scatter(1, routing.slot_TK, routing.weight_TK)
        chosen_TP = torch.zeros_like(weight_TP, dtype=torch.bool).scatter(1, routing.slot_TK, True)
        if balanced is not None:
            weight_TP = with_balance_loss(weight_TP, routing, balanced, self)
        self._apply_expert_bias(routing.load_E[None])  # counts the load, for the bias update
        if self.seen_E is not None:
            self.seen_E += routing.load_E
        return weight_TP, chosen_TP
