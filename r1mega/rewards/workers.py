"""A pool of warm worker processes that may be killed at any moment, and often are.

Sympy cannot be interrupted safely, and a candidate answer may keep it busy for ever or fill the memory; so
each comparison runs in a process that the parent kills and replaces. The limit is CPU time, so that a loaded
machine does not change a reward; a generous wall limit catches workers that sleep.

One thread per pool owns the processes and talks to them; `submit` and `run` may be called from any thread and
any event loop. Workers are forked by a nursery (nursery.py) and die with it, it with that thread, hence with us.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from r1mega.config import ConfigError
from r1mega.rewards.nursery import Child, Nursery

HEADER_BYTES = 4
TICK_SECONDS = 0.02
"""How often CPU times are read while somebody works."""
START_SECONDS = 120.0
"""For the nursery to import everything, and to answer any request."""
MAX_FAILED_STARTS = 3
MAX_REQUEST_BYTES = 64 << 10
"""Fits a socket's buffer, so that sending never blocks."""
MAX_ATTEMPTS = 2
MAX_FORKS_AT_ONCE = 16
"""Requests to the nursery that it has not answered; its socket holds them."""


log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """Workers do not start or answer: a fault of ours or the machine's, with the worker's own words."""


@dataclass
class Job:
    task: str
    args: tuple[Any, ...]
    future: Future[str] = field(default_factory=Future)
    attempts: int = 0
    """Workers that took it and were lost."""


@dataclass
class Worker:
    connection: socket.socket
    tag: int
    """Names it to the nursery; never used again."""
    child: Child | None = None
    """None until the nursery has answered."""
    job: Job | None = None
    job_cpu: float = 0.0
    """CPU seconds of the process when its job began."""
    job_began: float = 0.0
    received: bytearray = field(default_factory=bytearray)


