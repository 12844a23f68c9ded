"""GRPO and SFT losses against hand-computed values and naive float64 formulas."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from r1mega.algorithms.advantages import token_weights
from r1mega.algorithms.losses import combine, grpo_loss, k3, sft_loss, summarise
from r1mega.config import GRPOConfig
from r1mega.samples import PackedBatch


def make_batch(lengths, prompt=0, **fields):
    """Sequences of given numbers of response tokens after `prompt` untrained ones."""
    sizes = [prompt + length for length in lengths]
    mask = torch.cat([torch.tensor([0.0] * prompt + [1.0] * length) for length in lengths])
    size = len(mask)
    return PackedBatch(
        tokens_T=torch.zeros(size, dtype=torch.long),
        targets_T=torch.zeros(size, dtype=torch.long),
        positions_T=torch.cat([torch.arange(n) for n in sizes]),
        cu_seqlens_S=torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32),
        loss_mask_T=mask,
        **({"token_weights_T": mask.clone()} | fields),
    )


def one_token(ratio, advantage, **config):
    """Loss, gradient and metrics of a single token of weight 1 whose log-prob is 0."""
    batch = make_batch(
        [1], advantages_T=torch.tensor([advantage]), old_logprobs_T=torch.tensor([-math.log(ratio)])
    )
    logprobs = torch.zeros(1, requires_grad=True)
    loss, metrics = grpo_loss(logprobs, None, batch, GRPOConfig(kl_coef=0.0, **config))
    loss.backward()
    return loss.item(), logprobs.grad.item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, None),  # inside the bounds
        (1.5, 2.0, -2.4, 0.0, "clip_high"),  # A > 0 beyond 1 + 0.2
        (0.5, 2.0, -1.0, -1.0, None),  # A > 0 below: no clip, the ratio may rise again
        (0.9, -2.0, 1.8, 1.8, None),
        (0.5, -2.0, 1.6, 0.0, "clip_low"),  # A < 0 below 1 - 0.2
        (1.5, -2.0, 3.0, 3.0, None),  # A < 0 above: no clip
        (1.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_surrogate_clips_on_the_side_that_the_advantage_pushes(ratio, advantage, loss, gradient, clipped):
    value, slope, metrics = one_token(ratio, advantage, clip_low=0.2, clip_high=0.2)
    assert value == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert slope == pytest.approx(gradient, rel=1e-5, abs=1e-7)
    assert {name for name in ("clip_low", "clip_high") if metrics[name]} == ({clipped} if clipped else set())


def test_low_and_high_bounds_are_separate():
    assert one_token(1.25, 1.0, clip_low=0.2, clip_high=0.3)[0] == pytest.approx(-1.25)
    assert one_token(1.35, 1.0, clip_low=0.2, clip_high=0.3)[0] == pytest.approx(-1.3)
    assert one_token(0.75, -1.0, clip_low=0.2, clip_high=0.3)[0] == pytest.approx(0.8)


def test_epsilon_10_clips_gains_above_ratio_11_and_losses_never():
    bounds = {"clip_low": 10.0, "clip_high": 10.0}
    assert one_token(10.5, 1.0, **bounds)[:2] == (pytest.approx(-10.5), pytest.approx(-10.5))
    assert one_token(12.0, 1.0, **bounds)[:2] == (pytest.approx(-11.0), 0.0)
    assert one_token(1e-4, -1.0, **bounds)[0] == pytest.approx(1e-4)
    assert one_token(500.0, -1.0, **bounds)[:2] == (
        pytest.approx(500.0, rel=1e-4),
        pytest.approx(500.0, rel=1e-4),
    )


def test_k3_matches_its_formula_and_is_never_negative():
    d = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    torch.testing.assert_close(k3(d).double(), d.double().exp() - d.double() - 1, rtol=1e-6, atol=1e-7)
    assert (k3(torch.randn(100_000) * 10.0 ** torch.randint(-12, 2, (100_000,))) >= 0).all()


@pytest.mark.parametrize("gap", [80.0, -80.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_probs_80_nats_apart_stay_finite(gap, ratio, advantage):
    far = torch.full((4,), gap)
    batch = make_batch([4], advantages_T=torch.full((4,), advantage), old_logprobs_T=far)
    batch = replace(batch, ref_logprobs_T=far, rollout_logprobs_T=-far)
    logprobs = torch.zeros(4, requires_grad=True)
    loss, metrics = grpo_loss(logprobs, torch.ones(4), batch, GRPOConfig(ratio=ratio, importance_cap=2.0))
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def random_batch(lengths, aggregation="sequence_mean", prompt=2):
    weights = token_weights(lengths, aggregation, max_tokens=16)
    size = sum(lengths) + prompt * len(lengths)
    per_token = torch.cat([torch.full((prompt + n,), w) for n, w in zip(lengths, weights, strict=True)])
    advantages = torch.cat([torch.full((prompt + n,), float(torch.randn(()))) for n in lengths])
    batch = make_batch(lengths, prompt=prompt)
    logprobs = -2 * torch.rand(size)
    return logprobs, replace(
        batch,
        token_weights_T=per_token * batch.loss_mask_T,
        advantages_T=advantages * batch.loss_mask_T,
        old_logprobs_T=logprobs + 0.3 * torch.randn(size),
        ref_logprobs_T=logprobs + 0.5 * torch.randn(size),
        rollout_logprobs_T=logprobs + 0.4 * torch.randn(size),
    )


def textbook(logprobs, batch, config, max_tokens=16):
    """DeepSeekMath eq. 3, GSPO eq. 5-7 and the aggregations, sequence by sequence, in float64."""
    bounds = batch.cu_seqlens_S.tolist()
    sums, lengths = [], []
    for start, end in pairwise(bounds):
        trained = [t for t in range(start, end) if batch.loss_mask_T[t] == 1]
        logp, old, ref = (
            logprobs[trained],
            batch.old_logprobs_T[trained].double(),
            batch.ref_logprobs_T[trained].double(),
        )
        ratio = (
            (logp - old).exp() if config.ratio == "token" else (logp - old).mean().exp().expand(len(trained))
        )
        advantage = batch.advantages_T[trained].double()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        if config.importance_cap:
            objective = objective * (old - batch.rollout_logprobs_T[trained].double()).exp().clamp(
                max=config.importance_cap
            )
        kl = (ref - logp).exp() - (ref - logp) - 1
        sums.append((-objective + config.kl_coef * kl).sum())
        lengths.append(len(trained))
    if config.aggregation == "sequence_mean":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    return sum(sums) / (sum(lengths) if config.aggregation == "token_mean" else len(sums) * max_tokens)


@pytest.mark.parametrize("importance_cap", [0.0, 1.2])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
def test_loss_and_gradient_equal_the_textbook_formula(aggregation, ratio, importance_cap):
    config = GRPOConfig(aggregation=aggregation, ratio=ratio, importance_cap=importance_cap, kl_coef=0.1)
    logprobs, batch = random_batch([5, 1, 9, 3], aggregation)
    ours, naive = logprobs.clone().requires_grad_(), logprobs.double().requires_grad_()
    loss, _ = grpo_loss(ours, None, batch, config)
    expected = textbook(naive, batch, config)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(ours.grad.double(), naive.grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_masked_tokens_contribute_exactly_nothing(ratio):
    config = GRPOConfig(ratio=ratio, importance_cap=2.0)
    logprobs, batch = random_batch([4, 6], prompt=3)
    masked = batch.loss_mask_T == 0
    for extreme in (-1e38, 1e38, float("-inf"), float("nan")):
        spoilt = {
            name: torch.where(masked, extreme, getattr(batch, name))
            for name in (
                "old_logprobs_T",
                "ref_logprobs_T",
                "rollout_logprobs_T",
                "advantages_T",
                "token_weights_T",
            )
        }
        clean, dirty = (
            logprobs.clone().requires_grad_(),
            torch.where(masked, extreme, logprobs).requires_grad_(),
        )
        clean_loss, clean_metrics = grpo_loss(clean, torch.ones_like(clean), batch, config)
        loss, metrics = grpo_loss(dirty, torch.where(masked, extreme, 1.0), replace(batch, **spoilt), config)
        clean_loss.backward()
        loss.backward()
        assert torch.equal(loss, clean_loss)
        assert torch.equal(dirty.grad, clean.grad)
        assert not dirty.grad[masked].any()
        assert metrics == clean_metrics


def test_on_policy_ratio_is_one_and_its_gradient_is_that_of_reinforce():
    logprobs, batch = random_batch([3, 5])
    logprobs.requires_grad_()
    batch = replace(batch, old_logprobs_T=None, ref_logprobs_T=None)
    loss, metrics = grpo_loss(logprobs, None, batch, GRPOConfig())
    loss.backward()
    assert metrics["ratio_deviation_max"] == 0
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    assert "kl" not in metrics
    torch.testing.assert_close(logprobs.grad, -batch.advantages_T * batch.token_weights_T)


def test_the_importance_weight_is_capped_and_carries_no_gradient():
    # pi_old / pi_rollout is e^0.5 for one token and e^-0.5 for the other
    batch = make_batch(
        [2],
        advantages_T=torch.ones(2),
        old_logprobs_T=torch.tensor([-1.0, -1.0]),
        rollout_logprobs_T=torch.tensor([-1.5, -0.5]),
    )
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, metrics = grpo_loss(logprobs, None, batch, GRPOConfig(importance_cap=1.25, kl_coef=0.0))
    loss.backward()
    assert loss.item() == pytest.approx(-(1.25 + math.exp(-0.5)))
    assert logprobs.grad.tolist() == pytest.approx([-1.25, -math.exp(-0.5)])
    assert metrics["importance_weight"].item() == pytest.approx(1.25 + math.exp(-0.5))


def test_metrics_are_sums_that_combine_to_means_over_all_tokens():
    config = GRPOConfig(clip_low=0.1, clip_high=0.1)
    parts, batches = [], [random_batch([4, 2]), random_batch([7])]
    entropies = [torch.rand(len(logprobs)) for logprobs, _ in batches]
    for (logprobs, batch), entropy in zip(batches, entropies, strict=True):
        parts.append(grpo_loss(logprobs, entropy, batch, config)[1])
    summary = summarise(combine(parts))
    cat = lambda values: torch.cat([v[b.loss_mask_T == 1] for v, (_, b) in zip(values, batches, strict=True)])  # noqa: E731
    drift = cat([b.old_logprobs_T - b.rollout_logprobs_T for _, b in batches]).abs()
    ratio = cat([(logprobs - b.old_logprobs_T).exp() for logprobs, b in batches])
    advantages = cat([b.advantages_T for _, b in batches])
    clipped = ((advantages > 0) & (ratio > 1.1)) | ((advantages < 0) & (ratio < 0.9))
    kl = k3(cat([b.ref_logprobs_T - logprobs for logprobs, b in batches]))
    rollout_kl = k3(cat([logprobs - b.rollout_logprobs_T for logprobs, b in batches]))
    assert summary["tokens"] == 13
    assert summary["logprob_mismatch_mean"] == pytest.approx(drift.mean().item(), rel=1e-5)
    assert summary["logprob_mismatch_max"] == pytest.approx(drift.max().item(), rel=1e-6)
    assert summary["clip_fraction"] == pytest.approx(clipped.float().mean().item())
    assert summary["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert summary["rollout_kl"] == pytest.approx(rollout_kl.mean().item(), rel=1e-5)
    assert summary["entropy"] == pytest.approx(cat(entropies).mean().item(), rel=1e-5)
    assert summary["ratio_deviation_max"] == pytest.approx((ratio - 1).abs().max().item(), rel=1e-5)
    assert summary["loss"] == pytest.approx(sum(part["loss"].item() for part in parts))


def test_sft_loss_is_the_weighted_negative_log_likelihood():
    batch = make_batch([2, 1], prompt=1)
    batch = replace(batch, token_weights_T=torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5]))
    logprobs = torch.tensor([float("nan"), -1.0, -2.0, float("-inf"), -4.0], requires_grad=True)
    loss, metrics = sft_loss(logprobs, batch)
    loss.backward()
    assert loss.item() == pytest.approx(2.75)
    assert logprobs.grad.tolist() == [0.0, -0.25, -0.25, 0.0, -0.5]
    assert summarise(metrics) == {"tokens": 3.0, "loss": 2.75, "nll": pytest.approx(7 / 3)}


def test_a_chunk_of_padding_alone_is_worth_zero():
    batch = make_batch([0], prompt=4, advantages_T=torch.zeros(4), ref_logprobs_T=torch.zeros(4))
    logprobs = torch.randn(4, requires_grad=True)
    for ratio in ("token", "sequence"):
        loss, metrics = grpo_loss(logprobs, torch.ones(4), batch, GRPOConfig(ratio=ratio))
        assert loss.item() == 0
        assert metrics["tokens"] == 0
        assert loss.requires_grad
        assert summarise(metrics)["entropy"] == 0
