"""One program in a jail, from the host: its streams, its limits and its end.

The thread that waits for a program also empties its stdout and stderr and watches its limits; there is no other. CPU time
decides: a program that used more than its limit was out of time, however fast or slowly it was given it.
The wall-clock limit is a backstop for programs that sleep.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from r1mega.config import ConfigError
from r1mega.rewards.jail.container import WORKING_FOLDER
from r1mega.rewards.jail.messages import Done, Job
from r1mega.rewards.jail.slot import Slot
from r1mega.rewards.jail.usage import usage_below

STDERR_BYTES = 4000
TICK_SECONDS = 0.05
"""How often limits are checked; a program that ends sooner is only checked at its end."""
KILL_SECONDS = 20.0
"""A server that has not ended its program after this time is killed with it."""
DRAIN_SECONDS = 10.0
"""Until the pipes of an ended program are empty and closed; longer only if somebody else holds them."""
REMOVE_SECONDS = 120.0
READ_BYTES = 1 << 18
OWN_PROCESSES = 3
"""Server, supervisor and one to spare: they count where programs share our user."""
F_ADD_SEALS = 1033
SEALED = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, SHRINK, GROW, WRITE."""
logger = logging.getLogger(__name__)
OUT_OF_MEMORY_WORDS = (b"MemoryError", b"std::bad_alloc")


@dataclass(frozen=True)
class Limits:
    cpu_seconds: float = 10.0
    """Of all its processes together, user and system."""
    wall_seconds: float = 0.0
    """0: 20 s and five times the CPU limit."""
    memory_mib: int = 512
    output_bytes: int = 8 << 20
    """Of stdout, and of stderr."""
    file_bytes: int = 16 << 20
    """Of one file."""
    processes: int = 32
    """And threads."""
    tmpfs_mib: int = 16
    inodes: int = 2000

    def __post_init__(self) -> None:
        for name in (
            "cpu_seconds",
            "memory_mib",
            "output_bytes",
            "file_bytes",
            "processes",
            "tmpfs_mib",
            "inodes",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"Limits.{name}={getattr(self, name)}: must be positive")

    def wall_backstop(self) -> float:
        return self.wall_seconds or 20.0 + 5.0 * self.cpu_seconds


@dataclass(frozen=True)
class RunResult:
    outcome: str
    """exited | time | memory | output | fault (the jail itself failed; why is in stderr) | killed (by Session.kill)"""
    exit_code: int | None
    """Negative: the signal that ended it. None: it was ended with everything it had started."""
    stdout: bytes
    stderr: bytes
    """Its last 4,000 bytes."""
    cpu_seconds: float
    wall_seconds: float


