"""The losses of R1 as pure functions of packed tensors: GRPO, SFT and the value loss of a PPO critic.

GRPO is the clipped surrogate plus the k3 KL estimate inside the loss (R1 eq. 1-2, DeepSeekMath eq. 3-4),
with the ratio per token; R1's eq. 1 writes it per output, which `ratio="sequence"` offers in GSPO's
length-normalised form. Departures: separate low and high clip bounds, optional truncated importance
sampling against the engine's log-probs, and exponents limited to MAX_LOG_RATIO nats so that fp32 stays
finite (beyond it the term is constant).

With a ratio per token the model's head computes the same loss together with its gradients (`token_objective`), and
what is here gives the metrics.

A loss is a *sum*: every token carries its weight in the global mini-batch (`token_weights_T`), so the
trainer only adds, over micro-batches and ranks. Metrics are float64 sums too, except keys that end in
"_max", which combine by maximum. PPO's policy loss is GRPO's with advantages of a critic, so that the comparison
changes one thing: the KL term stays in the loss. Dims: T packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from r1mega.config import GRPOConfig
from r1mega.samples import PackedBatch
from r1mega_kernels.grpo_loss import Objective
from r1mega_kernels.grpo_loss.objective import MAX_LOG_RATIO

Metrics = dict[str, Tensor]

VALUE_CLIP = 0.2
"""How far a value may move from the rollout's before its gradient stops (PPO; in units of the reward). [open]"""


