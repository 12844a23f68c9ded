"""What a reader needs to judge a timing: processor, memory, load, versions, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform as python_platform
import time
from pathlib import Path
from typing import Any

from r1mega.stages.run_directory import PACKAGES


def machine() -> dict[str, Any]:
    """Facts about this machine, in plain JSON. `load` is the mean number of running processes before the start."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": _field("/proc/cpuinfo", "model name") or python_platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "load": round(os.getloadavg()[0], 2),
        "kernel": python_platform.release(),
        "versions": {"python": python_platform.python_version()} | versions(PACKAGES),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _field(file: str, name: str) -> str:
    """The value of the first line `name : value`; empty where the system has no such file or line."""
    if not Path(file).is_file():
        return ""
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
