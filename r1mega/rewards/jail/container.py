"""Starts a fork server in a container built by bubblewrap: own namespaces, read-only root, no /proc, no network.

The root holds the interpreter with its standard library (not its site-packages), the C library, the compiler, and
nothing else. Where we are root, the container maps two users: its root, which is us but has capabilities in the
container alone, and one user per jail that exists nowhere else, for the programs. Otherwise only our own user can be
mapped; programs then run as it, without capabilities.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from io import FileIO
from pathlib import Path

from r1mega.config import ConfigError

PROGRAM_USER = 1000
"""Inside the container."""
FIRST_HOST_USER = 2_000_000
HOST_USERS_PER_PROCESS = 128
WORKING_FOLDER = "/tmp"
OWN_FOLDER = "/jail"
EXTRA_PACKAGES: tuple[str, ...] = ()
"""Installed packages that programs may import, e.g. ("numpy",); each one makes every start of a program slower."""
EXTRA_FOLDER = "/packages"
SYSTEM_FOLDERS = ("/lib", "/lib32", "/lib64", "/bin", "/usr/lib", "/usr/lib32", "/usr/lib64")
COMPILER_FOLDERS = ("/usr/bin", "/usr/include", "/usr/libexec")
SINGLE_FILES = ("/etc/ld.so.cache",)
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Of the server. A fixed hash seed makes a program behave alike in every run; a process with threads cannot fork."""
WEAKER = 'or accept a weaker jail by name: rewards.isolation="process"'


@dataclass(frozen=True)
class Container:
    process: subprocess.Popen
    server_pid: int
    """On the host. Equal to process.pid where there is no container."""
    words: int
    """Descriptor of an unnamed file with what it wrote to stderr."""

    def said(self) -> str:
        """The last line on stderr."""
        size = os.fstat(self.words).st_size
        lines = os.pread(self.words, 4000, max(0, size - 4000)).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def server_command(descriptor: int, own_folder: str) -> list[str]:
    """Runs jail/server.py with an interpreter that reads no site-packages, environment or bytecode cache."""
    code = f"import sys; sys.path.append({own_folder!r}); from jail.server import main; main({descriptor}, {own_folder!r})"
    return [_interpreter(), "-s", "-S", "-B", "-P", "-c", code]


def start_process(descriptor: int) -> Container:
    """A server without a container, for the weaker mode. descriptor: its end of the socket."""
    words = _unnamed_file()
    folder = str(Path(__file__).parents[1])
    try:
        process = _popen(server_command(descriptor, folder), [descriptor], words, start_new_session=True)
    except BaseException:
        os.close(words)
        raise
    return Container(process, process.pid, words)


def destroy(box: Container) -> None:
    """Without asking; for one that nobody has begun to speak with."""
    box.process.kill()
    box.process.wait()
    os.close(box.words)


