"""GRPO's token-level objective as a function of each token's own log-prob, with its slope (R1 eq. 1-2).

A token t of weight w costs w (-min(r A, clip(r) A) i + beta k3 - c H): r = pi / pi_old, A its advantage, i the
truncated importance weight of pi_old against the engine that sampled (a constant for the gradient), k3 = e^d - d - 1
with d = log pi_ref - log pi, H the entropy. So d loss / d logits of a row is known as soon as the row's own log-prob
is, which is what makes one pass possible. A ratio per sequence (GSPO) is no such function.

Exponents are limited to MAX_LOG_RATIO nats; beyond it a term is constant and its slope 0. Dims: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest exponent, in nats: e^20 = 4.9e8."""


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of each token, all [T]; but for the mask float32 (float64 where hidden states are)."""

    mask_T: Tensor
    """bool: tokens that count. Nothing is computed of the others, whatever they hold."""
    weights_T: Tensor
    """Weight of each token's loss in the global batch."""
    advantages_T: Tensor
    old_logprobs_T: Tensor | None = None
    """None: an on-policy update, pi_old = pi."""
    reference_logprobs_T: Tensor | None = None
    """None leaves the KL term out."""
    rollout_logprobs_T: Tensor | None = None
    """Of the engine that sampled; needed where importance_cap > 0."""

    def at(self, rows: Tensor | slice) -> Tokens:
        """Of some rows: int64 numbers or a slice."""
        changes: dict[str, Any] = {name: x[rows] for name, x in vars(self).items() if x is not None}
        return replace(self, **changes)


@dataclass(frozen=True)
class Objective:
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    kl_coef: float = 0.0
    """beta."""
    importance_cap: float = 0.0
    """Truncated importance sampling: tokens count min(pi_old / pi_rollout, cap) times; 0 is off."""
    entropy_coef: float = 0.0
    """c: entropy is rewarded."""

    def loss_and_slopes(
        self, logprobs_T: Tensor, entropy_T: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss_T, d loss / d logprob [T], d loss / d entropy [T]; None at entropy_coef 0)."""
        old_T = logprobs_T if tokens.old_logprobs_T is None else tokens.old_logprobs_T
        gains_T, weights_T = tokens.advantages_T, tokens.weights_T
        if self.importance_cap > 0:
            assert tokens.rollout_logprobs_T is not None
            drift_T = (old_T - tokens.rollout_logprobs_T).clamp(max=MAX_LOG_RATIO)
            gains_T = gains_T * drift_T.exp().clamp(max=self.importance_cap)
        log_ratio_T = logprobs_T - old_T
        ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        low, high = 1 - self.clip_low, 1 + self.clip_high
        loss_T = -torch.minimum(ratio_T * gains_T, ratio_T.clamp(low, high) * gains_T)
        still_T = ((gains_T > 0) & (ratio_T > high)) | ((gains_T < 0) & (ratio_T < low))
        still_T |= log_ratio_T.abs() > MAX_LOG_RATIO
        slope_T = torch.where(still_T, 0.0, -ratio_T * gains_T)
        if tokens.reference_logprobs_T is not None and self.kl_coef > 0:
            d_T = tokens.reference_logprobs_T - logprobs_T
            growth_T = d_T.clamp(max=MAX_LOG_RATIO).expm1()
            loss_T = loss_T + self.kl_coef * (growth_T - d_T.clamp(max=MAX_LOG_RATIO)).clamp(min=0)
            slope_T = slope_T - self.kl_coef * torch.where(d_T > MAX_LOG_RATIO, 0.0, growth_T)
        if not self.entropy_coef:
            return weights_T * loss_T, weights_T * slope_T, None
        loss_T = loss_T - self.entropy_coef * entropy_T
        return weights_T * loss_T, weights_T * slope_T, -self.entropy_coef * weights_T
