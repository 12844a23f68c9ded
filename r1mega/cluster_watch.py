"""Ends what a killed driver leaves behind: `python cluster_watch.py DRIVER_PID FOLDER`, started by cluster.py.

A driver that ends normally stops Ray itself. After `kill -9` Ray's agents outlive it for a minute and workers'
own children may stay. This process sleeps until the driver is gone, however it went, then kills every process
of that private cluster and removes its folder. Only the standard library, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator

VARIABLE = "R1MEGA_CLUSTER"
"""Environment variable that marks a private cluster's processes with its folder."""
SWEEPS = 50
PAUSE_SECONDS = 0.1


def processes_of(folder: str) -> Iterator[int]:
    """Processes of this user marked with the folder, or holding a file in it open.

    Both are looked at because a process that renames itself overwrites the environment that others see.
    """
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and _belongs(f"/proc/{name}", folder):
            yield int(name)


def _belongs(process: str, folder: str) -> bool:
    try:
        with open(f"{process}/environ", "rb") as environ:
            if f"{VARIABLE}={folder}".encode() in environ.read().split(b"\0"):
                return True
        files = (os.readlink(f"{process}/fd/{number}") for number in os.listdir(f"{process}/fd"))
        return any(file.startswith(f"{folder}/") for file in files)
    except OSError:  # ended meanwhile, or another user's
        return False


def end_all(folder: str) -> None:
    """Kill until a sweep finds nothing: a process may start another while it is being killed."""
    for _ in range(SWEEPS):
        found = list(processes_of(folder))
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def main(driver: int, folder: str) -> None:
    try:
        watched = os.pidfd_open(driver)
    except ProcessLookupError:
        end_all(folder)
        return
    select.select([watched], [], [])
    if os.path.isdir(folder):
        end_all(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
