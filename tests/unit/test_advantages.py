"""Group advantages, token weights, mini-batches, and the samples built from them."""

from itertools import chain

import numpy as np
import pytest
import torch

from r1mega.algorithms.advantages import group_advantages, split_mini_batches, token_weights
from r1mega.algorithms.credit import build_samples, credit, of_sequences, plan_samples
from r1mega.config import GRPOConfig, RolloutConfig, RunConfig
from r1mega.data.packing import pack
from r1mega.samples import Prompt, Reward, Rollout, ScoredRollout


def scored(prompt_id, index, total, length=3, finish_reason="stop", prompt_length=2):
    prompt = Prompt(prompt_id, "q", "a", "math", "q", tuple(range(10, 10 + prompt_length)))
    response = tuple(range(100, 100 + length))
    logprobs = tuple(-0.5 - t for t in range(length))
    rollout = Rollout(prompt, index, response, logprobs, "text", finish_reason, 0)
    return ScoredRollout(rollout, Reward(total, {"accuracy": total}, {"accuracy": "equal"}))


def run_config(max_tokens=8, **grpo):
    return RunConfig(grpo=GRPOConfig(**grpo), rollout=RolloutConfig(max_tokens=((0, max_tokens),)))


def test_advantages_match_hand_computed_values():
    # rewards 2, 1, 0, 1: mean 1, population std sqrt(1/2), sample std sqrt(2/3)
    rewards_QG = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    population, _ = group_advantages(rewards_QG, GRPOConfig())
    sample, _ = group_advantages(rewards_QG, GRPOConfig(advantage_std="sample"))
    plain, _ = group_advantages(rewards_QG, GRPOConfig(advantage_std="none"))
    assert population[0].tolist() == pytest.approx([2**0.5, 0, -(2**0.5), 0], rel=1e-5)
    assert sample[0].tolist() == pytest.approx([1.5**0.5, 0, -(1.5**0.5), 0], rel=1e-5)
    assert plain[0].tolist() == [1, 0, -1, 0]


def test_epsilon_joins_the_standard_deviation():
    (advantages_G,), _ = group_advantages([torch.tensor([1e-6, -1e-6], dtype=torch.float64)], GRPOConfig())
    assert advantages_G.tolist() == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize("deviation", ["population", "sample", "none"])
def test_equal_rewards_give_exactly_zero_and_are_counted(deviation):
    groups = [torch.full((7,), 0.1), torch.tensor([0.3]), torch.tensor([0.0, 1.0]), torch.zeros(0)]
    advantages, num_zero_std = group_advantages(groups, GRPOConfig(advantage_std=deviation))
    assert num_zero_std == 3
    assert [len(group) for group in advantages] == [7, 1, 2, 0]
    assert not advantages[0].any()
    assert not advantages[1].any()
    assert advantages[2].abs().min() > 0


def test_advantages_of_random_groups_have_mean_0_and_std_1():
    groups = torch.randn(5, 9, dtype=torch.float64)
    advantages, num_zero_std = group_advantages(groups, GRPOConfig())
    stacked = torch.stack(advantages)
    assert num_zero_std == 0
    torch.testing.assert_close(stacked.mean(1), torch.zeros(5, dtype=torch.float64))
    assert stacked.std(1, correction=0).tolist() == pytest.approx([1.0] * 5, rel=1e-5)


def test_token_weights_of_each_aggregation():
    assert token_weights([2, 8], "sequence_mean", 10) == [1 / 4, 1 / 16]
    assert token_weights([2, 8], "token_mean", 10) == [1 / 10, 1 / 10]
    assert token_weights([2, 8], "fixed_length", 10) == [1 / 20, 1 / 20]
    assert token_weights([], "token_mean", 10) == []
    with pytest.raises(ValueError, match="output 1 has 0 response tokens"):
        token_weights([3, 0], "sequence_mean", 10)


@pytest.mark.parametrize("split", ["output", "group"])
def test_split_loses_nothing_and_repeats_nothing(split):
    sizes = [4, 3, 4, 1, 4, 4, 0, 2]
    parts = split_mini_batches(sizes, 3, split, np.random.default_rng())
    assert len(parts) == 3
    assert sorted(index for part in parts for index in part) == list(range(sum(sizes)))