class Session:
    """A program from its start to its end; for one thread at a time, a context manager that kills what still runs.

    Its limits are watched during `receive` and `finish`; between calls only the kernel's own hold.
    """

    def __init__(
        self,
        slot: Slot,
        kind: str,
        payload: bytes,
        stdin: bytes,
        limits: Limits,
        executable: bytes | None,
        release: Callable[[Slot], None],
    ) -> None:
        """Sandbox.open is the way to make one. release: is given the slot when the program has ended, or does not start
        because the jail does not ("fault"). If anything else is raised here, the slot remains the caller's.
        """
        self._slot, self._limits, self._release = slot, limits, release
        self._folder = ""
        self._out = self._err = -1
        self._open_streams: set[int] = set()
        self._seen_ticks: dict[tuple[int, int], int] = {}
        self._stdout, self._stderr = bytearray(), bytearray()
        self._stderr_bytes = 0
        self._verdict = ""
        self._fault = ""
        self._dead = False
        self._cpu_seconds = 0.0
        self._done: Done | None = None
        self._result: RunResult | None = None
        self._channel: socket.socket | None = None
        self._began = time.monotonic()
        self._next_tick = self._began + TICK_SECONDS
        self._kill_by = float("inf")
        try:
            self._start(kind, payload, stdin, executable)
        except (ConfigError, OSError) as error:
            self._let_go(str(error))
        except BaseException:
            self._clean_up("interrupted")
            raise

    def send(self, content: bytes) -> None:
        """Writes to the channel; BrokenPipeError if the program has closed it. At most 64 KiB may lie there unread."""
        if self._result is not None:
            raise BrokenPipeError("the program has ended")
        assert self._channel is not None, "only Sandbox.open gives a channel"
        view = memoryview(content)
        while view:
            try:
                view = view[self._channel.send(view) :]
            except BlockingIOError:
                if self._ended():
                    raise BrokenPipeError("the program has ended") from None
                self._step(time.monotonic() + TICK_SECONDS, select.POLLOUT)
            except ConnectionResetError:
                raise BrokenPipeError("the program has closed the channel") from None

    def receive(self, max_bytes: int, deadline: float) -> bytes:
        """What the program wrote to its channel, at least one byte; b"" if it ended or closed the channel.

        deadline: of time.monotonic(); TimeoutError after it.
        """
        while self._result is None:
            assert self._channel is not None, "only Sandbox.open gives a channel"
            try:
                return self._channel.recv(max_bytes)
            except BlockingIOError:
                pass
            except ConnectionResetError:
                return b""
            if self._ended():
                return b""
            if time.monotonic() >= deadline:
                raise TimeoutError(f"nothing received before the deadline of {deadline:.3f}")
            self._step(deadline, select.POLLIN)
        return b""

    def finish(self) -> RunResult:
        """Closes the channel, waits for the program's end (or makes it, at a limit) and frees the slot."""
        if self._result is None:
            why = "interrupted"  # by an exception here, as of the user's Ctrl-C, while the program runs
            try:
                self._close_channel()
                while not self._ended():
                    self._step(float("inf"), 0)
                self._drain()
                self._result = self._judge()
            except OSError as error:
                why = str(error)
            finally:
                self._let_go(why)
        assert self._result is not None
        return self._result

    def kill(self) -> None:
        """Ends the program and all that it started; nothing of it is left when this returns."""
        if self._result is None:
            self._end("killed")
            self.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    # ------------------------------------------------------------ start

    def _start(self, kind: str, payload: bytes, stdin: bytes, executable: bytes | None) -> None:
        self._server = self._slot.server()
        self._connection = self._server.connection.fileno()
        self._slot.limit_memory(self._limits.memory_mib)
        self._cpu_before = self._slot.cpu_seconds()
        if not self._slot.namespaces:
            self._folder = tempfile.mkdtemp(prefix="r1mega-jail-")
            user = self._slot.program_user()
            if user:
                os.chown(self._folder, user, user)
        given: list[int] = []
        try:
            self._gather(kind, payload, stdin, executable, given)
            self._began = time.monotonic()
            self._server.start(self._job(kind), given)
        finally:
            for descriptor in given:
                os.close(descriptor)
        self._poll = select.poll()
        for descriptor in (self._out, self._err, self._connection):
            self._poll.register(descriptor, select.POLLIN)

    def _gather(
        self, kind: str, payload: bytes, stdin: bytes, executable: bytes | None, given: list[int]
    ) -> None:
        """Makes the descriptors of a job and adds them to `given`, in their order."""
        given.append(_sealed(payload))
        given.append(_sealed(stdin))
        self._out, end = os.pipe()
        given.append(end)
        self._err, end = os.pipe()
        given.append(end)
        self._open_streams = {self._out, self._err}
        if kind == "session":
            self._channel, program_end = socket.socketpair()
            self._channel.setblocking(False)
            given.append(program_end.detach())
        elif executable is not None:
            given.append(_sealed(executable))

    def _job(self, kind: str) -> Job:
        limits = self._limits
        shared = self._slot.shares_our_user()
        processes = limits.processes + (OWN_PROCESSES if shared else 0)
        return Job(
            kind=kind,
            cpu_seconds=int(limits.cpu_seconds) + 2,
            memory_bytes=limits.memory_mib << 20,
            file_bytes=limits.file_bytes,
            processes=0 if shared and not self._slot.namespaces else processes,
            tmpfs_bytes=limits.tmpfs_mib << 20,
            inodes=limits.inodes,
            user=self._slot.program_user(),
            directory=self._folder or WORKING_FOLDER,
        )

    # ------------------------------------------------------------ while it runs

    def _ended(self) -> bool:
        return self._dead or self._done is not None

    def _step(self, until: float, channel_events: int) -> None:
        """Waits for one thing to happen, at most until then, and deals with it."""
        now = time.monotonic()
        if now >= self._next_tick:
            self._check_limits(now)
            self._next_tick = now + TICK_SECONDS
        if self._channel is not None and channel_events:
            self._poll.register(self._channel, channel_events)
        events = self._poll.poll(max(0.0, min(until, self._next_tick) - now) * 1000)
        if self._channel is not None and channel_events:
            self._poll.unregister(self._channel)
        for descriptor, _ in events:
            if descriptor in self._open_streams:
                self._read(descriptor)
            elif descriptor == self._connection:
                self._done = self._server.hear()
                self._dead = self._done is None

    def _read(self, descriptor: int) -> None:
        block = os.read(descriptor, READ_BYTES)
        if not block:
            self._poll.unregister(descriptor)
            self._open_streams.remove(descriptor)
        elif descriptor == self._out:
            if len(self._stdout) + len(block) > self._limits.output_bytes:
                self._end("output")
            self._stdout += block[: self._limits.output_bytes - len(self._stdout)]
        else:
            self._stderr_bytes += len(block)
            if self._stderr_bytes > self._limits.output_bytes:
                self._end("output")
            self._stderr = (self._stderr + block)[-STDERR_BYTES:]

    def _check_limits(self, now: float) -> None:
        if now > self._kill_by:
            self._dead = True
            return
        usage = usage_below(self._server.box.server_pid, self._seen_ticks)
        self._count_cpu(usage.cpu_seconds)
        if self._cpu_seconds > self._limits.cpu_seconds or now - self._began > self._limits.wall_backstop():
            self._end("time")
        elif usage.memory_bytes > self._limits.memory_mib << 20:
            self._end("memory")

    def _count_cpu(self, seconds: float) -> None:
        """By /proc or wait(2), and by the cgroup, which also knows of those that nobody waited for."""
        self._cpu_seconds = max(self._cpu_seconds, seconds, self._slot.cpu_seconds() - self._cpu_before)

    def _end(self, verdict: str) -> None:
        """Begins the end; the first reason counts."""
        if not self._verdict and not self._ended():
            self._kill_by = time.monotonic() + KILL_SECONDS
            self._server.kill_program()
        self._verdict = self._verdict or verdict

    # ------------------------------------------------------------ after its end

    def _drain(self) -> None:
        """Reads what is left in the pipes; all their writers have ended unless the server did."""
        self._poll.unregister(self._connection)
        if self._dead:
            self._slot.discard_server()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._open_streams:
            left = deadline - time.monotonic()
            if left <= 0:
                self._fault = "something still holds the output of the program after its end"
                return
            for descriptor, _ in self._poll.poll(left * 1000):
                self._read(descriptor)

    def _judge(self) -> RunResult:
        done = self._done or Done(
            status=None, cpu_seconds=0.0, fault="the fork server of the jail was killed"
        )
        self._count_cpu(done.cpu_seconds)
        cpu_seconds, fault = self._cpu_seconds, done.fault or self._fault
        code = None if done.status is None else os.waitstatus_to_exitcode(done.status)
        last_words = bytes(self._stderr[-STDERR_BYTES:])
        out_of_memory = self._slot.was_out_of_memory()
        if self._verdict:
            outcome = self._verdict
        elif out_of_memory:
            outcome = "memory"
        elif fault:
            outcome, last_words = "fault", f"jail: {fault}".encode()
        elif cpu_seconds > self._limits.cpu_seconds:
            outcome = "time"
        elif code != 0 and any(words in last_words for words in OUT_OF_MEMORY_WORDS):
            outcome = "memory"
        else:
            outcome = "exited"
        wall_seconds = time.monotonic() - self._began
        return RunResult(outcome, code, bytes(self._stdout), last_words, cpu_seconds, wall_seconds)

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _let_go(self, why: str) -> None:
        try:
            self._clean_up(why)
        finally:
            self._release(self._slot)

    def _clean_up(self, why: str) -> None:
        """why: there is no result."""
        spoilt = self._result is None
        if spoilt:
            seconds = time.monotonic() - self._began
            self._result = RunResult("fault", None, b"", f"jail: {why}".encode(), self._cpu_seconds, seconds)
        self._close_channel()
        for descriptor in (self._out, self._err):
            if descriptor >= 0:
                os.close(descriptor)
        if spoilt or not self._slot.namespaces:
            self._slot.discard_server()
        if self._folder:
            _remove(self._folder)


def _sealed(content: bytes) -> int:
    """A descriptor from which exactly this can be read and to which nothing can be written."""
    descriptor = os.memfd_create("jail", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, F_ADD_SEALS, SEALED)
    return descriptor


def _remove(folder: str) -> None:
    """Whatever a program has made there. Not by shutil.rmtree, which fails below some depth and holds a descriptor for
    each level. A folder that stays is logged: it must not end a training.
    """
    remove, open_all = ["rm", "-rf", "--", folder], ["chmod", "-R", "u+rwx", "--", folder]
    words = b""
    try:
        for command in (remove, open_all, remove):
            if os.path.lexists(folder):
                words = subprocess.run(command, capture_output=True, timeout=REMOVE_SECONDS).stderr
    except (OSError, subprocess.SubprocessError) as error:
        words = str(error).encode()
    if os.path.lexists(folder):
        logger.warning("not removed: %s: %s", folder, words[:500].decode(errors="replace"))
