"""What the kernels' benchmarks share: providers that take turns, the command line, the record, the search for parameters.

On CPU the unit is CPU time of one process and the best turn counts, for other work on the machine only ever adds; on a GPU it
is the time between two events, and the median counts.

`--tune` replaces the benchmark: every candidate of every tunable (tuning.py) is checked, then they take turns on fresh
random data, and the fastest goes into the device's file at once: what follows is measured with it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from r1mega_kernels import tuning
from r1mega_kernels.tuning import Entry, Parameters, Tunable

NEEDS_A_GPU = "--tune: tuning needs a GPU, and none is here; without it the defaults serve"
MARGIN = 0.98
"""Of the default's time: what is not faster than this does not take its place."""


PEERS = ("torch", "triton", "megatron-core", "transformer-engine", "liger-kernel", "cut-cross-entropy")
"""Distributions whose versions a reader of the numbers needs; none but torch must be there."""
RECORDS = Path(__file__).parents[2] / "docs" / "benchmarks"
"""Of the checkout that this file lies in."""


@dataclass(frozen=True)
class Measured:
    milliseconds: float
    peak_mebibytes: float | None
    """Beyond what lay there before; None on a CPU, where nothing counts it."""

    def row(self, ours: Measured, floor: Measured | None) -> dict[str, float | None]:
        """For the record: beside the kernel's and its floor's own."""
        return {
            "milliseconds": self.milliseconds,
            "share_of_floor": floor.milliseconds / self.milliseconds if floor else None,
            "own_is_faster_by": self.milliseconds / ours.milliseconds,
            "peak_mebibytes": self.peak_mebibytes,
        }


def take_turns(
    providers: Mapping[str, Callable[[Any], Any]], make_inputs: Callable[[], Any], device: str, repeats: int
) -> dict[str, Measured]:
    """Each provider's time, all on the same inputs, which are fresh and random each turn; the first turn warms up.

    Another one begins each turn, for who begins pays for memory that the system hands out anew.
    A peer that fails is left out, and said so; what fails of "own" and "floor" rises.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    peaks = dict.fromkeys(providers, 0.0)
    for repeat in range(repeats + 1):
        inputs = make_inputs()
        names = list(times)
        begin = repeat % len(names)
        for name in names[begin:] + names[:begin]:
            before = _start_of_peak(device)
            try:
                microseconds = timed(partial(providers[name], inputs), device)[0]
            except Exception as error:
                if name in ("own", "floor"):
                    raise
                print(f"LEFT OUT {name}: {type(error).__name__}: {error}", file=sys.stderr)
                del times[name]
                continue
            if repeat:
                times[name].append(microseconds / 1e3)
                if device == "cuda":
                    peaks[name] = max(peaks[name], (torch.cuda.max_memory_allocated() - before) / 2**20)
    return {
        name: Measured(summary(taken, device), peaks[name] if device == "cuda" else None)
        for name, taken in times.items()
    }


def compiled(function: Callable) -> Callable:
    """By torch.compile for the shapes that follow, without what it kept of those before: it gives up after eight."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def summary(times: Sequence[float], device: str) -> float:
    return min(times) if device == "cpu" else statistics.median(times)


def peers() -> dict[str, str]:
    """Versions of those of PEERS that are installed."""
    found = {name: [one.version for one in distributions(name=name)] for name in PEERS}
    return {name: versions[0] for name, versions in found.items() if versions}


def of_peak(mebibytes: float | None) -> str:
    """Nine characters of a table."""
    return f"{'-':>9}" if mebibytes is None else f"{mebibytes:9.0f}"


def _start_of_peak(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


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
    op: str,
    run: Callable[[str, int], Any],
    description: str | None,
    devices: Iterable[str],
    repeats: int = 9,
    trials: Callable[[str], list[Trial]] | None = None,
) -> None:
    """`run(device, repeats)` prints its table and returns rows to keep; trials(device) are what can be tuned."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=sorted(devices), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, help=JSON_HELP)
    if trials:
        parser.add_argument("--tune", action="store_true", help="find this GPU's parameters and keep them")
    args = parser.parse_args()
    if not (trials and args.tune):
        keep(op, run(args.device, args.repeats), args.device, args.json)
        return
    if args.device == "cpu":
        parser.exit(2, f"{NEEDS_A_GPU}\n")
    rows = tune(trials(args.device), args.device, torch.cuda.get_device_name(), args.repeats)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


JSON_HELP = "write the rows here, and not into the checkout's docs/benchmarks/kernels_DEVICE.json"


def keep(op: str, rows: list[dict[str, Any]], device: str, file: Path | None) -> None:
    """Rows to `file`; without one, in a checkout, to docs/benchmarks/kernels_<device>.json, beside other operators'."""
    if file:
        file.write_text(json.dumps(rows, indent=2))
        return
    if not RECORDS.is_dir():
        print("not kept: no checkout with docs/benchmarks here; --json FILE keeps the rows")
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    file = RECORDS / f"kernels_{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    record[op] = {"measured": _circumstances(name), "rows": rows}
    partial_file = file.with_name(f".writing-{file.name}")
    partial_file.write_text(_a_row_a_line(record))
    os.replace(partial_file, file)
    print(f"written to {file}")


def _a_row_a_line(record: Mapping[str, Any]) -> str:
    operators = []
    for op in sorted(record):
        rows = ",\n  ".join(json.dumps(_six_digits(row)) for row in record[op]["rows"])
        measured = json.dumps(record[op]["measured"])
        operators.append(f'{json.dumps(op)}: {{\n "measured": {measured},\n "rows": [\n  {rows}\n ]}}')
    return "{\n" + ",\n".join(operators) + "\n}\n"


def _six_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _six_digits(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def _circumstances(device_name: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers. load: the mean number of running processes of the last minute."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device_name,
        "processor": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": peers(),
    }