class WorkerPool:
    """`size` processes for the tasks of worker_main.TASKS.

    A task ends as its verdict; "timeout" over `cpu_seconds` of CPU time, even when it ended before it could be
    killed (a machine too busy to kill in time must not give more time); "memory" twice over `memory_mib` of
    resident memory (tried again because the first worker may have been full of older tasks' caches);
    "fault" (logged) when it raised, or when two workers in a row were lost under it (killed from outside,
    crashed, or over `wall_seconds` without using their CPU time). WorkerError where no worker can start.
    """

    def __init__(
        self,
        size: int,
        *,
        cpu_seconds: float = 5.0,
        memory_mib: int = 2048,
        wall_seconds: float | None = None,
    ) -> None:
        if size < 1:
            raise ConfigError(f"rewards.workers={size}: at least one worker process is needed")
        self.size = size
        self.cpu_seconds = cpu_seconds
        self.memory_mib = memory_mib
        self.wall_seconds = wall_seconds or 30.0 + 20.0 * cpu_seconds
        self.lost = 0
        """Workers killed or found dead so far."""
        self.cpu_used = 0.0
        """CPU seconds of the tasks that were answered."""
        self._jobs: deque[Job] = deque()
        self._workers: list[Worker] = []
        self._tags = itertools.count()
        self._nursery: Nursery | None = None
        self._failed_starts = 0
        self._failure: WorkerError | None = None
        self._closing = self._closed = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the nursery and returns at once; it warms up (about two seconds) in the background."""
        with self._lock:
            if self._closing:
                raise self._failure or RuntimeError("the worker pool is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="reward-workers", daemon=True)
                self._thread.start()

    def submit(self, task: str, *args: Any) -> Future[str]:
        """Queues a task; its arguments are plain JSON values. Starts the pool if need be."""
        self.start()
        job = Job(task, args)
        with self._lock:
            if self._closing:
                raise self._failure or RuntimeError("the worker pool is closed")
            self._jobs.append(job)
        self._wake()
        return job.future

    async def run(self, task: str, *args: Any) -> str:
        """The verdict of one task, awaited in any event loop."""
        return await asyncio.wrap_future(self.submit(task, *args))

    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.child.pid for worker in list(self._workers) if worker.child]

    def nursery_pid(self) -> int | None:
        """Process id of the nursery; None while there is none."""
        nursery = self._nursery
        return nursery.process.pid if nursery else None

    def close(self) -> None:
        """Kills the workers; unfinished tasks are cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = self._closing = True
            thread = self._thread
        self._wake()
        if thread is not None:
            thread.join()
        self._selector.close()
        self._waker.close()
        self._woken.close()

    def __enter__(self) -> WorkerPool:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ the pool's own thread

    def _serve(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ, self._woken)
        try:
            while not self._closing:
                self._staff()
                self._assign()
                waiting = self._failure is None and len(self.pids()) < self.size
                busy = waiting or any(worker.job for worker in self._workers)
                for key, _ in self._selector.select(TICK_SECONDS if busy else None):
                    if key.data is self._woken:
                        self._woken.recv(4096)
                    elif key.data is self._nursery:
                        self._read_nursery()
                    elif key.data in self._workers:
                        self._read(key.data)
                self._watch()
        except BaseException as error:
            self._failure = WorkerError(f"the reward workers' thread ended: {error!r}")
            self._failure.__cause__ = error
            raise
        finally:
            self._dismiss_all()

    def _staff(self) -> None:
        """Asks for workers until there are `size`, unless the installation cannot start any."""
        if self._failure is not None:
            return
        if self._nursery is None:
            self._nursery = Nursery(self.memory_mib)
            self._selector.register(self._nursery.connection, selectors.EVENT_READ, self._nursery)
        while (
            self._nursery is not None
            and self._nursery.ready
            and self._nursery.unanswered < MAX_FORKS_AT_ONCE
            and len(self._workers) < self.size
        ):
            self._hire(self._nursery)

    def _hire(self, nursery: Nursery) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        worker = Worker(ours, next(self._tags))
        with theirs:
            try:
                nursery.fork(theirs, worker.tag)
            except OSError:
                ours.close()
                self._lose_nursery()
                return
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _read_nursery(self) -> None:
        assert self._nursery is not None
        try:
            news = self._nursery.read()
        except EOFError:
            self._lose_nursery()
            return
        if news is None:
            self._failed_starts = 0
            return
        tag, child = news
        worker = next((w for w in self._workers if w.tag == tag), None)
        if worker is not None:
            worker.child = child
        if child is None:
            self._lose_nursery()  # only an outsider can have reaped its child
        elif worker is None:
            self._end_child(child)

    def _lose_nursery(self) -> None:
        """Its workers die with it; their jobs were not at fault and count no attempt."""
        nursery, self._nursery = self._nursery, None
        assert nursery is not None
        self._selector.unregister(nursery.connection)
        words = nursery.close(kill=True)
        if not nursery.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._failure = WorkerError(f"reward workers do not start: {words or 'no message'}")
        for worker in list(self._workers):
            self.lost += 1
            if worker.job is not None:
                self._jobs.appendleft(worker.job)
            self._dismiss(worker)

    def _assign(self) -> None:
        for worker in list(self._workers):
            while worker.child and worker in self._workers and worker.job is None and self._jobs:
                self._give(worker, self._jobs.popleft())
        if self._failure is not None:
            while self._jobs:
                _fail(self._jobs.popleft(), self._failure)

    def _give(self, worker: Worker, job: Job) -> None:
        if not job.future.running() and not job.future.set_running_or_notify_cancel():
            return
        payload = json.dumps({"id": id(job), "task": job.task, "args": job.args}).encode()
        if len(payload) > MAX_REQUEST_BYTES:
            job.future.set_result("too_long")
            return
        assert worker.child is not None
        worker.job, worker.job_began = job, time.monotonic()
        try:
            worker.job_cpu = cpu_seconds_of(worker.child.pid)
            worker.connection.sendall(len(payload).to_bytes(HEADER_BYTES, "big") + payload)
        except OSError:
            self._lose(worker)

    def _read(self, worker: Worker) -> None:
        try:
            part = worker.connection.recv(1 << 16)
        except ConnectionError:
            part = b""
        if not part:
            self._lose(worker)
            return
        worker.received += part
        while len(worker.received) >= HEADER_BYTES:
            end = HEADER_BYTES + int.from_bytes(worker.received[:HEADER_BYTES], "big")
            if len(worker.received) < end:
                return
            message = json.loads(bytes(worker.received[HEADER_BYTES:end]))
            del worker.received[:end]
            self._hear(worker, message)

    def _hear(self, worker: Worker, message: dict[str, Any]) -> None:
        job = worker.job
        assert job is not None, message
        assert message["id"] == id(job), message
        if message.get("verdict") == "memory":
            self._lose(worker, "memory")
            return
        worker.job = None
        self.cpu_used += message["cpu"]
        if message["cpu"] > self.cpu_seconds:
            job.future.set_result("timeout")
            return
        if "error" in message:
            log.warning("%s%.200r raised in its worker: %s", job.task, job.args, message["error"])
        job.future.set_result(message.get("verdict", "fault"))

    def _watch(self) -> None:
        """Ends workers that are over a limit, and a nursery that does not answer."""
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.job is None or worker.child is None:
                continue
            try:
                over_cpu = cpu_seconds_of(worker.child.pid) - worker.job_cpu > self.cpu_seconds
                over_memory = resident_mib_of(worker.child.pid) > self.memory_mib
            except OSError:
                self._lose(worker)  # gone with the nursery
                continue
            if over_cpu:
                job, worker.job = worker.job, None
                self._lose(worker)
                job.future.set_result("timeout")
            elif over_memory:
                self._lose(worker, "memory")
            elif now - worker.job_began > self.wall_seconds:
                self._lose(worker)
        if self._nursery is not None and self._nursery.silent_for() > START_SECONDS:
            self._lose_nursery()

    def _lose(self, worker: Worker, verdict: str = "fault") -> None:
        """Kills a worker (dead or alive); its job is tried once more, then ends as `verdict`."""
        if worker not in self._workers:
            return
        self.lost += 1
        job, worker.job = worker.job, None
        self._dismiss(worker)
        if job is not None:
            job.attempts += 1
            if job.attempts < MAX_ATTEMPTS:
                self._jobs.appendleft(job)
            else:
                log.warning("%s%.200r lost %d workers: %s", job.task, job.args, job.attempts, verdict)
                job.future.set_result(verdict)

    def _dismiss(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        if worker.child is not None:
            self._end_child(worker.child)

    def _end_child(self, child: Child) -> None:
        child.kill()
        if self._nursery is not None:
            with suppress(
                OSError
            ):  # a nursery that is gone is noticed where it is read; init buries its workers
                self._nursery.bury(child)
        child.close()

    def _dismiss_all(self) -> None:
        with self._lock:
            self._closing = True
        for worker in list(self._workers):
            if worker.job is not None:
                self._end(worker.job)
            self._dismiss(worker)
        if self._nursery is not None:
            self._nursery.close(kill=False)
            self._nursery = None
        while self._jobs:
            self._end(self._jobs.popleft())

    def _end(self, job: Job) -> None:
        if not job.future.done():
            if self._failure is not None or job.future.running():
                _fail(job, self._failure or WorkerError("the worker pool was closed"))
            else:
                job.future.cancel()

    def _wake(self) -> None:
        try:
            self._waker.send(b"!")
        except BlockingIOError:
            pass  # unread wake-ups fill the buffer: it will wake
        except OSError:
            if not self._closing:
                raise


def _fail(job: Job, error: WorkerError) -> None:
    if job.attempts > 0 or job.future.running() or job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)


def resident_mib_of(pid: int) -> float:
    """Resident memory in MiB; 0 for a zombie."""
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a living or unreaped process, in seconds (Linux; 10 ms steps)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
