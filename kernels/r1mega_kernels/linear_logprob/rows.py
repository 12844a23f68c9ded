"""Per-row quantities of linear_logprob's forward and backward, shared by its implementations.

Forward: with z the logits of a row, m their maximum, a part of the vocabulary keeps m, s = sum e^(z-m),
u = sum e^(z-m) (z-m), and the target's logit if it lies in the part. Nothing is ever formed as a difference
of large numbers: entropy is log s - u/s, which stays exact when all logits shift, unlike lse - sum p z.
The same merge serves vocabulary tiles of one device and vocabulary shards of a process group.

Dims: P parts, T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxPartials:
    """All [T] (or [P, T] before a merge), float32 or float64. A part without columns has max -inf, sums 0."""

    max_T: Tensor
    sum_T: Tensor
    moment_T: Tensor
    """u = sum e^(z-m) (z-m)."""
    target_logit_T: Tensor
    """0 in parts that do not hold the target."""

    def merged_parts(self) -> SoftmaxPartials:
        """Merges [P, T] into [T]."""
        max_T = self.max_T.amax(dim=0)
        sum_PT, moment_PT = self._relative_to(max_T)
        return SoftmaxPartials(max_T, sum_PT.sum(dim=0), moment_PT.sum(dim=0), self.target_logit_T.sum(dim=0))

    def merged_over(self, group: dist.ProcessGroup | None) -> SoftmaxPartials:
        """Merges the shards of a process group: an all-reduce of T maxima and one of 3 T sums."""
        if group is None or group.size() == 1:
            return self
        max_T = self.max_T.clone()
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        sums_3T = torch.stack([*self._relative_to(max_T), self.target_logit_T])
        dist.all_reduce(sums_3T, group=group)
        return SoftmaxPartials(max_T, *sums_3T.unbind(0))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs_T, entropy_T, lse_T)."""
        log_sum_T = self.sum_T.log()
        logprobs_T = (self.target_logit_T - self.max_T) - log_sum_T
        entropy_T = log_sum_T - self.moment_T / self.sum_T
        return logprobs_T, entropy_T, self.max_T + log_sum_T

    def _relative_to(self, max_T: Tensor) -> tuple[Tensor, Tensor]:
        """sum and moment relative to a larger maximum; an empty part (max -inf) stays 0 instead of NaN."""
        shift = torch.where(self.max_T == -torch.inf, 0.0, self.max_T - max_T)
        factor = shift.exp()
        return self.sum_T * factor, (self.moment_T + self.sum_T * shift) * factor


@dataclass(frozen=True)
class LogitGradient:
    """d loss / d (hidden @ weight.T) of a row, as three coefficients and the row's log-sum-exp:

    target [v = target] + p_v (softmax - entropy (z_v - lse)),  p_v = e^(z_v - lse).
    """

    lse_T: Tensor
    target_T: Tensor
    softmax_T: Tensor
    entropy_T: Tensor | None
    """None where the loss does not depend on entropies."""

    @staticmethod
    def of(
        grad_logprobs_T: Tensor | None,
        grad_entropy_T: Tensor | None,
        lse_T: Tensor,
        entropy_T: Tensor,
        temperature: float,
    ) -> LogitGradient:
        """d logprob / d z_v = [v = target] - p_v;  d entropy / d z_v = -p_v (log p_v + entropy)."""
        target_T = torch.zeros_like(lse_T) if grad_logprobs_T is None else grad_logprobs_T / temperature
        if grad_entropy_T is None:
            return LogitGradient(lse_T, target_T, -target_T, None)
        slope_T = grad_entropy_T / temperature
        return LogitGradient(lse_T, target_T, -(target_T + slope_T * entropy_T), slope_T)