def test_split_by_output_is_even_and_by_group_keeps_groups_whole():
    outputs = split_mini_batches([4] * 6, 4, "output", np.random.default_rng(5))
    groups = split_mini_batches([4] * 6, 3, "group", np.random.default_rng(5))
    assert [len(part) for part in outputs] == [6] * 4
    assert [len(part) for part in groups] == [8] * 3
    assert any(len({index // 4 for index in part}) > 2 for part in outputs)
    assert all(len({index // 4 for index in part}) == 2 for part in groups)


def test_split_of_too_few_outputs_leaves_mini_batches_empty():
    assert sorted(map(len, split_mini_batches([2], 4, "output", np.random.default_rng()))) == [0, 0, 1, 1]
    assert split_mini_batches([], 2, "group", np.random.default_rng()) == [[], []]


def test_sample_arrays_are_shifted_by_one():
    samples = build_samples([scored("p", 0, 1.0), scored("p", 1, 0.0)], run_config(), step=0)
    ((first, second),) = samples
    assert first.token_ids.tolist() == [10, 11, 100, 101, 102]
    assert first.loss_mask.tolist() == [0, 1, 1, 1]
    assert first.rollout_logprobs.tolist() == [0, -0.5, -1.5, -2.5]
    assert first.advantages.tolist() == pytest.approx([0, 1, 1, 1], rel=1e-5)
    assert second.advantages.tolist() == pytest.approx([0, -1, -1, -1], rel=1e-5)
    np.testing.assert_allclose(first.token_weights, np.float32([0, 1 / 6, 1 / 6, 1 / 6]))
    assert (first.token_ids.dtype, first.loss_mask.dtype, first.advantages.dtype) == (
        np.int64,
        np.float32,
        np.float32,
    )


def test_advantages_are_computed_before_groups_are_torn_apart():
    rollouts = [scored(f"p{q}", i, float(i)) for q in range(4) for i in range(4)]
    samples = build_samples(rollouts, run_config(group_size=4, mini_batches=4), step=0)
    values = sorted(sample.advantages[-1] for part in samples for sample in part)
    expected = sorted(4 * [(i - 1.5) / 1.25**0.5 for i in range(4)])
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_order_of_arrival_does_not_change_the_samples():
    rollouts = [scored(f"p{q}", i, float((q + i) % 3), length=1 + q + i) for q in range(5) for i in range(4)]
    config = run_config(group_size=4, mini_batches=2)
    shuffled = [rollouts[i] for i in torch.randperm(len(rollouts))]
    one, other = build_samples(rollouts, config, step=6), build_samples(shuffled, config, step=6)
    for left, right in zip(chain(*one), chain(*other), strict=True):
        for name in ("token_ids", "loss_mask", "token_weights", "advantages", "rollout_logprobs"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_the_shuffle_depends_on_the_step():
    rollouts = [scored(f"p{q}", 0, float(q), length=q + 1) for q in range(16)]
    config = run_config(mini_batches=2)
    lengths = [[len(s.token_ids) for s in build_samples(rollouts, config, step)[0]] for step in (0, 2)]
    assert lengths[0] != lengths[1]


def test_lost_outputs_leave_weights_that_sum_to_one():
    rollouts = [scored(f"p{q}", i, float(i), length=1 + i) for q in range(3) for i in range(4)][:-5]
    for aggregation in ("sequence_mean", "token_mean"):
        samples = build_samples(rollouts, run_config(mini_batches=2, aggregation=aggregation), step=0)
        assert sum(map(len, samples)) == 7
        for part in samples:
            assert sum(sample.token_weights.sum() for sample in part) == pytest.approx(1, rel=1e-6)


def test_masked_truncated_outputs_leave_the_loss_but_keep_their_say_in_the_mean():
    rollouts = [scored("p", 0, 3.0), scored("p", 1, 0.0, finish_reason="length"), scored("p", 2, 0.0)]
    config = run_config(mask_truncated=True, advantage_std="none")
    assert [sample.advantages[-1] for sample in build_samples(rollouts, config, step=0)[0]] == [2.0, -1.0]
    plain = [item.rollout for item in rollouts]
    assert [plan_samples(plain, c, step=0).num_masked for c in (config, run_config())] == [1, 0]


def test_advantages_find_their_sequence_in_every_chunk():
    rollouts = [
        scored(f"p{q}", i, float(i == q % 4), length=1 + 3 * q + i) for q in range(5) for i in range(4)
    ]
    config = run_config(group_size=4, mini_batches=2)
    plan, values = plan_samples([item.rollout for item in rollouts], config, step=0), credit(rollouts, config)
    whole = build_samples(rollouts, config, step=0)
    for samples, keys, complete in zip(plan.mini_batches, plan.keys, whole, strict=True):
        for bare, full in zip(chain(*pack(samples, 2, 64, 8)), chain(*pack(complete, 2, 64, 8)), strict=True):
            advantages_S = of_sequences(bare, keys, values.advantages)
            assert torch.equal(bare.loss_mask_T * advantages_S[bare.sequence_of_T], full.advantages_T)


def test_a_sample_has_the_experts_of_its_rollout():
    item = scored("p7", 3, 1.0)
    experts = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2)
    object.__setattr__(item.rollout, "routed_experts", experts)
    ((sample,),) = build_samples([item], run_config(), step=0)
    np.testing.assert_array_equal(sample.routed_experts, experts)
    object.__setattr__(item.rollout, "routed_experts", experts[1:])
    with pytest.raises(ValueError, match="output 3 of prompt p7: the experts of 3 tokens, there must be 4"):
        build_samples([item], run_config(), step=0)


def test_a_rollout_without_its_logprobs_is_refused_by_name():
    broken = scored("p7", 3, 1.0)
    object.__setattr__(broken.rollout, "response_logprobs", (0.0,))
    with pytest.raises(ValueError, match="output 3 of prompt p7: 1 log-probs for 3 response tokens"):
        build_samples([broken], run_config(), step=0)
