"""What the kernels' benchmarks share: a clock that fits the device, and the command line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def seconds(device: str) -> float:
    """CPU time of this process, for a CPU is shared; the clock of a GPU that has come to rest."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main(
    run: Callable[[str, int], Any], description: str | None, devices: Iterable[str], repeats: int = 9
) -> None:
    """`run(device, repeats)` prints its table and returns rows for --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=sorted(devices), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    rows = run(args.device, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
