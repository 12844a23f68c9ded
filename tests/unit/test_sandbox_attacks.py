"""Programs that try to break out of a jail, to break it, or to stay. None succeeds and the next run works.

An attack that reaches its goal prints BROKEN. It may end in any of its `outcomes`; what it must not do is listed in
`test_an_attack_fails_and_leaves_nothing`.
"""

import os
import platform
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from r1mega.rewards.jail.cgroups import NAME as CGROUP_NAME
from r1mega.rewards.jail.usage import children_of
from r1mega.rewards.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs the package bubblewrap")
X86 = platform.machine() == "x86_64"
LIMITS = Limits(cpu_seconds=1.0, wall_seconds=60.0, memory_mib=128, output_bytes=1 << 20, processes=16)
LOOPS = Limits(cpu_seconds=1.0, wall_seconds=600.0, memory_mib=128)
"""Ended by the CPU time that was used, or not within the test's patience."""
SLEEPERS = Limits(cpu_seconds=1.0, wall_seconds=1.5, memory_mib=128)
ENDED = ("exited",)
STOPPED = ("exited", "time", "memory")
SECRET_NAME = "R1MEGA_TEST_SECRET"


@dataclass(frozen=True)
class Attack:
    source: str
    outcomes: tuple[str, ...] = ENDED
    limits: Limits = LIMITS
    stdin: bytes = b""


PRELUDE = """
import ctypes, errno, mmap, os, resource, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def syscall(*arguments):
    return libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
def broken(*what):
    print("BROKEN", *what, flush=True)
def refused(what, action):
    try:
        result = action()
    except (OSError, ValueError):
        return
    broken(what, result)
def no_call(what, *arguments):
    if syscall(*arguments) >= 0:
        broken(what)
HOST_PID, SECRET_FILE, HOME = {host_pid}, {secret_file!r}, {home!r}
"""

