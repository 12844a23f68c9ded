"""linear_logprob: hidden states x LM head -> log-prob of each target and entropy, without keeping logits.

- reference.py: the definition, in plain torch
- chunked.py: what runs on CPU; kernel.py: the Triton kernels
- rows.py: the per-row softmax quantities both produce, and their merge over vocabulary shards

Departure from the papers: none; R1 and GRPO only need log pi(o_t | q, o_<t), this is how not to pay for
T x V logits. Dims: T packed tokens, V rows of this process's vocabulary shard, D hidden.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega_kernels.linear_logprob import chunked
from r1mega_kernels.linear_logprob.reference import linear_logprob_reference
from r1mega_kernels.linear_logprob.rows import LogitGradient

__all__ = ["linear_logprob", "linear_logprob_reference"]


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target] and the entropy of that softmax, in nats.

    hidden_TD [T, D], weight_VD [V, D]: contiguous, the same dtype (float64 on CPU only) and device; targets_T int64 [T].
    Returns (logprobs_T, entropy_T), float32 (float64 for float64 inputs), both differentiable in hidden and
    weight. Products and sums accumulate in float32.

    Vocabulary-parallel: weight_VD holds rows vocab_start ... vocab_start + V - 1 and `group` the processes
    that hold the others; hidden_TD, targets_T and the incoming gradients are the same on all of them. d_hidden
    is summed over the group *here* (one all-reduce in hidden's dtype), so a caller that gathers
    sequence-parallel hidden states must not reduce again: tensor_parallel_output_grad=False in Megatron.

    vocab_size: the real size of the whole vocabulary where the weight is padded beyond it: rows from
    vocab_size on count as logits of -inf and get zero gradient.

    Raises ValueError for what cannot be: shapes, dtypes, devices, layout, temperature, and, on CPU, targets
    outside the vocabulary (on a GPU that check would wait for the device).
    """
    check_tensors(hidden_TD, weight_VD, targets_T)
    num_rows = columns_of(weight_VD, targets_T, temperature, group, vocab_start, vocab_size)
    return _LinearLogprob.apply(hidden_TD, weight_VD, targets_T - vocab_start, temperature, group, num_rows)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        num_rows: int,
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        implementation = _implementation(hidden_TD)
        partials, kept = implementation.forward(
            hidden_TD, weight_VD[:num_rows], targets_T, temperature, keep=keep
        )
        logprobs_T, entropy_T, lse_T = partials.merged_over(group).finish()
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse_T, entropy_T)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.group, ctx.num_rows, ctx.kept = temperature, group, num_rows, kept
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, lse_T, entropy_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        gradient = LogitGradient.of(grad_logprobs_T, grad_entropy_T, lse_T, entropy_T, ctx.temperature)
        d_hidden_TD, d_weight_VD = _implementation(hidden_TD).backward(
            hidden_TD,
            weight_VD[: ctx.num_rows],
            targets_T,
            ctx.temperature,
            gradient,
            ctx.kept,
            needs_hidden,
            needs_weight,
        )
        if needs_hidden and ctx.group is not None and ctx.group.size() > 1:
            dist.all_reduce(d_hidden_TD, group=ctx.group)
        if needs_weight and ctx.num_rows < len(weight_VD):
            padding = weight_VD.new_zeros(len(weight_VD) - ctx.num_rows, weight_VD.shape[1])
            d_weight_VD = torch.cat([d_weight_VD, padding])
        return d_hidden_TD, d_weight_VD, None, None, None, None


def _implementation(hidden_TD: Tensor) -> ModuleType:
    if hidden_TD.device.type == "cpu":
        return chunked
    from r1mega_kernels.linear_logprob import kernel  # Triton is absent where there is no GPU

    return kernel


def check_tensors(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> None:
    shapes = (
        f"hidden {list(hidden_TD.shape)}, weight {list(weight_VD.shape)}, targets {list(targets_T.shape)}"
    )
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or targets_T.dim() != 1:
        raise ValueError(f"expected hidden [T, D], weight [V, D], targets [T]; got {shapes}")
    if hidden_TD.shape[1] != weight_VD.shape[1] or len(hidden_TD) != len(targets_T):
        raise ValueError(f"shapes do not fit: {shapes}")
    if hidden_TD.dtype != weight_VD.dtype or not hidden_TD.is_floating_point():
        raise ValueError(
            f"hidden is {hidden_TD.dtype}, weight {weight_VD.dtype}; they must be the same float dtype"
        )
    if hidden_TD.dtype not in FLOATS and hidden_TD.device.type != "cpu":
        raise ValueError(f"hidden is {hidden_TD.dtype} on {hidden_TD.device}; GPU kernels take {FLOATS}")
    if targets_T.dtype != torch.int64:
        raise ValueError(f"targets are {targets_T.dtype}; they must be torch.int64")
    if not hidden_TD.device == weight_VD.device == targets_T.device:
        raise ValueError(
            f"hidden is on {hidden_TD.device}, weight on {weight_VD.device}, targets on {targets_T.device}"
        )
    for name, tensor in (("hidden", hidden_TD), ("weight", weight_VD), ("targets", targets_T)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pass {name}.contiguous()")


def columns_of(
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
) -> int:
    """Rows of the weight that are no padding. ValueError as linear_logprob says."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    num_rows = len(weight_VD)
    if vocab_size is not None:
        num_rows = min(max(vocab_size - vocab_start, 0), num_rows)
    alone = group is None or group.size() == 1
    if alone and num_rows == 0:
        raise ValueError(
            f"no vocabulary: weight has {len(weight_VD)} rows from {vocab_start}, vocab_size is {vocab_size}"
        )
    if targets_T.device.type == "cpu":
        end = vocab_start + num_rows if alone else vocab_size
        _check_targets(targets_T, vocab_start if alone else 0, end)
    return num_rows


def _check_targets(targets_T: Tensor, start: int, end: int | None) -> None:
    if len(targets_T) == 0:
        return
    lowest, highest = (int(bound) for bound in targets_T.aminmax())
    if lowest < start or (end is not None and highest >= end):
        limits = f"[{start}, {end})" if end is not None else f"[{start}, ...)"
        raise ValueError(f"targets range from {lowest} to {highest}, the vocabulary is {limits}")