def start_container(descriptor: int, slot: int, enter_cgroup: Callable[[int], None]) -> Container:
    """A server in its container. enter_cgroup: is given its pid before it runs. ConfigError if the machine refuses.

    The calling thread must live as long as the container: the kernel ends the container when that thread ends.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise ConfigError(f"jails need bubblewrap: install the package bubblewrap, {WEAKER}")
    with contextlib.ExitStack() as at_end, contextlib.ExitStack() as undo:
        words = _unnamed_file()
        undo.callback(os.close, words)
        facts, facts_end = _pipe(at_end)
        go_end, go = _pipe(at_end)
        control = ["--info-fd", str(facts_end.fileno()), "--userns-block-fd", str(go_end.fileno())]
        command = [
            bubblewrap,
            *_namespaces(),
            *_root(),
            *control,
            "--",
            *server_command(descriptor, OWN_FOLDER),
        ]
        process = _popen(command, [descriptor, facts_end.fileno(), go_end.fileno()], words)
        undo.callback(process.wait)
        undo.callback(process.kill)
        facts_end.close()
        go_end.close()
        pid = _child_pid(facts.fileno())
        if pid is None:
            process.wait()
            raise ConfigError(_refusal(Container(process, process.pid, words).said()))
        enter_cgroup(pid)
        try:
            _map_users(pid, slot)
        except OSError as error:
            raise ConfigError(_refusal(str(error))) from None
        os.write(go.fileno(), b"x")
        undo.pop_all()
        return Container(process, pid, words)


def _pipe(at_end: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """(to read, to write); closed at the end, if not before."""
    reads, writes = os.pipe()
    return at_end.enter_context(FileIO(reads, "r")), at_end.enter_context(FileIO(writes, "w"))


def _popen(command: list[str], descriptors: list[int], words: int, **options: bool) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        pass_fds=descriptors,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=words,
        stderr=words,
        cwd="/",
        **options,  # type: ignore[call-overload]
    )


def host_user(slot: int) -> int:
    """The user as which programs of a slot run, seen from the host."""
    if os.geteuid() != 0:
        return os.geteuid()
    return FIRST_HOST_USER + (os.getpid() % 65536) * HOST_USERS_PER_PROCESS + slot


def readable_paths() -> list[str]:
    """What a program needs to read, on the host: the interpreter's libraries and the system's."""
    return [path for path in (*SYSTEM_FOLDERS, *_interpreter_paths(), *SINGLE_FILES) if os.path.exists(path)]


def library_is_closed(user: int) -> bool:
    """Whether some folder above the standard library does not let another user in."""
    folders = Path(sysconfig.get_path("stdlib"), "x").parents
    return user not in (0, os.geteuid()) and not all(folder.stat().st_mode & 0o001 for folder in folders)


def _refusal(said: str) -> str:
    return (
        f"the kernel or the container runtime offers no user namespaces ({said or 'bubblewrap said nothing'}): allow them "
        "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, "
        f"kernel.apparmor_restrict_unprivileged_userns=0; docker: --privileged), {WEAKER}"
    )


def _child_pid(facts: int) -> int | None:
    """What bubblewrap tells about itself; None if it ended without a word."""
    text = b""
    while not text.rstrip().endswith(b"}"):
        block = os.read(facts, 4096)
        if not block:
            return None
        text += block
    return json.loads(text)["child-pid"]


def _map_users(pid: int, slot: int) -> None:
    """Root of the container is us; for the programs a user that exists nowhere else, if we are allowed to map it."""
    folder = Path("/proc", str(pid))
    if os.geteuid() == 0:
        programs = f"{PROGRAM_USER} {host_user(slot)} 1\n"
        (folder / "uid_map").write_text(f"0 0 1\n{programs}")
        (folder / "gid_map").write_text(f"0 0 1\n{programs}")
    else:
        (folder / "setgroups").write_text("deny")
        (folder / "uid_map").write_text(f"0 {os.geteuid()} 1\n")
        (folder / "gid_map").write_text(f"0 {os.getegid()} 1\n")


def _namespaces() -> list[str]:
    kinds = ["user", "ipc", "pid", "net", "uts"]
    powers = ["CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"]
    arguments = [f"--unshare-{kind}" for kind in kinds] + ["--unshare-cgroup-try", "--hostname", "jail"]
    arguments += ["--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for power in powers:
        arguments += ["--cap-add", power]
    return arguments


def _root() -> list[str]:
    """Mounts of the read-only root, in order."""
    arguments: list[str] = []
    made: set[str] = set()

    def parents(path: str) -> None:
        for parent in reversed(Path(path).parents):
            if str(parent) != "/" and str(parent) not in made:
                made.add(str(parent))
                arguments.extend(["--perms", "0755", "--dir", str(parent)])

    def mount(option: str, source: str, target: str) -> None:
        parents(target)
        arguments.extend([option, source, target])
        made.add(target)

    for folder in (*SYSTEM_FOLDERS, *COMPILER_FOLDERS):
        if os.path.islink(folder):
            mount("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            mount("--ro-bind", folder, folder)
    for path in (*_interpreter_paths(), *SINGLE_FILES):
        if os.path.exists(path):
            mount("--ro-bind", path, path)
    for device in DEVICES:
        mount("--dev-bind", device, device)
    for name in EXTRA_PACKAGES:
        for folder in _package_folders(name):
            mount("--ro-bind", folder, f"{EXTRA_FOLDER}/{os.path.basename(folder)}")
    for folder in _site_folders():
        arguments.extend(["--perms", "0755", "--tmpfs", folder, "--remount-ro", folder])
    mount("--ro-bind", str(Path(__file__).parent), f"{OWN_FOLDER}/jail")
    arguments.extend(["--perms", "0755", "--dir", WORKING_FOLDER, "--remount-ro", "/", "--chdir", "/"])
    return arguments


def _interpreter() -> str:
    """Not the one of the virtual environment, which needs the environment's files."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _interpreter_paths() -> list[str]:
    """The interpreter and its libraries, unless the system's folders hold them already."""
    candidates = [_interpreter(), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    covered = tuple(f"{folder}/" for folder in (*SYSTEM_FOLDERS, *COMPILER_FOLDERS))
    return [path for path in candidates if os.path.exists(path) and not f"{path}/".startswith(covered)]


def _site_folders() -> list[str]:
    """Installed packages within the folders above; they are hidden."""
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    folders = {os.path.join(library, "site-packages") for library in libraries}
    folders |= {
        os.path.join(sys.base_prefix, "lib", name, "dist-packages") for name in _python_folder_names()
    }
    return sorted(folder for folder in folders if os.path.isdir(folder))


def _python_folder_names() -> list[str]:
    return ["python3", f"python{sys.version_info.major}.{sys.version_info.minor}"]


def _package_folders(name: str) -> list[str]:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"EXTRA_PACKAGES: no installed package {name!r} to show in jails")
    folder = spec.submodule_search_locations[0]
    return [path for path in (folder, f"{folder}.libs") if os.path.isdir(path)]


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
