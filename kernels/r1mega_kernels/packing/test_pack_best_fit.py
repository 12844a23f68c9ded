"""The C++ packing solver against its definition in Python."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from r1mega_kernels.packing import pack_best_fit
from r1mega_kernels.packing.reference import best_fit_decreasing, bins_lower_bound


def loads(lengths: np.ndarray, bin_of_sequence: np.ndarray, num_bins: int) -> np.ndarray:
    return np.bincount(bin_of_sequence, weights=lengths, minlength=num_bins).astype(np.int64)


@pytest.mark.parametrize("capacity", [1, 7, 64, 65, 1000, 4096, 4097, 300_000])
def test_bins_fill_exactly_as_best_fit_decreasing_fills_them(capacity):
    lengths = np.random.default_rng().integers(1, capacity + 1, 2_000)
    lengths[::2] = -(-lengths[::2] // 9)
    bin_of_sequence, num_bins = pack_best_fit(lengths, capacity, 1)
    expected = best_fit_decreasing(lengths.tolist(), capacity)
    assert bin_of_sequence.dtype == np.int32
    assert num_bins == max(expected) + 1
    np.testing.assert_array_equal(
        np.sort(loads(lengths, bin_of_sequence, num_bins)),
        np.sort(loads(lengths, np.array(expected), num_bins)),
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 7, 64, 999, 5000])
def test_bins_are_a_multiple_of_ranks_and_none_stays_empty_without_need(num_ranks):
    lengths = np.random.default_rng().integers(1, 600, 1_000)
    bin_of_sequence, num_bins = pack_best_fit(lengths, 1000, num_ranks)
    assert num_bins % num_ranks == 0
    load = loads(lengths, bin_of_sequence, num_bins)
    assert load.max() <= 1000
    assert load.sum() == lengths.sum()
    assert (load == 0).sum() == max(0, num_bins - len(lengths))


@pytest.mark.parametrize("lengths", [[], [5], [10], [5, 5], [6, 6]])
def test_small_cases(lengths):
    bin_of_sequence, num_bins = pack_best_fit(np.array(lengths, dtype=np.int64), 10, 4)
    assert num_bins == 4
    assert len(set(bin_of_sequence.tolist())) == len(lengths)  # spread over the ranks


def test_fill_is_within_two_hundredths_of_a_percent_of_the_lower_bound():
    lengths = np.random.default_rng().lognormal(7.5, 1.0, 300_000).clip(16, 32768).astype(np.int64)
    _, num_bins = pack_best_fit(lengths, 32768, 1)
    bound = bins_lower_bound(lengths, 32768)
    assert bound <= num_bins <= bound * 1.0002 + 1


def test_the_result_is_a_function_of_the_arguments():
    lengths = np.random.default_rng().integers(1, 600, 5_000)
    first, _ = pack_best_fit(lengths, 1000, 7)
    again, _ = pack_best_fit(np.repeat(lengths, 2)[::2], 1000, 7)  # not contiguous
    np.testing.assert_array_equal(first, again)


def test_other_threads_run_meanwhile():
    lengths = np.random.default_rng().integers(1, 2**24 + 1, 2_000_000)
    done = threading.Event()
    ticks = 0

    def work() -> None:
        pack_best_fit(lengths, 2**24, 1)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 2


@pytest.mark.parametrize(
    "lengths, capacity, num_ranks, message",
    [
        (np.array([3, 11]), 10, 1, "sequence 1 has 11 tokens, a chunk holds 10; raise tokens_per_chunk"),
        (np.array([3, 0]), 10, 1, "sequence 1 has 0 tokens; drop empty"),
        (np.array([3, -1]), 10, 1, "sequence 1 has -1 tokens"),
        (np.array([3.0]), 10, 1, "int64 array, got dtype float64"),
        (np.array([[3]]), 10, 1, "with 2 dims"),
        (np.array([3]), 0, 1, "capacity is 0"),
        (np.array([3]), 2**24 + 1, 1, r"capacity is 16777217 tokens; it must lie in \[1, 16777216\]"),
        (np.array([3]), 10, 0, "num_ranks is 0"),
    ],
)
def test_bad_input_is_named(lengths, capacity, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        pack_best_fit(lengths, capacity, num_ranks)
