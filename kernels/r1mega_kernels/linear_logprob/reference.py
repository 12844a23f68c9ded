"""The definition of linear_logprob in plain torch: it keeps every logit and leaves the gradient to autograd.

Dims: T packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob_reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row of softmax(hidden @ weight.T / temperature).

    hidden_TD [T, D] and weight_VD [V, D] of any float dtype, targets_T int64 [T] in [0, V). Computes in
    float64 where an input is float64, else in float32; both results [T] have that dtype. One process, whole
    vocabulary.
    """
    dtype = torch.promote_types(torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32)
    logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T / temperature
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T
