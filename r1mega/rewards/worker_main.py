"""The other end of workers.py: the nursery, which imports and warms up once, and the workers that it forks.

A worker answers questions from a socket until it is killed. Neither imports torch or Ray. A worker limits its own
memory and dies with the nursery, the nursery with the thread that started it; CPU time is watched by the parent.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import struct
import time
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
_LIBC = ctypes.CDLL(None)


def nurse(descriptor: int, parent_pid: int, memory_mib: int) -> None:
    """Says {"ready"}, then forks a worker for every {"fork": tag} with a socket, and reaps for every {"bury": pid}.

    Ends when the other side closes; its workers are killed and reaped.
    """
    _die_with_parent(parent_pid)
    control = socket.socket(fileno=descriptor)
    math_symbolic.warm_up()
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": os.getpid()}).encode())
    children: set[int] = set()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(control, 1 << 12, 1)
        if not packet:
            break
        message = json.loads(packet)
        if "bury" in message:
            os.waitpid(message["bury"], 0)
            children.discard(message["bury"])
            continue
        pid = _fork(control, descriptors[0], memory_mib)
        children.add(pid)
        os.close(descriptors[0])
        control.send(json.dumps({"forked": message["fork"], "pid": pid}).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(control: socket.socket, descriptor: int, memory_mib: int) -> int:
    nursery = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _die_with_parent(nursery)
            control.close()
            _limit(memory_mib)
            serve(socket.socket(fileno=descriptor))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def serve(connection: socket.socket) -> None:
    """Answers requests {"id", "task", "args"} with {"id", "cpu"} and "verdict" or "error".

    "cpu" is what the task took, in seconds. After a MemoryError the state of the process is unknown: it says so
    and ends.
    """
    while (request := receive(connection)) is not None:
        reply: dict[str, Any] = {"id": request["id"]}
        began = time.process_time()
        try:
            reply["verdict"] = TASKS[request["task"]](*request["args"])
        except MemoryError:
            send(connection, {**reply, "cpu": time.process_time() - began, "verdict": "memory"})
            return
        except Exception:
            reply["error"] = traceback.format_exc(limit=-3)
        send(connection, {**reply, "cpu": time.process_time() - began})


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
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
