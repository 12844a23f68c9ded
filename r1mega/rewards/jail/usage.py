"""CPU time and memory of everything that runs in a jail, as /proc on the host tells it.

RLIMIT_CPU counts whole seconds of one process; this counts all processes, and those that have ended, to 10 ms. It is
read only for programs that have run for a while.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MAX_COUNTED = 2000
FIRST_TIME = 11
"""utime, stime, cutime, cstime in /proc/pid/stat, counted after the name."""
STARTED = 19
RESIDENT = 21


@dataclass(frozen=True)
class Usage:
    cpu_seconds: float
    memory_bytes: int
    """Resident, without what each process shares with the server it was forked from."""


def usage_below(server_pid: int, seen_ticks: dict[tuple[int, int], int]) -> Usage:
    """Of the descendants of a fork server.

    seen_ticks: own CPU time of each process (and when it started) at the last call, for the next call: a process that
    ended and whose parent ignores that is in nobody's time. What such a process used since it was last seen is lost.
    """
    baseline = _numbers(server_pid)
    shared = baseline[RESIDENT] if baseline else 0
    ticks = pages = 0
    waiting = children_of(server_pid)
    seen = 0
    while waiting and seen < MAX_COUNTED:
        pid = waiting.pop()
        seen += 1
        numbers = _numbers(pid)
        if numbers:
            ticks += sum(numbers[FIRST_TIME : FIRST_TIME + 4])
            seen_ticks[pid, numbers[STARTED]] = sum(numbers[FIRST_TIME : FIRST_TIME + 2])
            pages += max(0, numbers[RESIDENT] - shared)
            waiting += children_of(pid)
    ticks = max(ticks, sum(seen_ticks.values()))
    return Usage(ticks / TICKS_PER_SECOND, pages * PAGE_BYTES)


def process_cpu_seconds(pid: int) -> float:
    """Of a process and those of its children that have ended; 0 if it has ended itself."""
    return sum(_numbers(pid)[FIRST_TIME : FIRST_TIME + 4]) / TICKS_PER_SECOND


def _numbers(pid: int) -> list[int]:
    """Fields of /proc/pid/stat after the name and the state; empty if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return [0, *(int(field) for field in text.rpartition(")")[2].split()[1:])]


def children_of(pid: int) -> list[int]:
    """Children of all its threads; empty if it has ended or the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    except OSError:
        return []
    return children
