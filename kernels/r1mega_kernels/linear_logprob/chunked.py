"""linear_logprob in plain torch, some tokens at a time: what runs on CPU.

Logits exist only for one chunk of tokens. The backward recomputes them, except where all of them together
are small (a tiny vocabulary): then the forward keeps e^(z-m) and z-m, which saves the second product.

Arithmetic is float32 (float64 for float64 inputs), whatever the inputs' dtype.
Dims: T packed tokens, V rows of this vocabulary shard, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega_kernels.linear_logprob.rows import LogitGradient, SoftmaxPartials

CHUNK_LOGITS = 2**18
"""Logits computed at once: 1 MiB, about one core's cache ..."""
MIN_CHUNK_TOKENS = 128
"""... unless so few tokens would share one pass over a large vocabulary that the product becomes slow."""
KEPT_LOGITS = 2**23
"""Up to this many logits in the whole batch (2 x 32 MiB) are kept for the backward."""


@dataclass(frozen=True)
class KeptChunk:
    """Softmax of one chunk of tokens, up to a factor per row."""

    max_T: Tensor
    """m: the largest logit of the row in this shard."""
    shifted_TV: Tensor
    """z - m."""
    exp_TV: Tensor
    """e^(z-m)."""


def forward(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float, *, keep: bool
) -> tuple[SoftmaxPartials, list[KeptChunk]]:
    """This shard's partials, and the softmax for `backward` where keep is set and it is small (else []).

    targets_T count from the shard's first row; those outside [0, V) belong to other shards.
    """
    num_tokens, num_rows = len(hidden_TD), len(weight_VD)
    weight_VD = weight_VD.to(_compute_dtype(hidden_TD, weight_VD))
    partials_4T = weight_VD.new_zeros(4, num_tokens)
    partials_4T[0].fill_(-torch.inf)
    kept: list[KeptChunk] = []
    keep = keep and num_tokens * num_rows <= KEPT_LOGITS
    for rows in _chunks(num_tokens, num_rows):
        chunk = _softmax(hidden_TD[rows], weight_VD, temperature)
        inside_T, columns_T1 = _target_columns(targets_T[rows], num_rows)
        target_T = chunk.shifted_TV.gather(1, columns_T1).squeeze(1) + chunk.max_T
        partials_4T[0, rows] = chunk.max_T
        partials_4T[1, rows] = chunk.exp_TV.sum(dim=1)
        partials_4T[2, rows] = torch.linalg.vecdot(chunk.exp_TV, chunk.shifted_TV)
        partials_4T[3, rows] = torch.where(inside_T, target_T, 0.0)
        if keep:
            kept.append(chunk)
    return SoftmaxPartials(*partials_4T.unbind(0)), kept


def backward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    gradient: LogitGradient,
    kept: list[KeptChunk],
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """This shard's d_hidden [T, D] and d_weight [V, D] in the inputs' dtypes; None where not needed."""
    num_tokens, num_rows = len(hidden_TD), len(weight_VD)
    dtype = _compute_dtype(hidden_TD, weight_VD)
    compute_weight_VD = weight_VD.to(dtype)
    d_hidden_TD = hidden_TD.new_empty(hidden_TD.shape, dtype=dtype) if needs_hidden else None
    d_weight_VD = torch.zeros_like(compute_weight_VD) if needs_weight else None
    if d_hidden_TD is not None and num_rows == 0:
        d_hidden_TD.zero_()
    buffer_TV = compute_weight_VD.new_empty(min(num_tokens, _chunk_size(num_rows)), num_rows)
    for number, rows in enumerate(_chunks(num_tokens, num_rows)):
        chunk = kept[number] if kept else _softmax(hidden_TD[rows], compute_weight_VD, temperature)
        d_logits_TV = buffer_TV[: rows.stop - rows.start]
        _write_logit_gradient(d_logits_TV, chunk, gradient, rows, targets_T[rows])
        if d_hidden_TD is not None:
            torch.mm(d_logits_TV, compute_weight_VD, out=d_hidden_TD[rows])
        if d_weight_VD is not None:
            d_weight_VD.addmm_(d_logits_TV.T, hidden_TD[rows].to(dtype))
    return (
        None if d_hidden_TD is None else d_hidden_TD.to(hidden_TD.dtype),
        None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype),
    )


def _softmax(hidden_TD: Tensor, weight_VD: Tensor, temperature: float) -> KeptChunk:
    logits_TV = F.linear(hidden_TD.to(weight_VD.dtype), weight_VD)
    if temperature != 1.0:
        logits_TV.div_(temperature)
    max_T = logits_TV.amax(dim=1)
    shifted_TV = logits_TV.sub_(max_T[:, None])
    return KeptChunk(max_T, shifted_TV, shifted_TV.exp())


def _write_logit_gradient(
    d_logits_TV: Tensor, chunk: KeptChunk, gradient: LogitGradient, rows: slice, targets_T: Tensor
) -> None:
    """LogitGradient's formula with p_v = exp_v e^(m-lse) and z_v - lse = shifted_v + (m - lse)."""
    below_T = chunk.max_T - gradient.lse_T[rows]
    scale_T = below_T.exp()
    softmax_T = gradient.softmax_T[rows]
    if gradient.entropy_T is None:
        torch.mul(chunk.exp_TV, (softmax_T * scale_T)[:, None], out=d_logits_TV)
    else:
        slope_T = gradient.entropy_T[rows]
        constant_T = (softmax_T - slope_T * below_T) * scale_T
        torch.mul(chunk.shifted_TV, -(slope_T * scale_T)[:, None], out=d_logits_TV)
        d_logits_TV.add_(constant_T[:, None]).mul_(chunk.exp_TV)
    inside_T, columns_T1 = _target_columns(targets_T, d_logits_TV.shape[1])
    at_target_T = torch.where(inside_T, gradient.target_T[rows], 0.0)
    d_logits_TV.scatter_add_(1, columns_T1, at_target_T[:, None])


def _target_columns(targets_T: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(whether each target lies in the shard [T], a valid column for each [T, 1])."""
    columns_T = targets_T.clamp(0, num_rows - 1)
    return columns_T == targets_T, columns_T[:, None]


def _chunk_size(num_rows: int) -> int:
    return max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // max(1, num_rows))


def _chunks(num_tokens: int, num_rows: int) -> Iterator[slice]:
    """Slices of tokens; none for an empty shard."""
    size = _chunk_size(num_rows)
    for start in range(0, num_tokens if num_rows else 0, size):
        yield slice(start, min(start + size, num_tokens))


def _compute_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32)
