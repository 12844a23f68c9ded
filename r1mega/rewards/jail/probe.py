"""What a jail really keeps out, asked from the inside rather than assumed: a program that every sandbox runs first."""

from __future__ import annotations

import json

PROGRAM = """
import ctypes, json, os, socket, struct

def refused(action):
    try:
        action()
    except OSError:
        return True
    return False

def capabilities():
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    ctypes.CDLL(None).capget(header, data)
    return any(data.raw)

print(json.dumps({
    "seccomp": ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) == 2,
    "no sockets": refused(lambda: socket.socket()),
    "no exec": refused(lambda: os.execv("/bin/sh", ["sh", "-c", "true"])),
    "no capabilities": not capabilities(),
    "own pid namespace": os.getpid() == 1,
    "no /proc": refused(lambda: os.listdir("/proc/self")),
    "read-only root": refused(lambda: open("/written", "w")),
    "private /tmp": os.getcwd() == "/tmp" and os.listdir(".") == [],
}))
"""
ALWAYS = {"seccomp", "no sockets", "no exec", "no capabilities"}
"""Also in the weaker mode."""


def missing(output: bytes, *, namespaces: bool) -> list[str]:
    """What the jail that printed `output` does not keep, of what it must."""
    facts = json.loads(output)
    return [name for name, kept in facts.items() if not kept and (namespaces or name in ALWAYS)]
