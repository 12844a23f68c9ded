"""The parent's side of the nursery: one process that has imported everything and forks a worker on request.

A worker that exceeds a limit is killed, and importing sympy again would cost a CPU-second; a fork of a warm process
costs milliseconds and shares its memory. The nursery is the exec of a fresh interpreter with an empty environment
and a single thread, never a fork of ours: that would copy locks that torch, Ray or gloo threads hold.

Who dies when: the nursery with the thread that started it, its workers with the nursery (parent-death signals), so
that nothing outlives a killed trainer. A dead worker stays unreaped until it is buried here, so that its process id
names nobody else meanwhile; workers are killed by descriptor, which is right even after that.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_CHILD = (
    "import json, sys; known = set(sys.path); "
    "sys.path += [p for p in json.loads(sys.argv[4]) if p not in known]; "
    "from r1mega.rewards.worker_main import nurse; nurse(*map(int, sys.argv[1:4]))"
)
CLOSE_SECONDS = 10.0


@dataclass
class Child:
    """A forked worker process, named by pid and by a descriptor that no other process can take over."""

    pid: int
    descriptor: int

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # dead already
            signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)

    def close(self) -> None:
        os.close(self.descriptor)


class Nursery:
    """Starts in the background; `ready` once it has said so. Every call returns at once, except `close`."""

    def __init__(self, memory_mib: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ready = False
        self.connection = ours
        self._unanswered = [time.monotonic()]
        """When the requests were made that it has not answered, oldest first; the start counts as one."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the nursery)
        environment = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        arguments = [str(theirs.fileno()), str(os.getpid()), str(memory_mib), json.dumps(sys.path)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", _CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=environment,
                cwd="/",
                pass_fds=(theirs.fileno(),),
            )
        ours.setblocking(False)

    def fork(self, theirs: socket.socket, tag: int) -> None:
        """Asks for a worker that talks through `theirs`; the answer comes through `read`. OSError if it is gone."""
        socket.send_fds(self.connection, [json.dumps({"fork": tag}).encode()], [theirs.fileno()])
        self._unanswered.append(time.monotonic())

    def bury(self, child: Child) -> None:
        """Reaps a killed worker. OSError if the nursery is gone (and init has reaped it)."""
        self.connection.send(json.dumps({"bury": child.pid}).encode())

    def read(self) -> tuple[int, Child | None] | None:
        """The tag and process of a new worker (None: it died at once), or None for the news that it is `ready`.

        EOFError when the nursery is gone.
        """
        try:
            packet = self.connection.recv(1 << 12)
        except ConnectionError:
            packet = b""
        if not packet:
            raise EOFError
        self._unanswered.pop(0)
        message: dict[str, Any] = json.loads(packet)
        if "ready" in message:
            self.ready = True
            return None
        try:
            return message["forked"], Child(message["pid"], os.pidfd_open(message["pid"]))
        except ProcessLookupError:
            return message["forked"], None

    @property
    def unanswered(self) -> int:
        """Requests under way."""
        return len(self._unanswered)

    def silent_for(self) -> float:
        """Seconds since the oldest request that it has not answered."""
        return time.monotonic() - self._unanswered[0] if self._unanswered else 0.0

    def close(self, *, kill: bool) -> str:
        """Ends it (it reaps its workers, unless killed); returns the end of what it wrote to stderr."""
        self.connection.close()
        if not kill:
            try:
                self.process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                kill = True
        if kill:
            self.process.kill()
        self.process.wait()
        with self._stderr:
            self._stderr.seek(0, os.SEEK_END)
            self._stderr.seek(max(0, self._stderr.tell() - 2000))
            return self._stderr.read().decode(errors="replace").strip()
