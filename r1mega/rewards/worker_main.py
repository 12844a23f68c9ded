"""The other end of workers.py: a process that answers questions from a socket until it is killed.

Started by exec of a fresh interpreter, never by fork of a process with threads. Imports neither torch nor
Ray. It limits its own memory and dies with its parent; its CPU time is watched by the parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from typing import Any

from r1mega.rewards import math_symbolic

TASKS: dict[str, Callable[..., str]] = {"math": math_symbolic.compare}
"""task name -> plain function of JSON values to a verdict. Its module must not import torch."""

HEADER = struct.Struct("!I")
PR_SET_PDEATHSIG = 1
MAX_FILE_BYTES = 1 << 20
ADDRESS_SPACE_EXTRA_MIB = 1024


def serve(descriptor: int, parent_pid: int, memory_mib: int) -> None:
    """Answers requests {"id", "task", "args"} with {"id", "verdict"} or {"id", "error"}; first says {"ready"}.

    After a MemoryError the state of the process is unknown: it says so and ends.
    """
    _die_with_parent(parent_pid)
    _limit(memory_mib)
    connection = socket.socket(fileno=descriptor)
    math_symbolic.warm_up()
    send(connection, {"ready": os.getpid()})
    while (request := receive(connection)) is not None:
        reply = {"id": request["id"]}
        try:
            reply["verdict"] = TASKS[request["task"]](*request["args"])
        except MemoryError:
            send(connection, {**reply, "verdict": "memory"})
            return
        except Exception:
            reply["error"] = traceback.format_exc(limit=-3)
        send(connection, reply)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    payload = json.dumps(message).encode()
    connection.sendall(HEADER.pack(len(payload)) + payload)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side is gone."""
    header = _receive_bytes(connection, HEADER.size)
    if header is None:
        return None
    payload = _receive_bytes(connection, HEADER.unpack(header)[0])
    return None if payload is None else json.loads(payload)


def _receive_bytes(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _die_with_parent(parent_pid: int) -> None:
    """SIGKILL when the parent's thread that started us ends; checked for a parent that is gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit(memory_mib: int) -> None:
    """The parent ends us over `memory_mib` of resident memory; the address space stops what grows faster than it looks.

    Sympy and math-verify swallow MemoryError, so the limit that gives the verdict is the parent's.
    """
    memory = memory_mib + ADDRESS_SPACE_EXTRA_MIB << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
