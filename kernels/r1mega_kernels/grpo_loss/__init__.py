"""grpo_loss: hidden states x LM head -> GRPO's loss and its gradients, in one pass of three matrix products.

- reference.py: the definition, in plain torch
- objective.py: the loss of a token as a function of its own log-prob, with the slope
- one_pass.py: the pass; logit_rows.py: what happens to a chunk of logits on CPU; kernel.py: on a GPU, in Triton

linear_logprob recomputes logits in its backward: four products. Here old and reference log-probs, advantages
and mask are inputs, so a row's gradient is known as soon as its log-prob is. Ratios per sequence (GSPO) need
a whole sequence's log-probs first: they take linear_logprob and four products.
Dims: T packed tokens, V rows of this process's vocabulary shard, D hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega_kernels.grpo_loss import one_pass
from r1mega_kernels.grpo_loss.objective import Objective, Tokens
from r1mega_kernels.grpo_loss.reference import grpo_loss_reference
from r1mega_kernels.linear_logprob import check_tensors, columns_of

__all__ = ["Objective", "Tokens", "grpo_loss", "grpo_loss_reference"]


def grpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    tokens: Tokens,
    objective: Objective,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    main_grad_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprobs_T, entropy_T): the objective's sum over tokens, and what it was computed from.

    hidden_TD, weight_VD, targets_T, temperature, group, vocab_start, vocab_size: as linear_logprob's, and so are the
    log-probs and entropies; both are 0 where tokens.mask_T is false, and carry no gradient. loss is a float32 scalar
    (float64 for float64 inputs), differentiable in hidden and weight. Gradients are computed *here*, not in
    the backward, which only scales them: call it under no_grad where none is wanted.

    main_grad_VD: [V, D], contiguous, float32 (float64 for float64 inputs): d_weight is added to it at once, for a backward
    whose incoming gradient is 1, and autograd gets none for the weight. It is Megatron's `weight.main_grad`, to be
    zeroed before the forward; `grad_added_to_main_grad` stays as it is, because it would discard the gradients of
    the weight's other uses (a tied embedding, multi-token prediction).

    Raises ValueError for what cannot be, as linear_logprob does, and for main_grad_VD and tokens that do not fit.
    """
    check_tensors(hidden_TD, weight_VD, targets_T)
    num_rows = columns_of(weight_VD, targets_T, temperature, group, vocab_start, vocab_size)
    _check_tokens(tokens, hidden_TD, objective)
    wanted = torch.is_grad_enabled()
    needs = (wanted and hidden_TD.requires_grad, wanted and weight_VD.requires_grad)
    if main_grad_VD is not None:
        _check_main_grad(main_grad_VD, weight_VD)
    return _GRPOLoss.apply(
        hidden_TD,
        weight_VD,
        targets_T - vocab_start,
        tokens,
        objective,
        temperature,
        group,
        num_rows,
        main_grad_VD,
        needs,
    )


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        tokens: Tokens,
        objective: Objective,
        temperature: float,
        group: dist.ProcessGroup | None,
        num_rows: int,
        main_grad_VD: Tensor | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = needs
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        d_weight_VD = None
        if needs_weight:
            d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if main_grad_VD is None else main_grad_VD
        found = one_pass.run(
            hidden_TD,
            weight_VD[:num_rows],
            targets_T,
            tokens,
            objective,
            temperature,
            group,
            needs_hidden=needs_hidden,
            d_weight_VD=None if d_weight_VD is None else d_weight_VD[:num_rows],
        )
        d_hidden_TD = found.d_hidden_TD
        if d_hidden_TD is not None and group is not None and group.size() > 1:
            dist.all_reduce(d_hidden_TD, group=group)
        ctx.in_main_grad = main_grad_VD is not None
        ctx.gradients = d_hidden_TD, None if d_weight_VD is None or ctx.in_main_grad else d_weight_VD
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(found.logprobs_T, found.entropy_T)
        return found.loss.to(dtype), found.logprobs_T, found.entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_main_grad:
            _check_unscaled(grad_loss)
        d_hidden_TD, d_weight_VD = ctx.gradients
        if (
            grad_loss.device.type != "cpu" or grad_loss != 1
        ):  # on a GPU the question would wait for the device
            d_hidden_TD = None if d_hidden_TD is None else d_hidden_TD * grad_loss.to(d_hidden_TD.dtype)
            d_weight_VD = None if d_weight_VD is None else d_weight_VD * grad_loss
        d_weight_VD = None if d_weight_VD is None else d_weight_VD.to(ctx.weight_dtype)
        return d_hidden_TD, d_weight_VD, *(None,) * 8


def _check_unscaled(grad_loss: Tensor) -> None:
    if grad_loss.device.type != "cpu":
        torch._assert_async(
            grad_loss == 1, "grpo_loss: d_weight is in main_grad already; do not scale the loss"
        )
    elif grad_loss != 1:
        raise ValueError(
            f"the loss's incoming gradient is {float(grad_loss)}, but d_weight was added to main_grad_VD for 1:"
            " scale tokens.weights_T instead of the loss"
        )


def _check_tokens(tokens: Tokens, hidden_TD: Tensor, objective: Objective) -> None:
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    for name, values in vars(tokens).items():
        if values is None:
            continue
        if values.shape != hidden_TD.shape[:1] or values.device != hidden_TD.device:
            raise ValueError(
                f"tokens.{name} is {list(values.shape)} on {values.device}, "
                f"hidden {list(hidden_TD.shape)} on {hidden_TD.device}"
            )
        wanted = torch.bool if name == "mask_T" else dtype
        if values.dtype != wanted:
            raise ValueError(
                f"tokens.{name} is {values.dtype}; with hidden {hidden_TD.dtype} it must be {wanted}"
            )
    if objective.importance_cap > 0 and tokens.rollout_logprobs_T is None:
        raise ValueError(f"importance_cap is {objective.importance_cap}: it needs tokens.rollout_logprobs_T")
    for name, value in vars(objective).items():
        if not (math.isfinite(value) and (value >= 0 or name == "entropy_coef")):
            raise ValueError(f"{name} is {value}; it must be finite and not negative")


def _check_main_grad(main_grad_VD: Tensor, weight_VD: Tensor) -> None:
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    if (
        main_grad_VD.shape != weight_VD.shape
        or main_grad_VD.dtype != dtype
        or main_grad_VD.device != weight_VD.device
        or not main_grad_VD.is_contiguous()
    ):
        raise ValueError(
            f"main_grad is {list(main_grad_VD.shape)} {main_grad_VD.dtype} on {main_grad_VD.device} with strides "
            f"{main_grad_VD.stride()}, weight {list(weight_VD.shape)} on {weight_VD.device}: it must be contiguous {dtype}"
        )
