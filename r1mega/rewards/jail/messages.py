"""What the host and a fork server say to each other: one JSON object per packet, file descriptors beside it.

host -> server    Setup once; then a Job with its descriptors, or KILL
server -> host    READY once; then one Done per Job

The descriptors of a job: 0 the payload (marshal of `(source, files)`), 1-3 the program's stdin, stdout and stderr, and
the one its kind calls for: the channel of a session, or the executable. The server never reads a payload: what it once
held would be found in the memory of every later program.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

PACKET_BYTES = 16 << 10
SETUP_BYTES = 128 << 10
KILL = b"kill"
READY = b"ready"
CHANNEL_FD = 3
"""Where a program of a session finds its private channel."""

Message = TypeVar("Message")


@dataclass(frozen=True)
class Setup:
    namespaces: bool
    """Each program gets namespaces and a tmpfs of its own; otherwise `Job.directory` is all it gets."""
    plain_filter: str
    """BPF program in hex: no exec, except of the descriptor that the jail itself opened."""
    compiler_filter: str
    """The same with exec, for g++, which runs as several programs."""
    readable: list[str]
    """Without namespaces: what programs may read, where the kernel can enforce it."""
    devices: list[str]
    """And which devices they may use."""
    extra_folder: str
    """Where the packages beside the standard library are; may be empty."""
    extra_modules: list[str]
    """Imported beforehand, beside those of the standard library."""


@dataclass(frozen=True)
class Job:
    kind: str
    """python | session | executable | compile (C++, the executable is written to stdout)."""
    cpu_seconds: int
    memory_bytes: int
    file_bytes: int
    processes: int
    """And threads, of the user; 0: not limited, because that user has other processes too."""
    tmpfs_bytes: int
    inodes: int
    user: int
    """Inside the jail; 0 keeps the user of the server (and none of its capabilities)."""
    directory: str
    """The working directory; in namespaces a private tmpfs is mounted there first."""


@dataclass(frozen=True)
class Done:
    status: int | None
    """As of wait(2), of the first process of the program; None where nobody could wait for it."""
    cpu_seconds: float
    fault: str
    """Why the jail failed before the program began; empty if it did not."""


def encode(message: Any) -> bytes:
    packet = json.dumps(asdict(message)).encode()
    assert len(packet) <= (SETUP_BYTES if isinstance(message, Setup) else PACKET_BYTES)
    return packet


def decode(kind: type[Message], packet: bytes) -> Message:
    values = json.loads(packet)
    assert set(values) == {field.name for field in fields(kind)}, packet  # type: ignore[arg-type]
    return kind(**values)