def grpo_loss(
    logprobs_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch, config: GRPOConfig
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate plus k3 KL, summed with the batch's token weights (R1 eq. 1-2).

    logprobs_T: fp32, differentiable, of batch.targets_T under the current policy. Tokens with loss_mask 0
    contribute exactly 0 to the loss and its gradient, whatever they hold. old_logprobs_T None means an
    on-policy update (pi_old = pi_theta, ratio 1); ref_logprobs_T None or kl_coef 0 leaves the KL term out.
    """
    assert batch.advantages_T is not None, "a GRPO batch needs advantages"
    mask_T = batch.loss_mask_T > 0
    current_T = logprobs_T.detach()
    old_T = current_T if batch.old_logprobs_T is None else batch.old_logprobs_T
    log_ratio_T = masked(logprobs_T - old_T, mask_T)
    if config.ratio == "sequence":
        log_ratio_T = sequence_mean(log_ratio_T, mask_T, batch)
    elif config.ratio != "token":
        raise ValueError(f"ratio {config.ratio!r} is not one of token, sequence")
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    advantages_T = masked(batch.advantages_T, mask_T)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    objective_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    metrics: Metrics = {}
    if batch.rollout_logprobs_T is not None:
        drift_T = masked(old_T - batch.rollout_logprobs_T, mask_T)
        metrics["logprob_mismatch"] = total(drift_T.abs())
        metrics["logprob_mismatch_max"] = largest(drift_T.abs())
        metrics["rollout_kl"] = total(k3(masked(current_T - batch.rollout_logprobs_T, mask_T)))
        if config.importance_cap > 0:
            importance_T = masked(
                drift_T.clamp(max=MAX_LOG_RATIO).exp().clamp(max=config.importance_cap), mask_T
            )
            objective_T = objective_T * importance_T
            metrics["importance_weight"] = total(importance_T)
    token_loss_T = -objective_T
    if batch.ref_logprobs_T is not None and config.kl_coef > 0:
        kl_T = k3(masked(batch.ref_logprobs_T - logprobs_T, mask_T))
        token_loss_T = token_loss_T + config.kl_coef * kl_T
        metrics["kl"] = total(kl_T)

    loss_sum = (token_loss_T * masked(batch.token_weights_T, mask_T)).sum()
    ratio_T = ratio_T.detach()
    metrics["tokens"] = total(mask_T)
    metrics["loss"] = loss_sum.detach().double()
    metrics["clip_low"] = total((advantages_T < 0) & (ratio_T < low))
    metrics["clip_high"] = total((advantages_T > 0) & (ratio_T > high))
    metrics["ratio_deviation_max"] = largest(masked((ratio_T - 1).abs(), mask_T))
    if entropy_T is not None:
        metrics["entropy"] = total(masked(entropy_T, mask_T))
    return loss_sum, metrics


def token_objective(config: GRPOConfig) -> Objective | None:
    """`grpo_loss` as a function of each token's own log-prob, for the model's head; None: a ratio per sequence is none."""
    if config.ratio != "token":
        return None
    return Objective(config.clip_low, config.clip_high, config.kl_coef, config.importance_cap)


def sft_loss(logprobs_T: Tensor, batch: PackedBatch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the masked-in tokens, summed with the batch's token weights."""
    mask_T = batch.loss_mask_T > 0
    nll_T = -masked(logprobs_T, mask_T)
    loss_sum = (nll_T * masked(batch.token_weights_T, mask_T)).sum()
    return loss_sum, {"tokens": total(mask_T), "loss": loss_sum.detach().double(), "nll": total(nll_T)}


def value_loss(values_T: Tensor, batch: PackedBatch) -> tuple[Tensor, Metrics]:
    """Half the clipped squared error of a critic, summed with the batch's token weights (PPO).

    values_T: fp32, differentiable, one for every token. batch.values_T are those before the rollout's first update and
    batch.returns_T what they should have been. Tokens with loss_mask 0 contribute exactly 0.
    """
    assert batch.values_T is not None, "a critic's batch needs the old values"
    assert batch.returns_T is not None, "a critic's batch needs returns"
    mask_T = batch.loss_mask_T > 0
    old_T, returns_T = masked(batch.values_T, mask_T), masked(batch.returns_T, mask_T)
    values_T = masked(values_T, mask_T)
    clipped_T = old_T + (values_T - old_T).clamp(-VALUE_CLIP, VALUE_CLIP)
    error_T = torch.maximum((values_T - returns_T).square(), (clipped_T - returns_T).square())
    loss_sum = 0.5 * (error_T * masked(batch.token_weights_T, mask_T)).sum()
    residual_T = (returns_T - old_T).double()
    return loss_sum, {
        "value_loss": loss_sum.detach().double(),
        "values": total(old_T),
        "returns": total(returns_T),
        "returns_squared": total(returns_T.double().square()),
        "value_residual": total(residual_T),
        "value_residual_squared": total(residual_T.square()),
    }


def k3(log_ratio_T: Tensor) -> Tensor:
    """Schulman's k3 estimate e^d - d - 1 >= 0 of KL(pi || pi_ref), d = log pi_ref - log pi (R1 eq. 2)."""
    d_T = log_ratio_T.clamp(max=MAX_LOG_RATIO)
    return (d_T.expm1() - d_T).clamp(min=0)  # near d = 0 rounding can leave -1e-15


def sequence_mean(values_T: Tensor, mask_T: Tensor, batch: PackedBatch) -> Tensor:
    """Each sequence's mean over its masked-in tokens, given back to every token of it (GSPO eq. 7).

    values_T is 0 where mask_T is. Sequences are never split over chunks, so the mean is complete.
    """
    sequence_T = batch.sequence_of_T
    zeros_S = values_T.new_zeros(batch.num_sequences)
    sums_S = zeros_S.index_add(0, sequence_T, values_T)
    counts_S = zeros_S.index_add(0, sequence_T, mask_T.to(values_T.dtype))
    return masked((sums_S / counts_S.clamp(min=1))[sequence_T], mask_T)


def combine(parts: Iterable[Metrics]) -> Metrics:
    """Metrics of several micro-batches as one: keys in "_max" by maximum, all others by sum."""
    combined: Metrics = {}
    for metrics in parts:
        for key, value in metrics.items():
            if key not in combined:
                combined[key] = value
            elif key.endswith("_max"):
                combined[key] = torch.maximum(combined[key], value)
            else:
                combined[key] = combined[key] + value
    return combined


def summarise(totals: Metrics) -> dict[str, float]:
    """Combined metrics as the numbers to log: means per trained token, maxima and the losses as they are."""
    values = {key: float(value) for key, value in totals.items()}
    tokens = max(values["tokens"], 1.0)
    summary = {"tokens": values["tokens"], "loss": values["loss"]}
    for key, value in values.items():
        if key.endswith("_max") or key in ("mtp_loss", "value_loss"):
            summary[key] = value
        elif key not in summary:
            summary["logprob_mismatch_mean" if key == "logprob_mismatch" else key] = value / tokens
    if "clip_low" in summary:
        summary["clip_fraction"] = summary["clip_low"] + summary["clip_high"]
    if "value_residual" in summary:
        unexplained = summary.pop("value_residual_squared") - summary.pop("value_residual") ** 2
        variance = summary.pop("returns_squared") - summary["returns"] ** 2
        summary["explained_variance"] = 1 - unexplained / variance if variance > 0 else 0.0
    return summary


def masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Values where the mask holds, exact zeros elsewhere (a product would keep infinities and NaN)."""
    return torch.where(mask_T, values_T, torch.zeros_like(values_T))


def total(values_T: Tensor) -> Tensor:
    return values_T.detach().sum(dtype=torch.float64)


def largest(values_T: Tensor) -> Tensor:
    values_T = values_T.detach().double()
    return values_T.max() if values_T.numel() else values_T.new_zeros(())
