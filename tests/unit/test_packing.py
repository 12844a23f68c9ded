"""Packing samples into chunks: nothing lost, nothing over capacity, every rank busy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.packing import pack, pack_indices, unpack
from r1mega.samples import PackedBatch, Sample


def make_samples(lengths: list[int], *, optional: bool = True) -> list[Sample]:
    """Samples of n tokens each, with values unlike any other sample's."""
    rng = np.random.default_rng()

    def values(n: int) -> np.ndarray:
        return rng.random(n - 1, dtype=np.float32) + 0.5

    return [
        Sample(
            token_ids=rng.integers(1, 50_000, n),
            loss_mask=np.ones(n - 1, np.float32),
            token_weights=values(n),
            advantages=values(n) if optional else None,
            rollout_logprobs=values(n) if optional else None,
            routed_experts=rng.integers(0, 256, (n - 1, 2, 3), np.uint8) if optional else None,
        )
        for n in lengths
    ]


def sequences_of(batch: PackedBatch) -> list[slice]:
    bounds = batch.cu_seqlens_S.tolist()
    slices = [slice(a, b) for a, b in pairwise(bounds)]
    return slices[:-1] if batch.num_padding else slices


LENGTHS = st.lists(st.integers(2, 65), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.sampled_from([1, 2, 8]))
def test_every_sample_lands_exactly_once_with_all_its_fields(lengths, num_ranks, align):
    samples = make_samples(lengths)
    plan = pack_indices(np.array(lengths) - 1, num_ranks, 64, align)
    batches_of_rank = pack(samples, num_ranks, 64, align)
    assert sorted(i for chunks in plan for chunk in chunks for i in chunk) == list(range(len(samples)))
    for chunks, batches in zip(plan, batches_of_rank, strict=True):
        for chunk, batch in zip(chunks, batches, strict=True):
            slices = sequences_of(batch)
            assert len(slices) == len(chunk)
            for i, where in zip(chunk, slices, strict=True):
                sample = samples[i]
                assert batch.tokens_T[where].tolist() == sample.token_ids[:-1].tolist()
                assert batch.targets_T[where].tolist() == sample.token_ids[1:].tolist()
                assert batch.positions_T[where].tolist() == list(range(len(sample.token_ids) - 1))
                for name in ("loss_mask", "token_weights", "advantages", "rollout_logprobs"):
                    packed = getattr(batch, name + "_T")[where].numpy()
                    np.testing.assert_array_equal(packed, getattr(sample, name))
                np.testing.assert_array_equal(batch.experts_TLK[where].numpy(), sample.routed_experts)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.sampled_from([1, 2, 8]))
def test_chunks_respect_capacity_alignment_and_equal_number(lengths, num_ranks, align):
    batches_of_rank = pack(make_samples(lengths), num_ranks, 64, align)
    assert len(batches_of_rank) == num_ranks
    assert len({len(batches) for batches in batches_of_rank}) == 1
    for batch in (batch for batches in batches_of_rank for batch in batches):
        num_tokens = len(batch.tokens_T)
        assert 0 < num_tokens <= 64
        assert num_tokens % align == 0
        assert batch.cu_seqlens_S[-1] == num_tokens
        assert batch.cu_seqlens_S.dtype == torch.int32
        assert batch.tokens_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == torch.int64
        assert batch.loss_mask_T.dtype == batch.token_weights_T.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_a_chunk_is_empty_only_where_there_are_fewer_samples_than_chunks(lengths, num_ranks):
    plan = pack_indices(np.array(lengths) - 1, num_ranks, 64)
    chunks = [chunk for chunks in plan for chunk in chunks]
    num_empty = sum(not chunk for chunk in chunks)
    assert num_empty == max(0, len(chunks) - len(lengths))


