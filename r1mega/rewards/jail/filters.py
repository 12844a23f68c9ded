"""The system calls that a jailed program may make, as BPF programs built by libseccomp.

A list of what is allowed, not of what is forbidden: a call that a newer kernel adds is refused until somebody names
it here. What is not listed fails with ENOSYS, so that the C library falls back to older calls; well-known doors
fail with EPERM, which programs report more clearly.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os

from r1mega.config import ConfigError
from r1mega.rewards.jail.program import EXECUTABLE_FD

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev lseek _llseek close close_range dup dup2 dup3
open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat fstatat64 stat64 lstat64 fstat64 statx
statfs fstatfs readlink readlinkat getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename
renameat renameat2 link linkat symlink symlinkat truncate ftruncate fallocate chmod fchmod fchmodat fchmodat2 umask
utime utimes utimensat futimesat fsync fdatasync flock sync_file_range copy_file_range sendfile fadvise64
pipe pipe2 eventfd eventfd2 poll ppoll select pselect6 _newselect epoll_create epoll_create1 epoll_ctl epoll_wait
epoll_pwait epoll_pwait2 sendto recvfrom shutdown getsockopt getsockname getpeername
munmap mprotect mremap madvise brk mincore msync membarrier rseq set_robust_list get_robust_list futex
futex_waitv set_tid_address set_thread_area get_thread_area arch_prctl
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack signalfd signalfd4
alarm setitimer getitimer pause timer_create timer_settime timer_gettime timer_getoverrun timer_delete timerfd_create
timerfd_settime timerfd_gettime nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
exit exit_group wait4 waitid waitpid restart_syscall sched_yield sched_getaffinity sched_getparam sched_getscheduler
sched_get_priority_max sched_get_priority_min getpriority getcpu getrandom uname sysinfo getrusage getrlimit setrlimit
getpid getppid gettid getpgid getpgrp getsid setsid setpgid getuid geteuid getgid getegid getresuid getresgid getgroups
"""
SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
"""Allowed where a pid namespace bounds them."""
FORKS = ("fork", "vfork")
REFUSED = """
socket connect bind listen accept accept4 sendmsg recvmsg execve execveat ptrace process_vm_readv process_vm_writev
mount umount2 pivot_root chroot unshare setns mknod mknodat setuid setgid setreuid setregid setresuid setresgid setgroups
chown fchown lchown fchownat memfd_create keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup
pidfd_open pidfd_getfd shmget shmat msgget semget mq_open setpriority sched_setscheduler sched_setaffinity personality
"""
OUTSIDE = "chmod fchmod fchmodat fchmodat2 utime utimes utimensat futimesat truncate"
"""Not without namespaces: they reach every file of the program's user, and Landlock does not govern them."""
FILE_CONTROLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
"""fcntl without namespaces: F_DUPFD, GETFD, SETFD, GETFL, SETFL, GETLK, SETLK, SETLKW, OFD_GETLK, OFD_SETLK, OFD_SETLKW,
DUPFD_CLOEXEC. F_SETOWN and F_SETSIG would send any signal to any process of the program's user."""
PROCESS_CONTROLS = (15, 16, 2, 3, 21, 23, 29, 30, 39)
"""prctl: PR_SET_NAME, GET_NAME, GET_PDEATHSIG, GET_DUMPABLE, GET_SECCOMP, CAPBSET_READ, SET_TIMERSLACK, GET_TIMERSLACK,
GET_NO_NEW_PRIVS."""
NAMESPACE_FLAGS = 0x7E020000 | 0x80
"""clone: every CLONE_NEW*, cgroup and time namespaces included."""
CLONE_THREAD = 0x00010000
TERMINAL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""ioctl: TCGETS and TIOCGWINSZ (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
AF_UNIX = 1
MAP_SHARED = 1
AT_EMPTY_PATH = 0x1000

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
UNKNOWN_CALL = -1
EQUAL, MASKED_EQUAL = 4, 7
OPTIMIZE_ATTRIBUTE, AS_BINARY_TREE = 8, 2
BAD_ARCHITECTURE_ATTRIBUTE = 2
WHOLE_VALUE = 0
LOW_HALF = 0xFFFFFFFF
"""Of an argument that the kernel reads as 32 bits; whatever stands above must not make it another value to us."""


def _error(number: int) -> int:
    return 0x00050000 | number


class _Comparison(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise ConfigError(
            f"jails need libseccomp ({error}): install the package libseccomp2 (libseccomp on Red Hat systems)"
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    ]
    return library


class _Filter:
    """A libseccomp filter under construction."""

    def __init__(self) -> None:
        self.library = _library()
        self.context = self.library.seccomp_init(_error(errno.ENOSYS))
        assert self.context, "seccomp_init"
        self._check(self.library.seccomp_attr_set(self.context, BAD_ARCHITECTURE_ATTRIBUTE, KILL_PROCESS))
        self.library.seccomp_attr_set(self.context, OPTIMIZE_ATTRIBUTE, AS_BINARY_TREE)  # new in 2.5

    def _check(self, result: int) -> None:
        if result < 0:
            raise OSError(-result, f"libseccomp: {os.strerror(-result)}")

    def add(self, action: int, name: str, *comparisons: tuple[int, int, int, int]) -> None:
        """A rule for calls whose arguments satisfy all (argument, operation, first, second); unknown names are skipped."""
        number = self.library.seccomp_syscall_resolve_name(name.encode())
        if number == UNKNOWN_CALL:
            return
        array = (_Comparison * len(comparisons))(*(_Comparison(*values) for values in comparisons))
        self._check(
            self.library.seccomp_rule_add_array(self.context, action, number, len(comparisons), array)
        )

    def exported(self) -> bytes:
        descriptor = os.memfd_create("filter")
        self._check(self.library.seccomp_export_bpf(self.context, descriptor))
        self.library.seccomp_release(self.context)
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            return file.read()


@functools.cache
def build_filter(*, namespaces: bool, compiler: bool, shared_memory: bool) -> bytes:
    """A BPF program.

    namespaces: the program has a pid namespace of its own; without one it may neither signal nor start processes.
    compiler: it may execute what it finds. shared_memory: it may map memory that no process is seen to hold, which only
    a cgroup bounds. ConfigError if libseccomp is missing.
    """
    rules = _Filter()
    for name in ALLOWED.split():
        if namespaces or name not in OUTSIDE.split():
            rules.add(ALLOW, name)
    _add_conditional(rules, namespaces, shared_memory)
    for name in (*SIGNALS, *FORKS):
        rules.add(ALLOW if namespaces else _error(errno.EAGAIN if name in FORKS else errno.EPERM), name)
    no_new_namespace = (0, MASKED_EQUAL, NAMESPACE_FLAGS, 0)
    if namespaces:
        rules.add(ALLOW, "clone", no_new_namespace)
    else:
        rules.add(ALLOW, "clone", (0, MASKED_EQUAL, NAMESPACE_FLAGS | CLONE_THREAD, CLONE_THREAD))
        rules.add(_error(errno.EAGAIN), "clone", (0, MASKED_EQUAL, CLONE_THREAD, 0))
    for request in TERMINAL_REQUESTS:
        rules.add(ALLOW, "ioctl", (1, EQUAL, request, WHOLE_VALUE))
    rules.add(ALLOW, "socketpair", (0, EQUAL, AF_UNIX, WHOLE_VALUE))
    rules.add(ALLOW, "prlimit64", (0, EQUAL, 0, WHOLE_VALUE))
    for option in PROCESS_CONTROLS:
        rules.add(ALLOW, "prctl", (0, MASKED_EQUAL, LOW_HALF, option))
    refused = set(REFUSED.split())
    if compiler:
        rules.add(ALLOW, "execve")
        refused -= {"execve"}
    else:
        rules.add(
            ALLOW, "execveat", (0, EQUAL, EXECUTABLE_FD, WHOLE_VALUE), (4, EQUAL, AT_EMPTY_PATH, WHOLE_VALUE)
        )
        refused -= {"execveat"}
    if not namespaces:
        refused |= set(OUTSIDE.split())
    for name in sorted(refused):
        rules.add(_error(errno.EPERM), name)
    return rules.exported()


def _add_conditional(rules: _Filter, namespaces: bool, shared_memory: bool) -> None:
    if namespaces:
        rules.add(ALLOW, "fcntl")
    else:
        for command in FILE_CONTROLS:
            rules.add(ALLOW, "fcntl", (1, MASKED_EQUAL, LOW_HALF, command))
    if shared_memory:
        rules.add(ALLOW, "mmap")
    else:
        rules.add(ALLOW, "mmap", (3, MASKED_EQUAL, MAP_SHARED, 0))
        rules.add(_error(errno.EPERM), "mmap", (3, MASKED_EQUAL, MAP_SHARED, MAP_SHARED))
