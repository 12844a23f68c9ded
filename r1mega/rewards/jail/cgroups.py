"""A cgroup around a whole fork server and its program, where the machine lets us make one: their memory and CPU time.

RLIMIT_AS bounds each process; the cgroup bounds all of them together, their tmpfs and shared memory included. It is
entered once, by the server before it runs: moving every program would cost more than running it. So the kernel may
choose the server as its victim; the host then says "memory" and starts another.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

NAME = "r1mega-jail"
SERVER_MIB = 64
"""What the server itself may hold beside the program."""
V1_MEMORY = Path("/sys/fs/cgroup/memory")
V1_PROCESSOR = (Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup/cpu,cpuacct"))
V2_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class Cgroup:
    version: str
    """"v1" or "v2"."""
    folder: Path
    processor: Path | None = None
    """Version 1 counts CPU time in a hierarchy of its own; None where we may not write there."""

    def enter(self, pid: int) -> None:
        for folder in self._folders():
            (folder / "cgroup.procs").write_text(str(pid))

    def exists(self) -> bool:
        return all(folder.is_dir() for folder in self._folders())

    def cpu_seconds(self) -> float:
        """Of everything that ever ran here, waited for or not; 0 where nobody counts it."""
        try:
            if self.version == "v2":
                counts = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
                return int(counts["usage_usec"]) / 1e6
            return int((self.processor / "cpuacct.usage").read_text()) / 1e9 if self.processor else 0.0
        except FileNotFoundError:
            return 0.0

    def _folders(self) -> list[Path]:
        return [self.folder, *([self.processor] if self.processor else [])]

    def limit(self, memory_mib: int) -> None:
        """Of all programs of the jail together, beside the server."""
        amount = str((memory_mib + SERVER_MIB) << 20)
        if self.version == "v2":
            (self.folder / "memory.max").write_text(amount)
            _write_if_there(self.folder / "memory.swap.max", "0")
            return
        swap = self.folder / "memory.memsw.limit_in_bytes"
        _write_if_there(swap, "-1")
        (self.folder / "memory.limit_in_bytes").write_text(amount)
        _write_if_there(swap, amount)

    def kills(self) -> int:
        """How often the kernel has killed here for want of memory."""
        name = "memory.events" if self.version == "v2" else "memory.oom_control"
        counts = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        """Once its last process has ended, which the kernel may finish a moment later."""
        deadline = time.monotonic() + REMOVE_SECONDS
        for folder in self._folders():
            while folder.is_dir():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)


def make_cgroup(slot: int) -> Cgroup | None:
    """None where the machine offers no memory cgroup that we may write."""
    name = f"{NAME}-{os.getpid()}-{slot}"
    for version, parent in _parents():
        _sweep(parent)
        folder = _unused(parent / name)
        try:
            folder.mkdir()
            cgroup = Cgroup(version, folder)
            cgroup.kills()
            cgroup.limit(SERVER_MIB)
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            continue
        return replace(cgroup, processor=_processor(name)) if version == "v1" else cgroup
    return None


def _processor(name: str) -> Path | None:
    """A new group of version 1 that counts CPU time."""
    for line in _own_groups():
        _, controllers, path = line.split(":", 2)
        if "cpuacct" not in controllers.split(","):
            continue
        for parent in (folder / part for folder in V1_PROCESSOR for part in (path.lstrip("/"), "")):
            _sweep(parent)
            try:
                folder = _unused(parent / name)
                folder.mkdir()
                return folder
            except OSError:
                continue
    return None


def _own_groups() -> list[str]:
    """Lines "number:controllers:path"."""
    ours = Path("/proc/self/cgroup")
    return ours.read_text().splitlines() if ours.exists() else []


def _parents() -> list[tuple[str, Path]]:
    """(version, folder) of cgroups in which a child with a memory limit may be possible, best first."""
    parents: list[tuple[str, Path]] = []
    for line in _own_groups():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            parents += [("v1", V1_MEMORY / path.lstrip("/")), ("v1", V1_MEMORY)]
        elif not controllers:
            for root in V2_ROOTS:
                own = root / path.lstrip("/")
                parents += [("v2", folder) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return [(version, folder) for version, folder in parents if version == "v1" or _gives_memory(folder)]


def _gives_memory(folder: Path) -> bool:
    """Whether children of this v2 group have the memory controller."""
    try:
        return "memory" in (folder / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


def _unused(folder: Path) -> Path:
    number = 0
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")


def _sweep(parent: Path) -> None:
    """Removes the empty groups of processes that were killed before they could."""
    for folder in parent.glob(f"{NAME}-*"):
        pid = folder.name.removeprefix(f"{NAME}-").split("-")[0]
        if not Path("/proc", pid).exists():
            try:
                folder.rmdir()
            except OSError:
                continue  # not empty, or not ours


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text)
