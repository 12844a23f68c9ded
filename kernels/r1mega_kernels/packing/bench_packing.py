"""Packs a million sequences: time and fill, beside best fit in plain Python.

    python -m r1mega_kernels.packing.bench_packing [--sequences N] [--json FILE]

Python is timed on `python_sequences` and scaled up linearly, which flatters it: its cost per sequence grows
with the number of bins. Times are CPU times of one thread (on a free core: wall time), the C++ one a
median; the lower bound is Martello and Toth's L2.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from r1mega_kernels.bench import JSON_HELP, keep
from r1mega_kernels.packing import pack_best_fit
from r1mega_kernels.packing.reference import best_fit_decreasing, bins_lower_bound


def draw_lengths(num: int, capacity: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = {
        "long tail, mean 3K": rng.lognormal(7.5, 1.0, num),
        "long tail, mean 7K": rng.lognormal(8.5, 0.9, num),
        "short answers, mean 200": rng.normal(200, 60, num),
        "uniform up to the chunk": rng.integers(1, capacity + 1, num),
    }
    return {name: values.clip(16, capacity).astype(np.int64) for name, values in lengths.items()}


def measure(name: str, lengths: np.ndarray, capacity: int, repeats: int, python_sequences: int) -> dict:
    bin_of_sequence, num_bins = pack_best_fit(lengths, capacity, 1)
    load = np.bincount(bin_of_sequence, weights=lengths, minlength=num_bins)
    assert load.max() <= capacity, f"{name}: a chunk holds {load.max()} tokens"
    assert load.sum() == lengths.sum(), f"{name}: tokens were lost"
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        pack_best_fit(lengths, capacity, 1)
        seconds.append(time.process_time() - start)
    few = lengths[:python_sequences].tolist()
    start = time.process_time()
    best_fit_decreasing(few, capacity)
    python_seconds = (time.process_time() - start) * len(lengths) / len(few)
    bound = bins_lower_bound(lengths, capacity)
    milliseconds = 1e3 * statistics.median(seconds)
    return {
        "lengths": name,
        "sequences": len(lengths),
        "capacity": capacity,
        "milliseconds": milliseconds,
        "milliseconds_best": 1e3 * min(seconds),
        "bins": num_bins,
        "lower_bound": bound,
        "over_bound_percent": 100 * (num_bins / bound - 1),
        "python_milliseconds_extrapolated": 1e3 * python_seconds,
        "python_measured_on": len(few),
        "speedup": 1e3 * python_seconds / milliseconds,
    }


def run(
    num_sequences: int = 1_000_000,
    capacity: int = 32768,
    repeats: int = 7,
    python_sequences: int = 20_000,
) -> list[dict]:
    """Prints the table and returns its rows."""
    print(f"{num_sequences:,} sequences into chunks of {capacity:,} tokens")
    print(f"{'lengths':26}{'C++ ms':>8}{'bins':>9}{'bound':>9}{'over':>9}{'Python ms*':>12}{'ratio':>7}")
    rows = []
    for name, lengths in draw_lengths(num_sequences, capacity).items():
        row = measure(name, lengths, capacity, repeats, python_sequences)
        rows.append(row)
        print(
            f"{name:26}{row['milliseconds']:8.1f}{row['bins']:9}{row['lower_bound']:9}"
            f"{row['over_bound_percent']:8.4f}%{row['python_milliseconds_extrapolated']:12.0f}"
            f"{row['speedup']:6.0f}x"
        )
    print(f"* measured on {min(python_sequences, num_sequences):,} sequences, scaled linearly")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--python-sequences", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help=JSON_HELP)
    args = parser.parse_args()
    keep("packing", run(args.sequences, args.capacity, args.repeats, args.python_sequences), "cpu", args.json)


if __name__ == "__main__":
    main()
