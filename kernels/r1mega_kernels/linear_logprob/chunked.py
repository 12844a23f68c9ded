"""linear_logprob in plain torch, a few tokens at a time: what runs on CPU.

Logits exist only for one chunk of tokens. The backward recomputes them, except where all of them together
are small (a tiny vocabulary): then the forward keeps e^(z-m) and z-m, which saves the second product.

Arithmetic is float32 (float64 for float64 inputs), whatever the inputs' dtype.
Dims: T packed tokens, V vocabulary (of this shard), D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega_kernels.linear_logprob.partials import SoftmaxPartials

CHUNK_LOGITS = 2**20
"""Logits computed at once: 4 MiB, about one core's cache."""
KEPT_LOGITS = 2**23
"""Up to this many logits in the whole batch (2 x 32 MiB) are kept for the backward."""


@dataclass(frozen=True)
class KeptChunk:
    """Softmax of one chunk of tokens, up to a factor per row."""

    exp_TV: Tensor
    """e^(z-m), m the maximum of the row's part of the vocabulary."""
    shifted_TV: Tensor
    """z - m."""


def compute_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32)


def partials(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float, *, keep: bool
) -> tuple[SoftmaxPartials, list[KeptChunk] | None]:
    """This shard's contribution, and the softmax to hand to `gradients` if keep is set and it is small.

    targets_T count from the shard's first row and may lie outside it.
    """
    num_tokens, num_rows = len(hidden_TD), len(weight_VD)
    dtype = compute_dtype(hidden_TD, weight_VD)
    results_4T = torch.zeros(4, num_tokens, dtype=dtype)
    results_4T[0].fill_(-torch.inf)
    kept: list[KeptChunk] | None = [] if keep and num_tokens * num_rows <= KEPT_LOGITS else None
    if num_rows == 0:
        return SoftmaxPartials(*results_4T.unbind(0)), None
    inside_T = (targets_T >= 0) & (targets_T < num_rows)
    columns_T1 = targets_T.clamp(0, num_rows - 1)[:, None]
    weight_VD = weight_VD.to(dtype)
    for rows in _chunks(num_tokens, num_rows):
        logits_TV = _logits(hidden_TD[rows], weight_VD, temperature)
        max_T = logits_TV.amax(dim=1)
        target_T = logits_TV.gather(1, columns_T1[rows]).squeeze(1)
        shifted_TV = logits_TV.sub_(max_T[:, None])
        exp_TV = shifted_TV.exp()
        results_4T[0, rows] = max_T
        results_4T[1, rows] = exp_TV.sum(dim=1)
        results_4T[2, rows] = torch.linalg.vecdot(exp_TV, shifted_TV)
        results_4T[3, rows] = torch.where(inside_T[rows], target_T, 0.0)
        if kept is not None:
            kept.append(KeptChunk(exp_TV, shifted_TV))
    return SoftmaxPartials(*results_4T.unbind(0)), kept


def gradients(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    lse_T: Tensor,
    entropy_T: Tensor,
    grad_logprobs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    kept: list[KeptChunk] | None,
    max_T: Tensor,
    needs: tuple[bool, bool],
) -> Iterator[Tensor | None]:
    """Yields d_hidden [T, D] of this shard alone, then d_weight [V, D]; None where not needed.

    d z_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy), g and h the incoming gradients of log-prob
    and entropy. max_T is the shard's own maximum, to which kept chunks are relative.
    """


def _logits(hidden_TD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_TV = F.linear(hidden_TD.to(weight_VD.dtype), weight_VD)
    return logits_TV if temperature == 1.0 else logits_TV.div_(temperature)


def _chunks(num_tokens: int, num_rows: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // max(1, num_rows))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))
