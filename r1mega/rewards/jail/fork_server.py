"""The host's end of a fork server: starts it, gives it jobs, hears how they ended, buries it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from dataclasses import dataclass

from r1mega.config import ConfigError
from r1mega.rewards.jail import container, messages
from r1mega.rewards.jail.cgroups import Cgroup
from r1mega.rewards.jail.filters import build_filter
from r1mega.rewards.jail.messages import Done, Job, Setup

START_SECONDS = 120.0
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class ForkServer:
    """One program at a time. Dead once `hear` has returned None."""

    box: container.Container
    connection: socket.socket
    pidfd: int

    def alive(self) -> bool:
        """Between two programs: an idle server says nothing unless it ends."""
        silence = select.poll()
        silence.register(self.connection, select.POLLIN)
        return not silence.poll(0)

    def start(self, job: Job, descriptors: list[int]) -> None:
        """OSError if the server is dead. The descriptors are still the caller's."""
        socket.send_fds(self.connection, [messages.encode(job)], descriptors)

    def hear(self) -> Done | None:
        """The end of the program, when the connection is readable; None: the server itself has ended."""
        try:
            packet = self.connection.recv(messages.PACKET_BYTES)
        except OSError:  # or closed by Sandbox.close, under a session that nobody finished
            return None
        return messages.decode(Done, packet) if packet else None

    def kill_program(self) -> None:
        """Everything that the program started included; `hear` tells when it is over."""
        try:
            self.connection.send(messages.KILL)
        except OSError:
            return  # `hear` says so

    def abort(self) -> None:
        """The server and its program end at once; `hear` says so to whoever waits for them."""
        with contextlib.suppress(OSError):  # it has ended already
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def stop(self) -> None:
        """Ends the server and all below it, by force if it does not answer, and waits until all is gone."""
        self.connection.close()
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        if not ended.poll(STOP_SECONDS * 1000):
            self.abort()
            ended.poll(STOP_SECONDS * 1000)
        os.close(self.pidfd)
        self.box.process.wait()
        os.close(self.box.words)


def start_fork_server(slot: int, *, namespaces: bool, cgroup: Cgroup | None) -> ForkServer:
    """Ready to serve. ConfigError, in one line, if this machine does not allow it.

    To be called in a thread that lives as long as the server, because the server ends with it.
    """
    filters = {
        f"{name}_filter": build_filter(
            namespaces=namespaces, compiler=name == "compiler", shared_memory=cgroup is not None
        ).hex()
        for name in ("plain", "compiler")
    }
    extra = list(container.EXTRA_PACKAGES) if namespaces else []
    setup = Setup(
        namespaces,
        **filters,
        readable=container.readable_paths(),
        devices=list(container.DEVICES),
        extra_folder=container.EXTRA_FOLDER if extra else "",
        extra_modules=extra,
    )
    connection, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as undo:
        undo.callback(connection.close)
        try:
            with server_end:
                server = _started(connection, server_end, slot, namespaces, cgroup)
        except OSError as error:
            raise ConfigError(f"the jail does not start: {error}; {container.WEAKER}") from error
        undo.callback(server.stop)
        said = _greet(server, setup)
        if said:
            raise ConfigError(f"the jail does not start: {said}; {container.WEAKER}")
        undo.pop_all()
    return server


def _started(
    connection: socket.socket, server_end: socket.socket, slot: int, namespaces: bool, cgroup: Cgroup | None
) -> ForkServer:
    """Nothing is left of it if this raises."""

    def enter_cgroup(pid: int) -> None:
        if cgroup:
            cgroup.enter(pid)

    if namespaces:
        box = container.start_container(server_end.fileno(), slot, enter_cgroup)
    else:
        box = container.start_process(server_end.fileno())
    try:
        if not namespaces:
            enter_cgroup(box.server_pid)
        return ForkServer(box, connection, os.pidfd_open(box.server_pid))
    except BaseException:
        container.destroy(box)
        raise


def _greet(server: ForkServer, setup: Setup) -> str:
    """Empty once the server is ready; else what it said instead."""
    server.connection.settimeout(START_SECONDS)
    try:
        server.connection.send(messages.encode(setup))
        ready = server.connection.recv(messages.PACKET_BYTES)
    except OSError as error:
        ready = repr(error).encode()
    server.connection.settimeout(None)
    return "" if ready == messages.READY else server.box.said() or repr(ready)
