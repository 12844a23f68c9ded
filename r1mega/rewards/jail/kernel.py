"""System calls that Python's standard library does not offer, through the C library.

PyDLL keeps the interpreter lock during a call: the child of `clone_namespaces` must wake up holding it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
CLONE_NUMBER = {"x86_64": 56, "aarch64": 220}
BPF_INSTRUCTION_BYTES = 8

_libc = ctypes.PyDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a C function; OSError if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def clone_namespaces() -> int:
    """fork() into a pid and a mount namespace of its own: 0 in the child, which is process 1 there.

    os.fork after os.unshare cannot do it: the pid namespace of later children can be changed only once.
    """
    number = CLONE_NUMBER[os.uname().machine]
    flags = ctypes.c_ulong(CLONE_NEWPID | CLONE_NEWNS | signal.SIGCHLD)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.syscall(number, flags, 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    error = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, f"clone into namespaces: {os.strerror(error)}")
    return pid


def mount_tmpfs(target: str, size_bytes: int, inodes: int, owner: int) -> None:
    """Private, without devices, set-user-id and execution."""
    options = f"size={size_bytes},nr_inodes={inodes},mode=0700,uid={owner},gid={owner}"
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    name = b"tmpfs"
    checked(_libc.mount(name, os.fsencode(target), name, flags, options.encode()), f"tmpfs on {target}")


def unmount(target: str) -> None:
    checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def _prctl(option: int, argument: int, address: int = 0) -> None:
    numbers = [ctypes.c_ulong(value) for value in (argument, address, 0, 0)]
    checked(_libc.prctl(option, *numbers), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL when the *thread* that started this process ends. A change of user forgets it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def forbid_inspection() -> None:
    _prctl(PR_SET_DUMPABLE, 0)


def drop_capabilities() -> None:
    """All of them, from every set that could bring one back."""
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    checked(_libc.capset(header, bytes(24)), "capset")


def forbid_new_powers() -> None:
    """no_new_privs: no file that is executed can give any."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def install_filter(program: bytes) -> None:
    """A seccomp filter (BPF as libseccomp exports it), for ever, for this process and its children.

    `forbid_new_powers` must have been called.
    """
    code = ctypes.create_string_buffer(program, len(program))
    count = len(program) // BPF_INSTRUCTION_BYTES
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", count, ctypes.addressof(code)))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))