ATTACKS = {
    "infinite loop": Attack("while True: pass", ("time",)),
    "loop that ignores signals": Attack(
        "for n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass",
        ("time",),
    ),
    "loop in many processes": Attack("for _ in range(3): os.fork()\nwhile True: pass", ("time",)),
    "short-lived loops": Attack(
        "while True:\n if os.fork() == 0:\n  t = time.process_time()\n  while time.process_time() < t + .3: pass\n"
        "  os._exit(0)\n os.wait()",
        ("time",),
    ),
    "loops whose ends are ignored": Attack(
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n if os.fork() == 0:\n"
        "  while time.process_time() < .3: pass\n  os._exit(0)\n try: os.wait()\n except ChildProcessError: pass",
        ("time",),
        LOOPS,
    ),
    "short loops whose ends are ignored": Attack(
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n if os.fork() == 0:\n"
        "  while time.process_time() < .03: pass\n  os._exit(0)\n try: os.wait()\n except ChildProcessError: pass",
        ("time",),
        LOOPS,
    ),
    "fork bomb": Attack("while True:\n try: os.fork()\n except OSError: pass", ("time", "memory")),
    "vfork bomb": Attack("while True: libc.vfork() or libc._exit(0)", STOPPED),
    "thread bomb": Attack(
        "while True:\n try: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
        " except RuntimeError: pass",
        STOPPED,
    ),
    "zombies": Attack(
        "made = 0\ntry:\n while True:\n  made += 1\n  if os.fork() == 0: os._exit(0)\nexcept OSError: pass\n"
        "if made > 40: broken(made)",
        STOPPED,
    ),
    "memory": Attack("x = [bytearray(1 << 20) for _ in range(4000)]; broken()", ("memory",)),
    "memory in one piece": Attack("x = bytearray(1 << 40); broken()", ("memory",)),
    "memory by mmap": Attack(
        "m = []\ntry:\n while len(m) < 100:\n  m.append(mmap.mmap(-1, 8 << 20)); m[-1].write(bytes(8 << 20))\n"
        "except OSError: sys.exit(1)\nbroken(len(m))",
        ("exited", "memory"),
    ),
    "shared memory": Attack(
        "refused('shm_open', lambda: open('/dev/shm/x', 'wb'))\n"
        "refused('too much', lambda: [mmap.mmap(-1, 64 << 20).write(bytes(64 << 20)) for _ in range(1)] * 0 or\n"
        "        mmap.mmap(-1, 512 << 20))",
        ("exited", "memory"),
    ),
    "memory of many processes": Attack(
        "pids = []\nfor _ in range(12):\n pid = os.fork()\n if pid == 0:\n  x = bytearray(b'x') * (60 << 20)\n"
        "  time.sleep(1)\n  os._exit(0)\n pids.append(pid)\n"
        "survivors = [p for p in pids if os.waitpid(p, 0)[1] == 0]\nif len(survivors) > 3: broken(survivors)",
        ("memory",),
    ),
    "disk in one file": Attack(
        "f = open('/tmp/x', 'wb')\ntry:\n for _ in range(400): f.write(bytes(1 << 20))\nexcept OSError: sys.exit(3)\n"
        "broken()",
    ),
    "disk in many files": Attack(
        "n = 0\ntry:\n while n < 900:\n  open(f'/tmp/{n}', 'wb').write(bytes(1 << 18)); n += 1\nexcept OSError: pass\n"
        "if n > 64: broken(n)",
    ),
    "disk by fallocate": Attack(
        "refused('fallocate', lambda: os.posix_fallocate(os.open('/tmp/x', os.O_RDWR | os.O_CREAT), 0, 1 << 30))"
    ),
    "inodes": Attack(
        "n = 0\ntry:\n while n < 9000: open(f'/tmp/{n}', 'w').close(); n += 1\nexcept OSError: pass\n"
        "if n > 2000: broken(n)",
    ),
    "a gigabyte on stdout": Attack("for _ in range(1024): sys.stdout.write('x' * (1 << 20))", ("output",)),
    "a gigabyte on stderr": Attack("for _ in range(1024): sys.stderr.write('x' * (1 << 20))", ("output",)),
    "a gigabyte past a closed stdout": Attack("os.close(1)\nwhile True: os.write(2, b'x' * 65536)", ("output",)),
    "huge exception": Attack("raise ValueError('x' * (1 << 24))", ("output",)),
    "daemon": Attack(
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  while True: time.sleep(9)\n os._exit(0)"
    ),
    "background process that holds stdout": Attack("if os.fork() == 0:\n time.sleep(60); broken()"),
    "background thread": Attack("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"),
    "thread that never ends": Attack("threading.Thread(target=time.sleep, args=(60,)).start()", ("time",), SLEEPERS),
    "host files": Attack(
        "for p in '/etc/shadow /etc/passwd /etc/hostname /root/.bashrc /proc/1/environ /proc/self/mem /sys/kernel "
        "/var/log /run /dev/mem /dev/sda /dev/kmsg'.split():\n"
        " refused(p, lambda: open(p, 'rb').read(1)); refused(p, lambda: os.listdir(p))"
    ),
    "the host's /tmp": Attack(
        "refused('read', lambda: open(SECRET_FILE).read())\nif os.listdir('/tmp'): broken(os.listdir('/tmp'))"
    ),
    "home": Attack(
        "found = [(d, n) for d, _, ns in os.walk(HOME) for n in ns if 'id_rsa' in n or n.startswith('.bash')]\n"
        "if found: broken(found)"
    ),
    "the parent's environment": Attack(
        "for p in (1, os.getppid(), HOST_PID): refused(p, lambda: open(f'/proc/{p}/environ').read())\n"
        "environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')\n"
        "i = 0\nwhile environ[i]:\n if b'SECRET' in environ[i]: broken(environ[i])\n i += 1\n"
        "if set(os.environ) - set('PATH HOME TMPDIR LANG'.split()): broken(os.environ)"
    ),
    "the parent's memory": Attack(
        "for p in (0, 1, HOST_PID): refused(p, lambda: open(f'/proc/{p}/mem', 'rb').read(1))\n"
        "buffer = ctypes.create_string_buffer(16)\n"
        "iov = struct.pack('QQ', ctypes.addressof(buffer), 16)\n"
        "for p in range(1, 2000): no_call('vm_readv', 310, p, iov, 1, iov, 1, 0)\n"
        "no_call('vm_writev', 311, HOST_PID, iov, 1, iov, 1, 0)"
    ),
    "inherited objects": Attack(
        "import gc\nfor o in gc.get_objects():\n"
        " if isinstance(o, dict) and any(isinstance(v, (str, bytes)) and 'PLANTED' + '_SECRET' in str(v) for v in o.values()):"
        " broken()\n"
        "if 'r1mega' in sys.modules or any('messages' in m for m in sys.modules if 'jail' in m): broken()"
    ),
    "internet sockets": Attack("for f in (2, 10):\n for t in (1, 2, 3): refused((f, t), lambda: socket.socket(f, t))"),
    "unix sockets": Attack(
        "refused('stream', lambda: socket.socket(1))\na, b = socket.socketpair(1, socket.SOCK_DGRAM)\n"
        "refused('abstract', lambda: a.sendto(b'x', '\\0/org/freedesktop/systemd1'))\nrefused('bind', lambda: a.bind('\\0x'))\n"
        "refused('connect', lambda: a.connect('/run/systemd/journal/socket'))\n"
        "refused('fd', lambda: socket.send_fds(a, [b'x'], [0]))\nno_call('inet pair', 53, 2, 1, 0, bytes(8))"
    ),
    "netlink, vsock, packet, bluetooth": Attack(
        "for f in (15, 16, 17, 29, 31, 38, 40, 44): no_call(f, 41, f, 2, 0), no_call(f, 41, f, 3, 0)"
    ),
    "ptrace": Attack(
        "for p in range(0, 2000): no_call('attach', 101, 16, p, 0, 0), no_call('seize', 101, 0x4206, p, 0, 0)\n"
        "no_call('traceme', 101, 0, 0, 0, 0)"
    ),
    "kill everybody": Attack("for s in (15, 2, 9): refused('kill', lambda: os.kill(-1, s))", STOPPED),
    "kill the server": Attack(
        "for p in [HOST_PID, os.getppid() or 99999, *range(2, 3000)]:\n"
        " for s in (9, 15, 2, 19): refused(p, lambda: os.kill(p, s))"
    ),
    "signal the group": Attack(
        "signal.signal(15, signal.SIG_IGN)\nos.killpg(0, 15)\nos.kill(0, 15)\n"
        "refused('setpgid', lambda: os.setpgid(0, HOST_PID))",
        STOPPED,
    ),
    "mounts": Attack(
        "no_call('tmpfs', 165, b'none', b'/tmp', b'tmpfs', 0, 0)\nno_call('proc', 165, b'proc', b'/tmp', b'proc', 0, 0)\n"
        "no_call('remount', 165, b'none', b'/', b'', 32 | 4096, 0)\nno_call('umount', 166, b'/tmp', 2)\n"
        "no_call('pivot', 155, b'/tmp', b'/tmp')\n"
        "for n in (428, 429, 430, 432, 442): no_call(n, n, -100 & 0xffffffff, b'/tmp', 0, 0, 0)"
    ),
    "nested namespaces": Attack(
        "for f in (0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x2000000, 0x80):\n"
        " no_call(f, 272, f)\n"
        " if syscall(56, f | 17, 0, 0, 0, 0) >= 0: broken('clone', f)\n"
        "args = struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0)\nno_call('clone3', 435, args, 64)\n"
        "no_call('setns', 308, 0, 0)"
    ),
    "setuid": Attack(
        "for f in (os.setuid, os.setgid, os.seteuid, os.setegid): refused(f, lambda: f(0))\n"
        "refused('groups', lambda: os.setgroups([0]))\nrefused('chown', lambda: os.chown('/tmp', 0, 0))\n"
        "no_call('resuid', 117, 0, 0, 0)\nno_call('capset', 126, struct.pack('Ii', 0x20080522, 0), b'\\xff' * 24)\n"
        "open('/tmp/x', 'w').close(); os.chmod('/tmp/x', 0o6755)"
    ),
    "exec": Attack(
        "for p in ('/bin/sh', '/usr/bin/python3', sys.executable):\n refused(p, lambda: os.execv(p, [p, '-c', 'echo BROKEN']))\n"
        " refused(p, lambda: os.posix_spawn(p, [p], {}))\n refused(p, lambda: subprocess.run([p, '-c', 'echo BROKEN']))\n"
        "if os.system('echo BROKEN') == 0: broken('system')\nrefused('fd', lambda: os.execve(os.open('/bin/sh', 0), ['sh'], {}))"
    ),
    "exec by the jail's own way": Attack(
        "def attempt():\n f = os.open('/usr/bin/env', 0); resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        " os.dup2(f, 1000); os.execve(1000, ['env'], {})\nrefused('1000', attempt)\n"
        "f = os.open('/usr/bin/env', 0)\nrefused('dup2', lambda: os.dup2(f, 1000))\n"
        "if syscall(322, 1000, b'', 0, 0, 0x1000) >= 0: broken()"
    ),
    "memfd and exec": Attack("no_call('memfd', 319, b'x', 0)\nno_call('secret memory', 447, 0)"),
    "library from /tmp": Attack(
        "import shutil, _ctypes\nshutil.copy(_ctypes.__file__, '/tmp/x.so')\nrefused('dlopen', lambda: ctypes.CDLL('/tmp/x.so'))"
    ),
    "quick exit": Attack("os._exit(0)"),
    "huge stdin not read": Attack("print('ignored')", stdin=bytes(64 << 20)),
    "writing to stdin": Attack(
        "refused('write', lambda: os.write(0, b'x'))\nrefused('truncate', lambda: os.ftruncate(0, 0))\n"
        "refused('map', lambda: mmap.mmap(0, 4).write(b'xxxx'))",
        stdin=b"data",
    ),
    "closing everything": Attack("os.closerange(0, 4096)\nwhile True: os.fork()", STOPPED),
    "inherited descriptors": Attack(
        "for f in range(3, 4096):\n refused(f, lambda: os.fstat(f))\n refused(f, lambda: os.write(f, b'{\"status\": 0}'))"
    ),
    "raising limits": Attack(
        "for r in range(16):\n soft, hard = resource.getrlimit(r)\n"
        " if hard >= 0: refused(r, lambda: resource.setrlimit(r, (hard + 1, hard + 1)))\n"
        "refused('prlimit', lambda: resource.prlimit(HOST_PID, 7))\nrefused('nice', lambda: os.nice(-5))"
    ),
    "other kernel doors": Attack(
        "doors = dict(io_uring=425, io_uring_enter=426, bpf=321, keyctl=250, add_key=248, request_key=249, userfaultfd=323,\n"
        " perf=298, mknod=133, chroot=161, open_by_handle=304, name_to_handle=303, shmget=29, msgget=68, semget=64, mq=240,\n"
        " pidfd_open=434, pidfd_getfd=438, kcmp=312, syslog=103, reboot=169, swapon=167, kexec=246, module=175, finit=313,\n"
        " iopl=172, ioperm=173, quotactl=179, personality=135, acct=163, settime=227, hostname=170, fanotify=300, lookup=212,\n"
        " landlock=444, seccomp=317, process_madvise=440, move_pages=279, mbind=237, futex_requeue=456, listmount=458,\n"
        " lsm=459, unknown=1000)\n"
        "for name, number in doors.items(): no_call(name, number, *[1, 1, 1, 1, 1])",
        STOPPED,
    ),
    "x32 system calls": Attack("no_call('x32', 0x40000000 + 39)"),
    "device nodes and fifos": Attack(
        "refused('mknod', lambda: os.mknod('/tmp/sda', 0o60666, os.makedev(8, 0)))\n"
        "refused('chroot', lambda: os.chroot('/tmp'))\n"
        "refused('random', lambda: open('/dev/tty'))"
    ),
    "32-bit system calls": Attack(
        "code = bytes.fromhex('b814000000cd80c3')\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(code)\n"
        "pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\n"
        "if pid == os.getpid(): broken()"
    ),
    "new powers": Attack(
        "if libc.prctl(38, 0, 0, 0, 0) == 0: broken('new privileges')\nif libc.prctl(8, 1, 0, 0, 0) == 0 and False: broken()\n"
        "if libc.prctl(47, 2, 21, 0, 0) == 0: broken('ambient')\nif libc.prctl(1, 0, 0, 0, 0) == 0: broken('pdeathsig')\n"
        "no_call('pdeathsig', 157, 1 << 32 | 1, 0, 0, 0, 0)\n"
        "if libc.prctl(39, 0, 0, 0, 0) != 1: broken('no_new_privs')\nif libc.prctl(21, 0, 0, 0, 0) != 2: broken('seccomp')"
    ),
    "symlinks": Attack(
        "for target in (SECRET_FILE, '/etc/shadow', '/proc/self/root', '../../../../etc/passwd'):\n"
        " os.symlink(target, '/tmp/link'); refused(target, lambda: open('/tmp/link').read()); os.unlink('/tmp/link')\n"
        "os.symlink('/tmp/a', '/tmp/b'); os.symlink('/tmp/b', '/tmp/a'); refused('loop', lambda: open('/tmp/a'))\n"
        "refused('rename', lambda: os.rename('/tmp', '/usr/x'))"
    ),
    "writing to the root": Attack(
        "for p in ('/x', '/usr/x', '/usr/lib/x', '/dev/x', '/jail/x', os.__file__, os.path.dirname(os.__file__) + '/x'):\n"
        " refused(p, lambda: open(p, 'a'))\nos.chdir('/')\nrefused('rmdir', lambda: os.rmdir('/tmp'))"
    ),
    "stack overflow": Attack(
        "sys.setrecursionlimit(10**9)\nclass A: __getattr__ = lambda s, n: getattr(s, n)\nA().x", ("exited", "memory")
    ),
    "segmentation fault": Attack("ctypes.string_at(0)"),
    "SIGKILL to itself": Attack("os.kill(os.getpid(), 9)"),
    "abort": Attack("os.abort()"),
    "SIGSTOP to itself": Attack("os.kill(os.getpid(), 19); time.sleep(60)", ("time",), SLEEPERS),
    "stopped children": Attack(
        "pid = os.fork()\nif pid == 0:\n while True: os.kill(os.getpid(), 19)\nos.waitpid(pid, 0)", ("time",), SLEEPERS
    ),
    "sleep": Attack("time.sleep(10**6)", ("time",), SLEEPERS),
    "wait for stdin for ever": Attack("r, w = os.pipe(); os.read(r, 1)", ("time",), SLEEPERS),
    "changed interpreter": Attack(
        "import builtins, json, traceback\nbuiltins.print = builtins.len = lambda *a, **k: 7\njson.dumps = json.loads = None\n"
        "sys.modules.clear()\nsys.path.clear()\nos._exit = os.write = None"
    ),
    "patched exit": Attack("import atexit\natexit.register(lambda: os._exit(0))\nsys.exit(5)"),
    "endless atexit": Attack("import atexit\n@atexit.register\ndef _():\n while True: pass", ("time",)),
    "forged report": Attack(
        "for f in range(3, 64):\n for m in (b'', b'fault', b'{\"status\": 0, \"cpu_seconds\": 0, \"fault\": \"\"}'):\n"
        "  try: os.write(f, m); broken(f)\n  except OSError: pass"
    ),
    "source that cannot be compiled": Attack("'" * 7 + "\\0"),
    "syntax bomb": Attack("eval('(' * 100000)", ("exited", "memory")),
    "big integer": Attack("x = 9 ** 9 ** 9", ("time", "memory")),
    "catastrophic regex": Attack("import re; re.match('(a+)+$', 'a' * 64 + 'b')", ("time",)),
}  # fmt: skip
RAW_NUMBERS = [
    name for name, attack in ATTACKS.items() if "no_call(" in attack.source or "syscall(" in attack.source
]


