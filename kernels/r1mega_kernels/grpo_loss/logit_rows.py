"""What happens to a chunk of float32 logits: its softmax quantities, and the gradient of the rows that have one.

Two custom operators, each one pass over memory: `r1mega::softmax_rows` and `r1mega::logit_gradient_rows`. Here is
what runs on CPU; kernel.py has the Triton kernels for a GPU.

z are logits divided by the temperature. Dims: R rows of a chunk, K of them with a gradient, V vocabulary rows of
this shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BLOCK = 2**18
"""Logits that the CPU's passes take at once: 1 MiB, about one core's cache."""


@torch.library.custom_op("r1mega::softmax_rows", mutates_args=())
def softmax_rows(logits_RV: Tensor, targets_R: Tensor, inverse_temperature: float) -> Tensor:
    """[4, R]: rows.SoftmaxPartials of z: maximum, sum of e^(z-m), sum of e^(z-m) (z-m), the target's z.

    targets_R int64 count from the shard's first row; the target's z is 0 where another shard has it.
    """
    num_rows = logits_RV.shape[1]
    partials_4R = logits_RV.new_zeros(4, len(logits_RV))
    partials_4R[0].fill_(-torch.inf)
    step = max(1, MAX_BLOCK // max(1, num_rows))
    for start in range(0, len(logits_RV) if num_rows else 0, step):
        rows = slice(start, start + step)
        columns_R = targets_R[rows].clamp(0, num_rows - 1)
        target_R = logits_RV[rows].gather(1, columns_R[:, None]).squeeze(1) * inverse_temperature
        max_R = logits_RV[rows].amax(dim=1) * inverse_temperature
        shifted_RV = torch.add(-max_R[:, None], logits_RV[rows], alpha=inverse_temperature)
        exp_RV = shifted_RV.exp()
        partials_4R[0, rows] = max_R
        partials_4R[1, rows] = exp_RV.sum(dim=1)
        partials_4R[2, rows] = torch.linalg.vecdot(exp_RV, shifted_RV)
        partials_4R[3, rows] = torch.where(columns_R == targets_R[rows], target_R, 0.0)
    return partials_4R


@softmax_rows.register_fake
def _(logits_RV: Tensor, targets_R: Tensor, inverse_temperature: float) -> Tensor:
    return logits_RV.new_empty(4, len(logits_RV))


@torch.library.custom_op("r1mega::logit_gradient_rows", mutates_args=("d_logits_KV",))
def logit_gradient_rows(
    logits_RV: Tensor,
    rows_K: Tensor,
    targets_K: Tensor,
    coefficients_4K: Tensor,
    inverse_temperature: float,
    with_entropy: bool,
    d_logits_KV: Tensor,
) -> None:
    """Writes d loss / d (hidden @ weight.T) of rows `rows_K` (int64) of the chunk, in d_logits_KV's dtype.

    coefficients_4K: lse, target, softmax and entropy of rows.LogitGradient; the last counts only with_entropy.
    """
    num_rows = logits_RV.shape[1]
    whole = len(rows_K) == len(logits_RV)  # rows_K ascend
    step = max(1, MAX_BLOCK // max(1, num_rows))
    for start in range(0, len(rows_K) if num_rows else 0, step):
        part = slice(start, start + step)
        lse_K, target_K, softmax_K, entropy_K = coefficients_4K[:, part]
        logits_KV = logits_RV[part] if whole else logits_RV.index_select(0, rows_K[part])
        same = d_logits_KV.dtype == logits_RV.dtype
        found_KV = d_logits_KV[part] if same else torch.empty_like(logits_KV)
        torch.add(-lse_K[:, None], logits_KV, alpha=inverse_temperature, out=found_KV)
        if with_entropy:
            slope_KV = softmax_K[:, None] - entropy_K[:, None] * found_KV
            found_KV.exp_().mul_(slope_KV)
        else:
            found_KV.exp_().mul_(softmax_K[:, None])
        columns_K = targets_K[part].clamp(0, num_rows - 1)
        at_target_K = torch.where(columns_K == targets_K[part], target_K, 0.0)
        found_KV.scatter_add_(1, columns_K[:, None], at_target_K[:, None])
        if not same:
            d_logits_KV[part] = found_KV
