"""A memory cgroup around a whole fork server and its program, where the machine lets us make one.

RLIMIT_AS bounds each process; the cgroup bounds all of them together, their tmpfs and shared memory included. It is
entered once, by the server before it runs: moving every program would cost more than running it. So the kernel may
choose the server as its victim; the host then says "memory" and starts another.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

NAME = "r1mega-jail"
SERVER_MIB = 64
"""What the server itself may hold beside the program."""
V1_MEMORY = Path("/sys/fs/cgroup/memory")
V2_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class Cgroup:
    version: str
    """"v1" or "v2"."""
    folder: Path

    def enter(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

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
        while True:
            try:
                self.folder.rmdir()
                return
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
        return cgroup
    return None


def _parents() -> list[tuple[str, Path]]:
    """(version, folder) of cgroups in which a child with a memory limit may be possible, best first."""
    parents: list[tuple[str, Path]] = []
    ours = Path("/proc/self/cgroup")
    for line in ours.read_text().splitlines() if ours.exists() else []:
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
