"""What the kernels' benchmarks share: clocks that fit the device, the command line, and the search for parameters.

`--tune` replaces the benchmark: every candidate of every tunable (tuning.py) is checked, then they take turns on fresh
random data, and the fastest goes into the device's file at once: what follows is measured with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from r1mega_kernels import tuning
from r1mega_kernels.tuning import Entry, Parameters, Tunable

NEEDS_A_GPU = "--tune: tuning needs a GPU, and none is here; without it the defaults serve"
MARGIN = 0.98
"""Of the default's time: what is not faster than this does not take its place."""


def seconds(device: str) -> float:
    """CPU time of this process, for a CPU is shared; the clock of a GPU that has come to rest."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(microseconds, result): CPU time, or the GPU's time between two events."""
    if device == "cpu":
        start = time.process_time()
        result = work()
        return 1e6 * (time.process_time() - start), result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(
        2_000_000
    )  # the launches queue up behind it: what follows is the GPU's time, not Python's
    begin.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end), result


@dataclass(frozen=True)
class Trial:
    """One tunable in one size."""

    tunable: Tunable
    check: Callable[[], object]
    """Raises AssertionError where results are wrong; runs the kernel."""
    make_inputs: Callable[[], Any]
    """Fresh random ones."""
    call: Callable[[Any], Any]
    """What is timed: runs the kernel on them."""


def tune(trials: Iterable[Trial], device: str, device_name: str, repeats: int) -> list[dict[str, Any]]:
    """Prints tables, keeps the fastest candidate after each trial, and returns the tables' rows.

    A candidate that gives wrong results or cannot be launched is dropped, and said so; the default's error rises.
    """
    with tuning.writing():
        return [row for trial in trials for row in _tried(trial, device, device_name, repeats)]


def _tried(trial: Trial, device: str, device_name: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    name, default = trial.tunable.name, trial.tunable.candidates[0]
    alive = [parameters for parameters in trial.tunable.candidates if _is_right(trial, parameters)]
    times: list[list[float]] = [[] for _ in alive]
    asked: set[str] = set()
    for repeat in range(repeats + 1):  # the first turn warms up
        inputs = trial.make_inputs()
        for parameters, taken in zip(alive, times, strict=True):
            with trial.tunable.forced(parameters) as shapes:
                microseconds, _ = timed(lambda: trial.call(inputs), device)  # noqa: B023 (called at once)
            asked |= shapes
            if repeat:
                taken.append(microseconds)
    assert asked, f"{name}: the trial never launched it"
    medians = [statistics.median(taken) for taken in times]
    fastest = min(range(len(alive)), key=medians.__getitem__)
    if medians[fastest] > MARGIN * medians[0]:
        fastest = 0
    best = Entry(alive[fastest], medians[fastest], medians[0], torch.__version__, version("triton"))
    file = tuning.write(device_name, {name: dict.fromkeys(asked, best)})
    print(f"\n{name}, {', '.join(sorted(asked))}\n{'microseconds':>14}{'of default':>12}  parameters")
    for parameters, median in sorted(zip(alive, medians), key=lambda pair: pair[1]):
        mark = " (default)" if parameters == default else ""
        mark += " <- kept" if parameters == alive[fastest] else ""
        print(f"{median:14.1f}{median / medians[0]:12.3f}  {_text(parameters)}{mark}")
        row = {"tunable": name, "shapes": sorted(asked), "parameters": parameters, "microseconds": median}
        rows.append(row | {"kept": parameters == alive[fastest]})
    print(f"written to {file}")
    return rows


def check_can_tune() -> None:
    """ValueError without a GPU to tune for, or a place to keep what is found."""
    if not torch.cuda.is_available():
        raise ValueError(NEEDS_A_GPU)
    tuning.check_writable()


def _is_right(trial: Trial, parameters: Parameters) -> bool:
    from triton.errors import TritonError

    try:
        with trial.tunable.forced(parameters):
            trial.check()
    except (AssertionError, TritonError) as error:
        if parameters == trial.tunable.candidates[0]:
            raise
        print(
            f"DROPPED {trial.tunable.name} {_text(parameters)}: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
        return False
    return True


def _text(parameters: Parameters) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def main(
    run: Callable[[str, int], Any],
    description: str | None,
    devices: Iterable[str],
    repeats: int = 9,
    trials: Callable[[str], list[Trial]] | None = None,
) -> None:
    """`run(device, repeats)` prints its table and returns rows for --json; trials(device) are what can be tuned."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=sorted(devices), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    if trials:
        parser.add_argument("--tune", action="store_true", help="find this GPU's parameters and keep them")
    args = parser.parse_args()
    if trials and args.tune:
        if args.device == "cpu":
            parser.exit(2, f"{NEEDS_A_GPU}\n")
        rows = tune(trials(args.device), args.device, torch.cuda.get_device_name(), args.repeats)
    else:
        rows = run(args.device, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
