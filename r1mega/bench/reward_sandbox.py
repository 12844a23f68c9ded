"""What a jail costs: trivial programs one after another and from two slots, the weaker mode beside them, C++.

Wall times are the best of several rounds, because other work on the machine can only add to them; the CPU time of a run
(ours, the server's and the program's together) stands beside.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from r1mega.bench.reward_rows import Row
from r1mega.config import ConfigError
from r1mega.rewards.jail.usage import process_cpu_seconds
from r1mega.rewards.sandbox import Sandbox

TRIVIAL = "print(1)"
CPP = "#include <iostream>\nint main() {{ std::cout << {number}; }}\n"
ROUNDS = 5
RUNS = 100
RUNS_OF_PROCESSES = 4
COMPILATIONS = 2


def measure(shared: Path | None = None) -> list[Row]:
    """About 15 s. Data is generated; `shared` is not used. A mode that this machine refuses has its reason as a row."""
    return [*_measured("full", _full), *_measured("process", _process)]


def _measured(isolation: str, rows: Callable[[Sandbox], list[Row]]) -> list[Row]:
    try:
        with Sandbox(slots=2, isolation=isolation) as sandbox:
            return rows(sandbox)
    except ConfigError as refusal:
        return [Row(f"jail, isolation={isolation}", 0.0, "available", note=str(refusal))]


def _full(sandbox: Sandbox) -> list[Row]:
    wall, cpu = _sequential(sandbox, RUNS)
    rows = [
        Row("jail, trivial run", wall * 1e3, "ms", "<= 5", sandbox.isolation),
        Row("jail, trivial run, CPU", cpu * 1e3, "ms", "", "host, server and program"),
        Row("jail, two slots", _throughput(sandbox, RUNS), "runs/s", ">= 400", f"{os.cpu_count()} cores"),
    ]
    return rows + _cpp(sandbox)


def _process(sandbox: Sandbox) -> list[Row]:
    wall, _ = _sequential(sandbox, RUNS_OF_PROCESSES)
    rate = _throughput(sandbox, RUNS_OF_PROCESSES)
    return [
        Row("process per run, trivial run", wall * 1e3, "ms", "", sandbox.isolation),
        Row("process per run, two slots", rate, "runs/s", "", f"{os.cpu_count()} cores"),
    ]


def _sequential(sandbox: Sandbox, runs: int) -> tuple[float, float]:
    """Seconds of wall and of CPU per run, each the best of ROUNDS."""
    walls, cpus = [], []
    for _ in range(ROUNDS):
        cpu, wall = _cpu_seconds(sandbox), time.perf_counter()
        for _ in range(runs):
            _checked(sandbox, TRIVIAL)
        walls.append(time.perf_counter() - wall)
        cpus.append(_cpu_seconds(sandbox) - cpu)
    return min(walls) / runs, min(cpus) / runs


def _throughput(sandbox: Sandbox, runs: int) -> float:
    """Runs per second, the best of ROUNDS."""
    best = 0.0
    with ThreadPoolExecutor(sandbox.slots) as threads:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(threads.map(lambda _: _checked(sandbox, TRIVIAL), range(2 * runs)))
            best = max(best, 2 * runs / (time.perf_counter() - began))
    return best


def _cpp(sandbox: Sandbox) -> list[Row]:
    first: list[float] = []
    again: list[float] = []
    try:
        for number in range(COMPILATIONS):
            source = CPP.format(number=number)
            for times in (first, again):
                began = time.perf_counter()
                result = sandbox.run(source, language="c++")
                assert result.stdout == b"%d" % number, result
                times.append(time.perf_counter() - began)
    except ConfigError as refusal:
        return [Row("jail, C++", 0.0, "available", note=str(refusal))]
    return [
        Row("jail, C++ compile and run", min(first) * 1e3, "ms", "", "g++ -O2 in a jail, iostream"),
        Row("jail, C++ run again", min(again) * 1e3, "ms", "", "compiled before"),
    ]


def _checked(sandbox: Sandbox, source: str) -> None:
    result = sandbox.run(source)
    assert (result.outcome, result.stdout) == ("exited", b"1\n"), result


def _cpu_seconds(sandbox: Sandbox) -> float:
    """Of this process and the servers with all their programs so far."""
    return time.process_time() + sum(process_cpu_seconds(pid) for pid in sandbox.server_pids())