@pytest.fixture(scope="module")
def sandbox():
    os.environ[SECRET_NAME] = "PLANTED_SECRET"
    with Sandbox(slots=1) as sandbox:
        yield sandbox
    del os.environ[SECRET_NAME]


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "secret"
    path.write_text("PLANTED_SECRET")
    path.chmod(0o644)
    return path


def prelude(secret_file):
    return PRELUDE.format(host_pid=os.getpid(), secret_file=str(secret_file), home=str(Path.home()))


def traces(sandbox):
    """What a run could leave behind on this machine, except what it is made of."""
    server = sandbox._slots[0].server().box.server_pid
    return {
        "processes": children_of(server),
        "descriptors here": len(os.listdir("/proc/self/fd")),
        "descriptors of the server": len(os.listdir(f"/proc/{server}/fd")),
        "mounts of the server": Path(f"/proc/{server}/mountinfo").read_text().count("\n"),
        "threads": threading.active_count(),
        "cgroups": sorted(str(p) for p in Path("/sys/fs/cgroup").rglob(f"{CGROUP_NAME}-{os.getpid()}-*")),
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails_and_leaves_nothing(sandbox, secret_file, name):
    if name in RAW_NUMBERS and not X86:
        pytest.skip("system call numbers of x86-64")
    attack = ATTACKS[name]
    before = traces(sandbox)
    source = prelude(secret_file) + attack.source
    result = sandbox.run(source, attack.stdin, limits=attack.limits)
    if attack.limits is LOOPS:
        assert 1.0 < result.cpu_seconds < 10.0
    assert b"BROKEN" not in result.stdout + result.stderr, result
    assert result.outcome in attack.outcomes, result
    assert len(result.stdout) <= attack.limits.output_bytes
    assert len(result.stderr) <= 4000
    after = traces(sandbox)
    assert after["processes"] == []
    assert after == before
    following = sandbox.run("print(len('four'), sorted([2, 1]), __name__)", limits=LIMITS)
    assert (following.outcome, following.stdout) == ("exited", b"4 [1, 2] __main__\n"), following


def test_there_are_at_least_forty_attacks():
    assert len(ATTACKS) >= 40
