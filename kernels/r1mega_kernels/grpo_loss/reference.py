"""The definition of grpo_loss in plain torch: every logit is kept and the gradient is autograd's.

Dims: T packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1mega_kernels.grpo_loss.objective import MAX_LOG_RATIO, Objective, Tokens
from r1mega_kernels.linear_logprob.reference import linear_logprob_reference


def grpo_loss_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    tokens: Tokens,
    objective: Objective,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprobs_T, entropy_T), as `grpo_loss` gives them; one process, the whole vocabulary."""
    rows = tokens.mask_T.nonzero().squeeze(1)
    logprobs_T, entropy_T = linear_logprob_reference(
        hidden_TD[rows], weight_VD, targets_T[rows], temperature=temperature
    )
    of = tokens.at(rows)
    old_T = logprobs_T.detach() if of.old_logprobs_T is None else of.old_logprobs_T
    ratio_T = (logprobs_T - old_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_T = ratio_T.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    gain_T = torch.minimum(ratio_T * of.advantages_T, clipped_T * of.advantages_T)
    if objective.importance_cap > 0:
        assert of.rollout_logprobs_T is not None
        importance_T = (old_T - of.rollout_logprobs_T).clamp(max=MAX_LOG_RATIO).exp()
        gain_T = gain_T * importance_T.clamp(max=objective.importance_cap)
    token_loss_T = -gain_T - objective.entropy_coef * entropy_T
    if of.reference_logprobs_T is not None and objective.kl_coef > 0:
        d_T = (of.reference_logprobs_T - logprobs_T).clamp(max=MAX_LOG_RATIO)
        token_loss_T = token_loss_T + objective.kl_coef * (d_T.expm1() - d_T)
    loss = (of.weights_T * token_loss_T).sum()
    zeros_T = logprobs_T.new_zeros(len(targets_T))
    return (
        loss,
        zeros_T.index_copy(0, rows, logprobs_T.detach()),
        zeros_T.index_copy(0, rows, entropy_T.detach()),
    )