@pytest.mark.parametrize("capacity", [1024, 8192])
def test_the_number_of_chunks_is_near_the_lower_bound(capacity):
    lengths = np.random.default_rng().integers(1, capacity // 8, 20_000)
    chunks = sum(map(len, pack_indices(lengths, 1, capacity)))
    lower_bound = -(-int(lengths.sum()) // capacity)
    assert chunks <= lower_bound + 1


def test_best_fit_beats_first_fit_on_a_case_made_by_hand():
    # 6 + 4, 7 + 3, 10: best fit decreasing fills three chunks of 10 to the last token
    plan = pack_indices(np.array([3, 4, 10, 6, 7]), 1, 10)
    assert sorted(sorted(chunk) for chunk in plan[0]) == [[0, 4], [1, 3], [2]]


def test_ranks_get_nearly_equal_tokens():
    lengths = np.random.default_rng().integers(1, 400, 600)
    plan = pack_indices(lengths, 8, 8192)
    tokens_of_rank = [sum(int(lengths[i]) for chunk in chunks for i in chunk) for chunks in plan]
    assert max(tokens_of_rank) <= 1.05 * sum(tokens_of_rank) / 8


def test_padding_is_the_last_sequence_and_weighs_nothing():
    (batch,) = pack(make_samples([4, 5, 7]), 1, 64, align=16)[0]
    assert batch.num_padding == 3
    assert batch.num_sequences == 4
    assert batch.cu_seqlens_S.tolist()[-2:] == [13, 16]
    for values in (
        batch.tokens_T, batch.targets_T, batch.loss_mask_T, batch.token_weights_T,
        batch.advantages_T, batch.rollout_logprobs_T,
    ):  # fmt: skip
        assert not values[13:].any()
    assert batch.positions_T[13:].tolist() == [0, 1, 2]
    assert batch.experts_TLK[13:].tolist() == [[[0, 1, 2]] * 2] * 3, "a token's experts differ"


def test_without_alignment_there_is_no_padding():
    for batches in pack(make_samples([4, 5, 7, 2, 9]), 2, 12):
        assert [batch.num_padding for batch in batches] == [0] * len(batches)


@pytest.mark.parametrize("align, length", [(1, 2), (2, 2), (8, 8)])
def test_ranks_without_a_sample_get_a_chunk_of_padding_alone(align, length):
    batches_of_rank = pack(make_samples([5]), 3, 64, align)
    empty = [batches[0] for batches in batches_of_rank if batches[0].num_padding == len(batches[0].tokens_T)]
    assert len(empty) == 2
    for batch in empty:
        assert batch.cu_seqlens_S.tolist() == [0, length]
        assert batch.positions_T.tolist() == list(range(length))
        assert not batch.token_weights_T.any()
        assert batch.advantages_T is not None
        assert batch.experts_TLK.shape == (length, 2, 3)
        assert unpack(batch.loss_mask_T, batch) == []


def test_packing_twice_gives_the_same_plan():
    lengths = np.random.default_rng().integers(1, 100, 500)
    assert pack_indices(lengths, 4, 256, 8) == pack_indices(lengths, 4, 256, 8)


def test_unpack_returns_each_samples_values_in_the_plans_order():
    samples = make_samples([4, 9, 3, 6, 6])
    plan = pack_indices(np.array([3, 8, 2, 5, 5]), 2, 10, 4)
    for chunks, batches in zip(plan, pack(samples, 2, 10, 4)):
        for chunk, batch in zip(chunks, batches):
            for i, values in zip(chunk, unpack(batch.token_weights_T, batch), strict=True):
                np.testing.assert_array_equal(values.numpy(), samples[i].token_weights)


def test_fields_that_no_sample_has_stay_none():
    (batch,) = pack(make_samples([4, 5], optional=False), 1, 64)[0]
    assert batch.advantages_T is None
    assert batch.rollout_logprobs_T is None
    assert batch.old_logprobs_T is None
    assert batch.experts_TLK is None


def test_numbers_of_more_than_256_experts_survive():
    experts = np.array([[[300, 511]], [[0, 256]]], np.uint16)
    sample = Sample(np.arange(3), np.ones(2, np.float32), np.ones(2, np.float32), routed_experts=experts)
    ((batch,),) = pack([sample], 1, 16)
    assert batch.experts_TLK.tolist() == experts.tolist()


def test_a_sample_longer_than_a_chunk_is_named():
    with pytest.raises(
        ValueError, match=r"sequence 1 has 16 tokens, a chunk holds 12; raise tokens_per_chunk"
    ):
        pack(make_samples([5, 17, 3]), 1, 15, align=4)


def test_unusable_samples_are_named():
    with pytest.raises(ValueError, match="no samples"):
        pack([], 1, 16)
    with pytest.raises(ValueError, match="sample 1 has 1 tokens"):
        pack(make_samples([3, 1]), 1, 16)
    with pytest.raises(ValueError, match="samples 0 and 1 differ in having advantages"):
        pack(make_samples([3]) + make_samples([3], optional=False), 1, 16)
    short = Sample(np.arange(4), np.ones(3, np.float32), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="sample 0 has 4 tokens and 2 token_weights; it needs 3"):
        pack([short], 1, 16)
    with pytest.raises(ValueError, match=r"tokens_per_chunk is 3 .* multiple of 4"):
        pack(make_samples([3]), 1, 3, align=4)
