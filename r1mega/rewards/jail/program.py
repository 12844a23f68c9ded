"""The last steps of a jailed child: take its place, give up every power, run the program, end.

Runs in a process of its own. Everything done before the report descriptor is closed is ours, and a failure there is a
fault of the jail; everything after it is the program's.
"""

from __future__ import annotations

import atexit
import fcntl
import io
import linecache
import marshal
import os
import resource
import signal
import sys
import traceback
import types
from typing import NoReturn

from . import kernel, landlock
from .messages import CHANNEL_FD, Job, Setup

EXECUTABLE_FD = 1000
"""Above MAX_OPEN_FILES, and the only descriptor that the filter lets anybody execute: once the executable has begun and
this descriptor is closed, no program can make another of that number."""
MAX_OPEN_FILES = 64
CLOSED_UP_TO = 4096
OUR_FIRST_FD = 10
"""Payload and report move out of the way of the descriptors that programs know by number."""
PYTHON_STACK_BYTES = 120 << 20
"""The kernel leaves at least 128 MiB between the stack of an interpreter that already runs and its other memory."""
EXECUTABLE_STACK_BYTES = 256 << 20
INTERPRETER_BYTES = 96 << 20
"""Address space of the interpreter before the program begins; a program may have `memory_bytes` beside it."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
COMPILE = ["g++", "-std=c++17", "-O2", "-pipe", "-x", "c++", "main.cpp", "-o", "main"]
MAIN_FILE = "main.py"
SERVER_PID = os.getpid()
OWN_MODULES = [str(__package__)] + [
    f"{__package__}.{name}" for name in ("kernel", "landlock", "messages", "program", "server")
]


def become(job: Job, setup: Setup, descriptors: list[int], report: int) -> NoReturn:
    """Runs the program of `job`; its exit status is the program's."""
    try:
        if setup.namespaces:
            kernel.mount_tmpfs(job.directory, job.tmpfs_bytes, job.inodes, job.user)
        report = fcntl.fcntl(report, fcntl.F_DUPFD, OUR_FIRST_FD)
        payload = _take_descriptors(job, descriptors, report)
        _limit(job)
        _give_up_powers(job, setup)
        source, files = marshal.loads(_read_all(payload))
        os.close(payload)
        for name, content in files.items():
            _write_file(name, content)
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}".encode()[:1000])
        os._exit(1)
    os.close(report)
    if job.kind == "executable":
        os.execve(EXECUTABLE_FD, ["main"], ENVIRONMENT)
    if job.kind == "compile":
        os._exit(_compile(source))
    os._exit(_run_python(source))


def _take_descriptors(job: Job, descriptors: list[int], report: int) -> int:
    """0-2 (and 3 for a session) are the program's; all others but report and payload are closed. Returns the payload."""
    os.setsid()
    payload, *standard = descriptors[:4]
    extra = descriptors[4:]
    payload = fcntl.fcntl(payload, fcntl.F_DUPFD, OUR_FIRST_FD)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    kept = [payload, report]
    if job.kind == "session":
        os.dup2(extra[0], CHANNEL_FD)
        kept.append(CHANNEL_FD)
    elif job.kind == "executable":
        os.dup2(extra[0], EXECUTABLE_FD, inheritable=False)
        kept.append(EXECUTABLE_FD)
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, CLOSED_UP_TO)
    return payload


def _limit(job: Job) -> None:
    stack = EXECUTABLE_STACK_BYTES if job.kind == "executable" else PYTHON_STACK_BYTES
    extra = 0 if job.kind == "executable" else INTERPRETER_BYTES
    for which, limit in (
        (resource.RLIMIT_AS, job.memory_bytes + extra),
        (resource.RLIMIT_CPU, job.cpu_seconds),
        (resource.RLIMIT_FSIZE, job.file_bytes),
        (resource.RLIMIT_STACK, min(stack, job.memory_bytes // 2)),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (limit, limit))
    if job.processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (job.processes, job.processes))


def _give_up_powers(job: Job, setup: Setup) -> None:
    ruleset = None
    if not setup.namespaces:
        ruleset = landlock.make_ruleset(setup.readable, setup.devices, job.directory)
    if job.user:
        os.setgroups([])
        os.setresgid(job.user, job.user, job.user)
        os.setresuid(job.user, job.user, job.user)
    kernel.drop_capabilities()
    kernel.forbid_new_powers()
    os.chdir(job.directory)
    if not setup.namespaces:
        kernel.die_with_parent()
        if os.getppid() != SERVER_PID:
            raise RuntimeError("the server of this program is dead")
    if ruleset is not None:
        landlock.restrict(ruleset)
    chosen = setup.compiler_filter if job.kind == "compile" else setup.plain_filter
    kernel.install_filter(bytes.fromhex(chosen))


def _read_all(descriptor: int) -> bytes:
    blocks = []
    left = os.fstat(descriptor).st_size
    while left:
        blocks.append(os.read(descriptor, left))
        left -= len(blocks[-1])
    return b"".join(blocks)


def _write_file(name: str, content: bytes) -> None:
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(name, "wb") as file:
        file.write(content)


def _compile(source: str) -> int:
    """g++ on the source; the executable goes to stdout and the compiler's words to stderr. Returns its exit code."""
    _write_file("main.cpp", source.encode(errors="replace"))
    words_to_stderr = [(os.POSIX_SPAWN_DUP2, 2, 1)]
    pid = os.posix_spawn("/usr/bin/g++", COMPILE, ENVIRONMENT, file_actions=words_to_stderr)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0:
        with open("main", "rb") as executable, open(1, "wb") as stdout:
            stdout.write(executable.read())
    return code & 255


def _run_python(source: str) -> int:
    """exec as `__main__`, then what an interpreter does at its end; returns the exit code."""
    for signal_number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signal_number, signal.SIG_DFL)
    _open_streams()
    main = _fresh_main()
    code = 0
    try:
        exec(compile(source, MAIN_FILE, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException as error:
        linecache.cache[MAIN_FILE] = (len(source), None, source.splitlines(True), MAIN_FILE)
        own_frame = error.__traceback__
        traceback.print_exception(error.with_traceback(own_frame.tb_next if own_frame else None))
        code = 1
    try:
        sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 120
    return code & 255


def _open_streams() -> None:
    """UTF-8 whatever the locale; undecodable bytes pass through unchanged."""
    standard = {
        "stdin": io.TextIOWrapper(
            io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8", "surrogateescape"
        ),
        "stdout": io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "surrogateescape"
        ),
        "stderr": io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
            "utf-8",
            "backslashreplace",
            line_buffering=True,
        ),
    }
    for name, stream in standard.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _fresh_main() -> types.ModuleType:
    """An empty `__main__`, and nothing of ours among the modules that the program can import."""
    for name in OWN_MODULES:
        sys.modules.pop(name, None)
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = main
    sys.argv = [MAIN_FILE]
    sys.path = [os.getcwd(), *sys.path]
    return main


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return 1
