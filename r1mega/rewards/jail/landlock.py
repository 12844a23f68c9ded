"""Closes the file system to a process without namespaces, by the kernel's Landlock (Linux 5.13 and later).

For the weaker mode alone: what the program's user may read, its environment in /proc included, would otherwise be open.
"""

from __future__ import annotations

import ctypes
import os
import struct

from . import kernel

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
"""System call numbers, the same on every machine."""
ASK_VERSION = 1
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
ACCESSES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
"""All accesses to files that a version of Landlock knows; later versions know these and more."""

_libc = ctypes.PyDLL(None, use_errno=True)


def version() -> int:
    """0 where the kernel has no Landlock."""
    return max(0, _libc.syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(ASK_VERSION)))


def make_ruleset(readable: list[str], usable: list[str], own_folder: str) -> int | None:
    """A descriptor for `restrict`; None where the kernel has no Landlock. Paths that do not exist are left out.

    readable: trees that may be read and mapped. usable: devices that may be written too. own_folder: everything.
    """
    if not version():
        return None
    everything = ACCESSES[min(version(), max(ACCESSES))]
    attribute = struct.pack("Q", everything)
    ruleset = kernel.checked(_libc.syscall(CREATE, attribute, ctypes.c_size_t(len(attribute)), 0), "landlock")
    rules = [(path, READ_FILE | EXECUTE | READ_DIR) for path in readable]
    rules += [(path, READ_FILE | WRITE_FILE) for path in usable] + [(own_folder, everything & ~EXECUTE)]
    for path, access in rules:
        if os.path.exists(path):
            _add(ruleset, path, access if os.path.isdir(path) else access & ~READ_DIR)
    return ruleset


def _add(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH)
    rule = struct.pack("=Qi", access, descriptor)
    kernel.checked(_libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), f"landlock rule for {path}")
    os.close(descriptor)


def restrict(ruleset: int) -> None:
    """This process and its children, for ever; no_new_privs must be set."""
    kernel.checked(_libc.syscall(RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)
