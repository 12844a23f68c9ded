"""The fork server: warm, alone in its namespaces, one program at a time.

It is started by exec with an empty environment, never by fork, so nothing of the trainer's memory is in it. For each
job it clones itself into fresh pid and mount namespaces; the child mounts a private tmpfs, gives up its powers and
becomes the program. When it ends, the kernel ends everything that it left behind, because it is process 1 there.
(As process 1 a program also ignores the signals that it sends itself without having a handler for them.)

Bubblewrap builds the jail around the server but not the one around each program: a new container and interpreter
cost tens of milliseconds, a clone costs two. Without namespaces (the weaker mode) the program is the server's own child,
the filter lets it have threads only, and the host uses a server once.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys

from . import kernel, program
from .messages import KILL, PACKET_BYTES, READY, SETUP_BYTES, Done, Job, Setup, decode, encode

WARM_MODULES = """
abc argparse array ast bisect builtins calendar cmath collections contextlib copy csv ctypes dataclasses datetime
decimal enum fractions functools gc hashlib heapq inspect io itertools json linecache locale math numbers operator os
pprint queue random re secrets statistics string struct sys tempfile textwrap threading time timeit traceback types
typing unicodedata uuid warnings weakref zlib
"""
"""Imported before the first program: what candidates import most."""
MAX_DESCRIPTORS = 8


def main(descriptor: int, own_folder: str) -> None:
    """Serves until the host's end of the socket closes. own_folder: where this package was imported from."""
    _raise_descriptor_limit()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    connection = socket.socket(fileno=descriptor)
    kernel.die_with_parent()
    kernel.forbid_inspection()
    setup = decode(Setup, connection.recv(SETUP_BYTES))
    if setup.extra_folder:
        sys.path.append(setup.extra_folder)
    _warm_up(setup.extra_modules)
    os.environ.clear()
    os.environ.update(program.ENVIRONMENT)
    sys.path.remove(own_folder)
    if setup.namespaces:
        kernel.unmount(f"{own_folder}/{__package__}")
    gc.collect()
    gc.freeze()
    connection.send(READY)
    while True:
        packet, descriptors, _, _ = socket.recv_fds(connection, PACKET_BYTES, MAX_DESCRIPTORS)
        if not packet:
            return
        if packet != KILL:
            done = _serve(connection, decode(Job, packet), setup, descriptors)
            connection.send(encode(done))


def _warm_up(extra_modules: list[str]) -> None:
    """Imports, without the hooks by which modules would renew themselves in every child: a server has one thread, and
    a program that draws random numbers shall behave alike in every run. (So no module above may import `random`
    or `threading` first.)
    """
    register = os.register_at_fork
    os.register_at_fork = lambda **hooks: None
    for name in [*WARM_MODULES.split(), *extra_modules]:
        importlib.import_module(name)
    os.register_at_fork = register
    sys.modules["random"].seed(0)


def _serve(connection: socket.socket, job: Job, setup: Setup, descriptors: list[int]) -> Done:
    """One program from its start to the end of all its processes."""
    report, report_end = os.pipe()
    pid = kernel.clone_namespaces() if setup.namespaces else os.fork()
    if pid == 0:
        connection.close()
        program.become(job, setup, descriptors, report_end)
    for descriptor in [*descriptors, report_end]:
        os.close(descriptor)
    _wait_or_kill(connection, pid)
    _, status, usage = os.wait4(pid, 0)
    fault = os.read(report, PACKET_BYTES).decode(errors="replace")
    os.close(report)
    return Done(status, usage.ru_utime + usage.ru_stime, fault)


def _wait_or_kill(connection: socket.socket, pid: int) -> None:
    """Until the process ends; it is killed when the host says so or is gone."""
    watched = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.register(connection, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if watched in ready:
            break
        os.kill(pid, signal.SIGKILL)
        if not connection.recv(PACKET_BYTES):
            os._exit(0)
    os.close(watched)


def _raise_descriptor_limit() -> None:
    """Room for program.EXECUTABLE_FD."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, program.CLOSED_UP_TO), hard))
