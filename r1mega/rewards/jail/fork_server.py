"""The host's end of a fork server: starts it, gives it jobs, hears how they ended, buries it."""

from __future__ import annotations

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
        except ConnectionError:
            return None
        return messages.decode(Done, packet) if packet else None

    def kill_program(self) -> None:
        """Everything that the program started included; `hear` tells when it is over."""
        try:
            self.connection.send(messages.KILL)
        except (BrokenPipeError, ConnectionResetError):
            return  # `hear` says so

    def abort(self) -> None:
        """The server and its program end at once; `hear` says so to whoever waits for them."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def stop(self) -> None:
        """Ends the server and all below it, by force if it does not answer, and waits until all is gone."""
        self.connection.close()
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        if not ended.poll(STOP_SECONDS * 1000):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            ended.poll(STOP_SECONDS * 1000)
        os.close(self.pidfd)
        self.box.process.wait()
        os.close(self.box.words)


def start_fork_server(slot: int, *, namespaces: bool, cgroup: Cgroup | None) -> ForkServer:
    """Ready to serve. ConfigError, in one line, if this machine does not allow it.

    To be called in a thread that lives as long as the server, because the server ends with it.
    """
    filters = {
        "plain_filter": build_filter(namespaces=namespaces, compiler=False).hex(),
        "compiler_filter": build_filter(namespaces=namespaces, compiler=True).hex(),
    }

    def enter_cgroup(pid: int) -> None:
        if cgroup:
            cgroup.enter(pid)

    connection, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server_end:
        try:
            if namespaces:
                box = container.start_container(server_end.fileno(), slot, enter_cgroup)
            else:
                box = container.start_process(server_end.fileno())
                enter_cgroup(box.server_pid)
            pidfd = os.pidfd_open(box.server_pid)
        except OSError as error:
            connection.close()  # ends what may have started
            raise ConfigError(f"the jail does not start: {error}; {container.WEAKER}") from error
        except ConfigError:
            connection.close()
            raise
    server = ForkServer(box, connection, pidfd)
    extra = list(container.EXTRA_PACKAGES) if namespaces else []
    setup = Setup(
        namespaces,
        **filters,
        readable=container.readable_paths(),
        devices=list(container.DEVICES),
        extra_folder=container.EXTRA_FOLDER if extra else "",
        extra_modules=extra,
    )
    connection.settimeout(START_SECONDS)
    try:
        connection.send(messages.encode(setup))
        ready = connection.recv(messages.PACKET_BYTES)
    except OSError as error:
        ready = repr(error).encode()
    connection.settimeout(None)
    if ready != messages.READY:
        said = box.said()
        server.stop()
        raise ConfigError(f"the jail does not start: {said or ready!r}; {container.WEAKER}")
    return server
