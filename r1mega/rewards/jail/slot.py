"""A place for one program at a time: a user, a cgroup, and a fork server that is replaced when it dies."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Executor

from r1mega.rewards.jail import container, landlock
from r1mega.rewards.jail.cgroups import make_cgroup
from r1mega.rewards.jail.fork_server import ForkServer, start_fork_server


class Slot:
    """Used by one thread at a time, except `end`, `server_pid` and `discard_server`."""

    def __init__(self, number: int, namespaces: bool, spawner: Executor) -> None:
        self.number = number
        self.namespaces = namespaces
        self._spawner = spawner
        self._lock = threading.Lock()
        """Of the two below: a server is only signalled while it is ours."""
        self._server: ForkServer | None = None
        self._ended = False
        self._limit_mib = 0
        self._kills = 0
        self._cgroup = make_cgroup(number)

    def server(self) -> ForkServer:
        """A live one. ConfigError if none starts, RuntimeError after `end`."""
        return self._live() or self._spawner.submit(self._start).result()

    def _live(self) -> ForkServer | None:
        with self._lock:
            if self._ended:
                raise RuntimeError("the sandbox is closed")
            if self._server is not None and self._server.alive():
                return self._server
        self.discard_server()
        return None

    def _start(self) -> ForkServer:
        """In the thread of the spawner, so one after the other."""
        server = self._live()  # of somebody who was interrupted while he waited
        if server is not None:
            return server
        if self._cgroup and not self._cgroup.exists():
            self._cgroup, self._limit_mib, self._kills = make_cgroup(self.number), 0, 0
        server = start_fork_server(self.number, namespaces=self.namespaces, cgroup=self._cgroup)
        with self._lock:
            if not self._ended:
                self._server = server
                return server
        server.stop()
        raise RuntimeError("the sandbox is closed")

    def server_pid(self) -> int | None:
        """On the host; None while there is none."""
        with self._lock:
            return self._server.box.server_pid if self._server else None

    def discard_server(self) -> None:
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.stop()

    def end(self) -> None:
        """Ends what runs here, from another thread; no server starts here again."""
        with self._lock:
            self._ended = True
            if self._server is not None:
                self._server.abort()

    def limit_memory(self, memory_mib: int) -> None:
        """Of the next program with all its processes, where there is a cgroup."""
        if self._cgroup and memory_mib != self._limit_mib:
            self._cgroup.limit(memory_mib)
            self._limit_mib = memory_mib

    def cpu_seconds(self) -> float:
        """Of everything that ever ran here, where a cgroup counts it; else 0."""
        return self._cgroup.cpu_seconds() if self._cgroup else 0.0

    def was_out_of_memory(self) -> bool:
        """Whether the kernel has killed for want of memory here since the last time it was asked."""
        if self._cgroup is None:
            return False
        before, self._kills = self._kills, self._cgroup.kills()
        return self._kills > before

    def program_user(self) -> int:
        """As which the program runs, in the user namespace of its server; 0: as the server."""
        if os.geteuid() != 0:
            return 0
        return container.PROGRAM_USER if self.namespaces else container.host_user(self.number)

    def shares_our_user(self) -> bool:
        return os.geteuid() != 0

    def close(self) -> None:
        self.discard_server()
        if self._cgroup:
            self._cgroup.remove()

    def isolation(self) -> str:
        """One line: what is in force."""
        user = (
            "our uid without capabilities"
            if self.shares_our_user()
            else f"own uid {container.host_user(self.number)}"
        )
        memory = f"memory cgroup {self._cgroup.version}" if self._cgroup else "no cgroup"
        if self.namespaces:
            kinds = "user, pid, mount, network, ipc and uts namespaces; read-only root; private tmpfs"
            return f"full: {kinds}; seccomp; rlimits; {user}; {memory}"
        files = "files closed by landlock" if landlock.version() else "files open as its user may read them"
        if container.library_is_closed(self.program_user()):
            files += ", modules that are not imported beforehand as well"
        return f"process: no namespaces, a process per program; seccomp; rlimits; {user}; {files}; {memory}"
