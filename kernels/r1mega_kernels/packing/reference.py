"""Best-fit-decreasing packing in plain Python: the definition, and the lower bound it is judged by."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Bin of each sequence: longest first, each into the fullest bin that takes it (a sorted list of bins)."""
    bin_of_sequence = [0] * len(lengths)
    open_bins: list[tuple[int, int]] = []  # (remaining, bin), ascending
    num_bins = 0
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        slot = bisect_left(open_bins, (lengths[sequence], -1))
        if slot == len(open_bins):
            remaining, number = capacity, num_bins
            num_bins += 1
        else:
            remaining, number = open_bins.pop(slot)
        insort(open_bins, (remaining - lengths[sequence], number))
        bin_of_sequence[sequence] = number
    return bin_of_sequence


def bins_lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """A number of bins no packing can undercut: Martello and Toth's L2 (1990).

    For each threshold k: sequences above capacity - k need a bin of their own, which takes none of k or more;
    those above capacity / 2 need one each; the tokens of those in [k, capacity / 2] fill the rest.
    """
    ascending = np.sort(np.asarray(lengths, dtype=np.int64))
    tokens_before = np.concatenate([[0], np.cumsum(ascending)])
    half = np.searchsorted(ascending, capacity // 2, side="right")
    thresholds = np.unique(np.concatenate([[0], ascending[:half]]))
    own_bin = np.searchsorted(ascending, capacity - thresholds, side="right")
    small = np.searchsorted(ascending, thresholds, side="left")
    num_large = own_bin - half
    free_beside_large = num_large * capacity - (tokens_before[own_bin] - tokens_before[half])
    left_over = np.maximum(0, tokens_before[half] - tokens_before[small] - free_beside_large)
    return int((len(ascending) - own_bin + num_large + -(-left_over // capacity)).max())
