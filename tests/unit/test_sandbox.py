"""What a program gets in a jail, what its caller gets back, and that the machinery survives and leaves nothing."""

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1mega.config import ConfigError
from r1mega.rewards.jail import landlock
from r1mega.rewards.jail.cgroups import NAME as CGROUP_NAME
from r1mega.rewards.jail.cgroups import SERVER_MIB, Cgroup
from r1mega.rewards.jail.fork_server import ForkServer
from r1mega.rewards.jail.usage import children_of
from r1mega.rewards.sandbox import Limits, Sandbox

ROOT = Path(__file__).parents[2]
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs the package bubblewrap")
needs_compiler = pytest.mark.skipif(not os.path.exists("/usr/bin/g++"), reason="needs the package g++")
SHORT = Limits(cpu_seconds=1.0, wall_seconds=60.0, memory_mib=128)


@pytest.fixture(scope="module")
def full():
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    with Sandbox(slots=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def process():
    with Sandbox(slots=2, isolation="process") as sandbox:
        yield sandbox


@pytest.fixture(params=["full", "process"])
def sandbox(request):
    return request.getfixturevalue(request.param)


def cgroups_of(pid):
    return sorted(str(path) for path in Path("/sys/fs/cgroup").rglob(f"{CGROUP_NAME}-{pid}-*"))


def alive(pid):
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(pid):
    """Its children and theirs, as /proc tells them."""
    children = children_of(pid)
    return children + [process for child in children for process in descendants(child)]


# ---------------------------------------------------------------- what a program gets


def test_a_program_reads_stdin_and_its_output_comes_back(sandbox):
    result = sandbox.run(
        "import sys\nprint(input()[::-1])\nprint('no', file=sys.stderr)", "réponse\n".encode()
    )
    assert result.outcome == "exited"
    assert result.exit_code == 0
    assert result.stdout.decode() == "esnopér\n"
    assert result.stderr == b"no\n"
    assert 0 < result.cpu_seconds < 10
    assert result.wall_seconds > 0


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('words')", 1),
        ("raise SystemExit(3)", 3),
        ("import os; os._exit(9)", 9),
        ("1 / 0", 1),
        ("(", 1),
        ("import threading; threading.Thread(target=lambda: print('late')).start()", 0),
        ("import atexit; atexit.register(print, 'last')", 0),
    ],
)
def test_exit_codes_are_those_of_an_interpreter(full, source, code):
    expected = subprocess.run([sys.executable, "-I", "-c", source], capture_output=True)
    result = full.run(source)
    assert expected.returncode == code
    assert (result.outcome, result.exit_code, result.stdout) == ("exited", code, expected.stdout)


def test_a_traceback_shows_the_program_alone(full):
    result = full.run("def f():\n    return 1 / 0\nf()")
    lines = result.stderr.decode().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "    return 1 / 0" in lines
    assert all('"main.py"' in line for line in lines if line.startswith("  File"))


def test_stdin_of_every_size_arrives_whole(full):
    source = "import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    for size in (0, 1, 4095, 65536, 65537, 5_000_001):
        content = os.urandom(size)
        assert full.run(source, content).stdout.decode().strip() == hashlib.sha256(content).hexdigest()


def test_undecodable_bytes_pass_through(full):
    content = bytes(range(256)).replace(b"\r", b"")
    result = full.run("import sys; sys.stdout.write(sys.stdin.read())", content)
    assert result.stdout == content


def test_files_are_there_and_may_be_imported(sandbox):
    files = {"helper.py": b"VALUE = 42\n", "data/in.bin": b"\x00\xff"}
    result = sandbox.run("import helper; print(helper.VALUE, open('data/in.bin', 'rb').read())", files=files)
    assert result.stdout == b"42 b'\\x00\\xff'\n", result


def test_output_up_to_the_limit_is_kept_whole(full):
    limits = Limits(output_bytes=100_000)
    exact = full.run("print('x' * 100_000, end='')", limits=limits)
    assert (exact.outcome, len(exact.stdout)) == ("exited", 100_000)
    more = full.run("print('x' * 100_001, end='')", limits=limits)
    assert (more.outcome, len(more.stdout)) == ("output", 100_000)
    noisy = full.run("import sys; sys.stderr.write('a' * 9000 + 'end')")
    assert noisy.outcome == "exited"
    assert len(noisy.stderr) == 4000
    assert noisy.stderr.endswith(b"end")


def test_the_standard_library_works_and_site_packages_are_absent(full):
    modules = "asyncio, bisect, calendar, csv, statistics, decimal, fractions, hashlib, xml.etree.ElementTree, email, queue"
    result = full.run(f"import {modules}\nprint(hashlib.sha256(b'').hexdigest()[:4], decimal.Decimal(1) / 8)")
    assert result.stdout == b"e3b0 0.125\n", result
    for package in ("pip", "torch", "r1mega", "pytest"):
        assert b"ModuleNotFoundError" in full.run(f"import {package}").stderr


def test_asyncio_and_multiple_processes_work(full):
    loop = "import asyncio\nasync def f(): await asyncio.sleep(0.01); return 5\nprint(asyncio.run(f()))"
    assert full.run(loop).stdout == b"5\n"
    fork = (
        "import os\nif os.fork() == 0:\n print('child', flush=True)\n os._exit(0)\nos.wait(); print('parent')"
    )
    assert full.run(fork).stdout == b"child\nparent\n"


def test_a_program_behaves_alike_in_every_run(full):
    source = "import random; print(random.random(), hash('text'), list({'a', 'b', 'c'}))"
    with Sandbox(slots=1) as another:
        outputs = {full.run(source).stdout for _ in range(3)} | {another.run(source).stdout}
    assert len(outputs) == 1


def test_nothing_of_one_run_is_in_the_next(full):
    change = "import builtins, sys, os, random\nbuiltins.planted = 1\nsys.modules['planted'] = os\nos.planted = 1\nprint = None\n"
    change += "open('/tmp/planted', 'w').close(); random.seed(5); os.environ['PLANTED'] = '1'; os.chdir('/')"
    look = "import builtins, sys, os\nprint(hasattr(builtins, 'planted'), 'planted' in sys.modules, hasattr(os, 'planted'),"
    look += "os.listdir('/tmp'), os.getcwd(), 'PLANTED' in os.environ)"
    with Sandbox(slots=1) as one:
        before = one.run(look).stdout
        assert one.run(change).exit_code == 0
        assert one.run(look).stdout == before == b"False False False [] /tmp False\n"


def test_a_source_is_not_found_in_the_memory_of_a_later_run():
    """The server never reads what a program is made of, so not even freed memory holds it."""
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    marker = "needle-" + os.urandom(8).hex()
    look = f"""
import ctypes
needle = {marker[::-1]!r}[::-1].encode()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def count(text):
    return sum(
        ctypes.string_at(libc.malloc(size), size).count(text) for size in (64, 512, 4096, 65536) for _ in range(200)
    )
print(count(needle))
"""
    with Sandbox(slots=1) as one:
        for _ in range(5):
            one.run("x = '" + (marker + " ") * 500 + "'", stdin=marker.encode() * 100)
        assert one.run(look).stdout == b"0\n"


# ---------------------------------------------------------------- limits


def test_cpu_time_of_children_counts(full):
    source = "import os, time\nfor _ in range(4):\n if os.fork() == 0:\n  while time.process_time() < 0.4: pass\n  os._exit(0)\n"
    source += "try:\n while True: os.wait()\nexcept ChildProcessError: pass"
    assert full.run(source, limits=SHORT).outcome == "time"


def test_cpu_time_over_the_limit_is_out_of_time_even_after_a_clean_exit(full):
    source = "import time\nwhile time.process_time() < 0.035: pass"
    result = full.run(source, limits=Limits(cpu_seconds=0.02))
    assert result.outcome == "time"


def test_waiting_is_limited_by_the_wall_clock(sandbox):
    result = sandbox.run("import time; time.sleep(60)", limits=Limits(cpu_seconds=1, wall_seconds=0.5))
    assert result.outcome == "time"
    assert result.cpu_seconds < 0.5


def test_memory_is_bounded_and_named(sandbox):
    assert sandbox.run("x = bytearray(100 << 20)", limits=SHORT).outcome == "exited"
    assert sandbox.run("x = bytearray(200 << 20)", limits=SHORT).outcome == "memory"
    assert sandbox.run("x = bytearray(200 << 20)", limits=Limits(memory_mib=300)).outcome == "exited"


def test_limits_must_be_positive():
    for name in ("cpu_seconds", "memory_mib", "output_bytes", "processes"):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


# ---------------------------------------------------------------- sessions

ECHO = "import os\nwhile block := os.read(3, 65536): os.write(3, block.upper())\nprint('closed')"


def test_a_session_speaks_in_both_directions(sandbox):
    with sandbox.open(ECHO, limits=SHORT) as session:
        for word in (b"one", b"two"):
            session.send(word)
            assert session.receive(100, time.monotonic() + 30) == word.upper()
        result = session.finish()
    assert (result.outcome, result.exit_code, result.stdout) == ("exited", 0, b"closed\n")


def test_a_session_carries_more_than_a_buffer_holds(full):
    sent = os.urandom(1 << 20).lower()
    source = "import os\nn = 0\nwhile n < 1 << 20: n += len(os.read(3, 65536))\nleft = b'y' * (1 << 20)\n"
    source += "while left: left = left[os.write(3, left):]"
    with full.open(source) as session:
        session.send(sent)
        received = b""
        while block := session.receive(1 << 16, time.monotonic() + 30):
            received += block
        assert received == b"y" * (1 << 20)
        assert session.finish().exit_code == 0


def test_a_silent_session_meets_its_deadline_and_can_be_killed(full):
    with full.open("import time; time.sleep(60)") as session:
        with pytest.raises(TimeoutError):
            session.receive(10, time.monotonic() + 0.2)
        session.kill()
        assert session.finish().outcome == "killed"


def test_a_session_ends_with_its_program(full):
    with full.open("print('bye')") as session:
        assert session.receive(10, time.monotonic() + 30) == b""
        assert session.finish().stdout == b"bye\n"
        with pytest.raises(BrokenPipeError):
            session.send(b"x")
    with full.open("while True: pass", limits=Limits(cpu_seconds=0.3)) as session:
        assert session.receive(10, time.monotonic() + 60) == b""
        assert session.finish().outcome == "time"


def test_a_session_that_talks_to_stdout_does_not_block(full):
    source = "import os, sys\nsys.stdout.write('x' * (1 << 20)); sys.stdout.flush(); os.write(3, b'done')"
    with full.open(source) as session:
        assert session.receive(10, time.monotonic() + 30) == b"done"
        assert len(session.finish().stdout) == 1 << 20


def test_an_interrupted_wait_frees_its_slot_and_ends_the_program():
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    source = """
import os, signal, threading
from r1mega.rewards.sandbox import Sandbox
with Sandbox(slots=1) as sandbox:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        sandbox.run("import time; time.sleep(600)")
    except KeyboardInterrupt:
        print(sandbox.run("print(1)").stdout)
"""
    ended = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, timeout=120)
    assert ended.stdout == b"b'1\\n'\n", ended


def test_an_abandoned_session_frees_its_slot(full):
    for _ in range(3):
        with pytest.raises(KeyError), full.open(ECHO):
            raise KeyError
    assert full.run("print(1)").stdout == b"1\n"


# ---------------------------------------------------------------- threads, loops, neighbours


def test_many_threads_share_two_slots(full):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: full.run(f"print({n} * 2)").stdout, range(60)))
    assert results == [b"%d\n" % (2 * n) for n in range(60)]


def test_an_event_loop_keeps_turning(full):
    async def work():
        runs = [full.run_async("import time; time.sleep(.3); print(1)") for _ in range(2)]
        pending = asyncio.gather(*runs)
        turns = 0
        while not pending.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns, await pending

    turns, results = asyncio.run(work())
    assert turns > 5
    assert [result.stdout for result in results] == [b"1\n", b"1\n"]


def test_a_neighbour_is_neither_seen_nor_heard(full):
    secret = "import os\nopen('/tmp/secret', 'w').write('neighbour')\nos.write(3, str(os.getpid()).encode())\nos.read(3, 1)"
    with full.open(secret) as session:
        session.receive(10, time.monotonic() + 30)
        look = "import os\nprint(os.listdir('/tmp'))\nfor p in range(2, 500):\n try: print(os.kill(p, 0))\n except OSError: pass"
        assert full.run(look).stdout == b"[]\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give away")
def test_every_slot_has_a_user_of_its_own(full):
    def user(session):
        session.receive(1, time.monotonic() + 30)
        (program,) = descendants(session._server.box.server_pid)
        return os.stat(f"/proc/{program}").st_uid, Path(f"/proc/{program}/status").read_text().split("Uid:")[
            1
        ].split()[0]

    source = "import os; os.write(3, b'x'); os.read(3, 1)"
    with full.open(source) as one, full.open(source) as two:
        users = {user(one), user(two)}
    assert len(users) == 2
    assert "0" not in users


def test_the_server_holds_nothing_of_ours(full):
    os.environ["R1MEGA_PLANTED"] = "planted-secret"
    try:
        with Sandbox(slots=1) as one:
            pid = one._slots[0].server().box.server_pid
            for what in ("environ", "cmdline", "maps"):
                content = Path(f"/proc/{pid}/{what}").read_bytes()
                assert b"planted-secret" not in content
                assert b"torch" not in content
            one.run("pass")
            links = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
            assert sum(link.startswith("socket:") for link in links) == 1
            assert not [
                link
                for link in links
                if link.startswith("/") and not link.startswith(("/dev/null", "/tmp/#"))
            ]
    finally:
        del os.environ["R1MEGA_PLANTED"]


# ---------------------------------------------------------------- death and burial


def test_a_killed_server_is_a_fault_and_the_next_run_works():
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    with Sandbox(slots=1) as one:
        server = one._slots[0].server().box.server_pid
        timer = threading.Timer(0.3, os.kill, (server, signal.SIGKILL))
        timer.start()
        result = one.run("import time; time.sleep(30)")
        timer.join()
        assert result.outcome == "fault"
        assert result.exit_code is None
        assert b"server" in result.stderr
        assert one.run("print(2)").stdout == b"2\n"
        idle = one._slots[0].server().box
        assert idle.server_pid != server
        for victim in (idle.server_pid, idle.process.pid):
            if alive(victim):
                os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not alive(idle.server_pid))
        assert one.run("print(3)").stdout == b"3\n"


@pytest.mark.parametrize("isolation", ["full", "process"])
def test_a_closed_sandbox_leaves_nothing(isolation):
    if isolation == "full" and shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")

    def traces():
        folders = [name for name in os.listdir("/tmp") if name.startswith("r1mega-jail-")]
        mine = [pid for pid in descendants(os.getpid()) if alive(pid)]
        return (
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            cgroups_of(os.getpid()),
            folders,
            mine,
        )

    before = traces()
    with Sandbox(slots=2, isolation=isolation) as sandbox:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda n: sandbox.run("open('x', 'w').close(); print(1)"), range(4)))
        with sandbox.open(ECHO) as session:
            session.send(b"x")
    assert traces() == before


def test_closing_ends_runs_in_flight_and_those_that_wait():
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    sandbox = Sandbox(slots=1)
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(sandbox.run, "import time; time.sleep(60)")
        wait_until(lambda: sandbox._idle.empty())
        waiting = threads.submit(sandbox.run, "print(1)")
        sandbox.close()
        assert running.result(30).outcome == "fault"
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(30)
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("print(1)")
    sandbox.close()


def test_a_sandbox_outlives_the_thread_that_made_it():
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    made = []
    maker = threading.Thread(target=lambda: made.append(Sandbox(slots=1)))
    maker.start()
    maker.join()
    with made[0] as sandbox:
        server = sandbox._slots[0].server().box.server_pid
        time.sleep(0.2)
        assert sandbox.run("print(1)").stdout == b"1\n"
        assert sandbox._slots[0].server().box.server_pid == server


HOST = '''
import os, sys, time
from r1mega.rewards.jail.fork_server import ForkServer
from r1mega.rewards.jail.usage import children_of
from r1mega.rewards.sandbox import Sandbox
sandbox = Sandbox(slots=1)
session = sandbox.open("""
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
os.write(3, b"x")
time.sleep(600)
""")
session.receive(1, time.monotonic() + 60)
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(600)
print("ready", flush=True)
if sys.argv[1] != "exit":
    time.sleep(600)
'''


@needs_bubblewrap
@pytest.mark.parametrize("end", ["kill", "fork", "exit"])
def test_everything_dies_with_its_host(end):
    """fork: a child of the host keeps its descriptors open, so that only the death signal can tell."""
    host = subprocess.Popen([sys.executable, "-c", HOST, end], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert host.stdout.readline() == b"ready\n"
        below = descendants(host.pid)
        if end == "exit":
            host.wait(60)
        else:
            assert len(below) >= 4, "bubblewrap, server, program, its child"
        orphan = [
            pid for pid in below if end == "fork" and b"Sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        host.kill()
        host.wait()
        wait_until(lambda: not [pid for pid in below if alive(pid) and pid not in orphan])
        for pid in orphan:
            os.kill(pid, signal.SIGKILL)
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    with Sandbox(slots=1):  # sweeps what a killed host could not remove
        assert cgroups_of(host.pid) == []


# ---------------------------------------------------------------- C++

SUM = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; return 3; }"


@needs_compiler
def test_a_cpp_program_is_compiled_once_and_run(full):
    first = full.run(SUM, b"1 2", language="c++")
    assert (first.outcome, first.exit_code, first.stdout) == ("exited", 3, b"3\n"), first
    assert full.run(SUM, b"20 22", language="c++").stdout == b"42\n"
    assert len(full._executables) == 1


@needs_compiler
@pytest.mark.parametrize(
    "source",
    [
        '#include "/etc/shadow"\nint main() {}',
        '#include "/proc/self/environ"\nint main() {}',
        'asm(".incbin \\"/etc/passwd\\""); int main() {}',
        f'#include "{__file__}"\nint main() {{}}',
        "int main() { return nothing; }",
        "#error here",
    ],
)
def test_a_compiler_reads_nothing_outside(full, source):
    result = full.run(source, language="c++")
    assert result.outcome == "exited"
    assert result.exit_code != 0
    assert b"root:" not in result.stderr
    assert b"What a program gets" not in result.stderr
    assert b"rror" in result.stderr


@needs_compiler
def test_cpp_limits_and_attacks(full):
    def run(body, limits=SHORT):
        head = "#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n#include <sys/socket.h>\n#include <fcntl.h>\n"
        return full.run(head + "int main() {" + body + "}", language="c++", limits=limits)

    assert run("volatile int x = 0; for (;;) x++;").outcome == "time"
    fill = "for (;;) { char* p = new char[1 << 20]; for (int i = 0; i < 1 << 20; i++) ((volatile char*)p)[i] = 1; }"
    assert run(fill).outcome == "memory"
    assert run("for (;;) fork();").outcome in ("time", "memory")
    assert run("abort();").exit_code < 0
    attack = 'execl("/bin/sh", "sh", "-c", "echo BROKEN", (char*)0); char* none[] = {0};'
    attack += 'fexecve(open("/usr/bin/env", O_RDONLY), none, none);'
    attack += 'if (socket(2, 1, 0) >= 0 || setuid(0) == 0 || open("/etc/shadow", O_RDONLY) >= 0) puts("BROKEN"); puts("end");'
    result = run(attack)
    assert result.stdout == b"end\n", result
    head = "#include <cstdio>\nlong f(long n) { volatile long m = n; return m ? 1 + f(m - 1) : 0; }\n"
    deep = full.run(head + 'int main() { printf("%ld", f(1000000)); }', language="c++")
    assert deep.stdout == b"1000000", deep


@needs_compiler
def test_an_endless_compilation_ends(full, monkeypatch):
    monkeypatch.setattr("r1mega.rewards.sandbox.COMPILE_LIMITS", Limits(cpu_seconds=1.0, memory_mib=256))
    source = "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\nstatic_assert(f(90) > 0); int main() {}"
    many = "".join(
        f"template<long N> struct S{i} {{ static constexpr long v = f(20 + N); }};" for i in range(50)
    )
    result = full.run(source + many, language="c++")
    assert result.outcome in ("time", "exited")
    assert result.exit_code != 0


# ---------------------------------------------------------------- refusals and the weaker mode


def test_a_machine_without_bubblewrap_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r'package bubblewrap.*rewards\.isolation="process"') as refusal:
        Sandbox(slots=1)
    assert "\n" not in str(refusal.value)


def test_a_machine_without_user_namespaces_is_refused_in_one_line(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match=r"namespace.*rewards\.isolation") as refusal:
        Sandbox(slots=1)
    assert "\n" not in str(refusal.value)


def test_unknown_modes_and_languages_are_refused(full, process):
    with pytest.raises(ConfigError, match=r"'none'.*full, process"):
        Sandbox(isolation="none")
    with pytest.raises(ValueError, match=r"'java'.*python"):
        full.run("", language="java")
    with pytest.raises(ConfigError, match="full"):
        process.run(SUM, language="c++")


def test_the_isolation_in_force_is_said_in_one_line(full, process):
    for word in ("full", "pid", "network", "seccomp", "uid", "cgroup"):
        assert word in full.isolation
    assert process.isolation.startswith("process: no namespaces")
    assert "\n" not in full.isolation + process.isolation


def test_the_weaker_mode_still_holds_the_worst(process):
    source = """
import os, socket, ctypes
def refused(action):
    try: print("BROKEN", action())
    except OSError: pass
refused(os.fork); refused(socket.socket); refused(lambda: os.execv("/bin/sh", ["sh"])); refused(lambda: os.kill(HOST, 0))
refused(lambda: os.kill(-1, 9)); refused(lambda: __import__("resource").prlimit(HOST, 7))
if os.geteuid() == 0: print("BROKEN root")
print("end")
""".replace("HOST", str(os.getpid()))
    result = process.run(source)
    assert result.stdout == b"end\n", result
    assert process.run("while True: pass", limits=Limits(cpu_seconds=0.5)).outcome == "time"


@pytest.mark.skipif(not landlock.version(), reason="needs a kernel with Landlock")
def test_the_weaker_mode_closes_the_file_system(process, tmp_path):
    (tmp_path / "open").write_text("secret")
    tmp_path.chmod(0o777)
    paths = [str(tmp_path / "open"), "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/maps"]
    source = (
        f"import os\nfor p in {paths!r}:\n try: print('BROKEN', open(p).read(9))\n except OSError: pass\n"
    )
    source += f"try: print('BROKEN', open({str(tmp_path / 'new')!r}, 'w'))\nexcept OSError: pass\nprint(os.listdir('.'))"
    assert process.run(source).stdout == b"[]\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives programs another user")
def test_the_weaker_mode_keeps_root_files_closed(process, tmp_path):
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    paths = ["/etc/shadow", str(tmp_path / "key"), f"/proc/{os.getpid()}/environ"]
    result = process.run(
        f"for p in {paths!r}:\n try: print('BROKEN', open(p).read(9))\n except OSError: pass"
    )
    assert result.stdout == b""


# ---------------------------------------------------------------- other machines

UNPRIVILEGED = """
from r1mega.rewards.sandbox import Sandbox
with Sandbox(slots=1) as sandbox:
    print(sandbox.isolation)
    print(sandbox.run("print(6 * 7)").stdout)
    print(sandbox.run("import os\\nfor _ in range(99):\\n if os.fork() == 0: os._exit(0)").stderr.splitlines()[-1])
"""


def as_nobody(source):
    """Runs a script of ours as a user without privileges; what it printed, in lines."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    nobody = {
        "user": 65534,
        "group": 65534,
        "extra_groups": [],
        "capture_output": True,
        "text": True,
        "cwd": ROOT,
    }
    ask = "import sys, r1mega.config; assert sys.version_info >= (3, 11)"
    if python is None or subprocess.run([python, "-c", ask], **nobody).returncode:
        pytest.skip("needs the package python3, 3.11 or later, and this checkout readable by everybody")
    spoken = subprocess.run([python, "-c", source], env={"PATH": "/usr/bin:/bin"}, **nobody)
    assert spoken.returncode == 0, spoken
    return spoken.stdout.splitlines()


@needs_bubblewrap
def test_a_user_without_privileges_has_full_isolation_too():
    lines = as_nobody(UNPRIVILEGED)
    assert lines[0].startswith("full: user, pid")
    assert "our uid" in lines[0]
    assert lines[1] == "b'42\\n'"
    assert "Resource temporarily unavailable" in lines[2]


SAME_USER = """
import os, tempfile
from r1mega.rewards.sandbox import Sandbox
attack = '''
import ctypes, fcntl, os, resource, socket
libc = ctypes.CDLL(None)
def refused(what, action):
    try: action()
    except OSError: return
    print("BROKEN", what)
one, other = socket.socketpair()
for command in (8, 10, 15, 1024, 1026):
    for high in (0, 1 << 32):
        if libc.syscall(72, one.fileno(), ctypes.c_long(high | command), ctypes.c_long(HOST)) == 0: print("BROKEN", command)
refused("chmod", lambda: os.chmod(PATH, 0))
refused("chmod of a library", lambda: os.chmod(os.open(os.__file__, 0), 0))
refused("utime", lambda: os.utime(PATH, (1, 1)))
refused("truncate", lambda: os.truncate(PATH, 0))
refused("chown", lambda: os.chown(PATH, os.getuid(), -1))
copy = os.dup(1)
os.set_blocking(copy, True), os.set_inheritable(copy, False), fcntl.flock(copy, fcntl.LOCK_SH)
os.mkdir("closed", 0o300); os.mkdir("closed/more", 0o300); open("closed/more/file", "w").close()
print("end")
'''
made, make = [], tempfile.mkdtemp
def recorded(**names):
    made.append(make(**names))
    return made[-1]
with tempfile.NamedTemporaryFile() as file, Sandbox(slots=1, isolation="process") as sandbox:
    tempfile.mkdtemp = recorded
    file.write(b"content"), file.flush()
    before = os.stat(file.name)
    names = {"HOST": str(os.getpid()), "PATH": repr(file.name)}
    for name, value in names.items():
        attack = attack.replace(name, value)
    result = sandbox.run(attack)
    print(result.stdout, result.stderr[-300:])
    print(os.stat(file.name) == before)
    print(len(made), [folder for folder in made if os.path.lexists(folder)])
    print(sandbox.run("print(1)").stdout)
"""


def test_the_weaker_mode_keeps_a_program_of_our_own_user_from_our_processes_and_files():
    assert as_nobody(SAME_USER) == ["b'end\\n' b''", "True", "1 []", "b'1\\n'"]


def test_a_cgroup_of_version_2_is_written_as_its_files_demand(tmp_path):
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 3\n")
    (tmp_path / "memory.swap.max").touch()
    cgroup = Cgroup("v2", tmp_path)
    cgroup.limit(100)
    cgroup.enter(12)
    assert cgroup.kills() == 3
    assert int((tmp_path / "memory.max").read_text()) == (100 + SERVER_MIB) << 20
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    assert (tmp_path / "cgroup.procs").read_text() == "12"


def test_a_sandbox_refuses_to_work_in_a_fork(full):
    pid = os.fork()
    if pid == 0:
        try:
            full.run("print(1)")
        except RuntimeError:
            os._exit(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert full.run("print(1)").stdout == b"1\n"


# ---------------------------------------------------------------- pairs


def test_threads_that_each_want_a_pair_all_get_one(full):
    """With half a pair each, two threads and two slots would wait for ever."""

    def speak(number):
        first, second = full.open_pair(ECHO, ECHO, limits=SHORT)
        with first, second:
            first.send(b"a%d" % number)
            second.send(b"b%d" % number)
            return first.receive(9, time.monotonic() + 30) + second.receive(9, time.monotonic() + 30)

    with ThreadPoolExecutor(6) as threads:
        pairs = [threads.submit(speak, number) for number in range(12)]
        assert [pair.result(60) for pair in pairs] == [b"A%dB%d" % (n, n) for n in range(12)]
    assert full._idle.qsize() == 2


def test_a_pair_in_a_sandbox_of_one_slot_is_refused():
    with Sandbox(slots=1, isolation="process") as one, pytest.raises(ValueError, match=r"jails=1.*2"):
        one.open_pair(ECHO, ECHO)


# ---------------------------------------------------------------- failures of the jail itself

DEEP = "import os\nfor _ in range(1100):\n os.mkdir('d'); os.chdir('d')\nprint('deep')"


def test_a_deep_tree_of_folders_is_removed_and_its_slot_freed(monkeypatch):
    made, make = [], tempfile.mkdtemp

    def recorded(**names):
        made.append(make(**names))
        return made[-1]

    with Sandbox(slots=1, isolation="process") as one:
        monkeypatch.setattr(tempfile, "mkdtemp", recorded)
        assert one.run(DEEP).stdout == b"deep\n"
        assert one._idle.qsize() == 1
        assert one.run("print(1)").stdout == b"1\n"
    assert len(made) == 2
    assert not [folder for folder in made if os.path.lexists(folder)]


def test_output_that_somebody_still_holds_does_not_hold_us(process, monkeypatch):
    monkeypatch.setattr("r1mega.rewards.jail.session.DRAIN_SECONDS", 0.3)
    with process.open("import os; print('said', flush=True); os.write(3, b'x'); os.read(3, 1)") as session:
        assert session.receive(1, time.monotonic() + 30) == b"x"
        (program,) = descendants(session._server.box.server_pid)
        orphan = os.open(f"/proc/{program}/fd/1", os.O_WRONLY)
        try:
            result = session.finish()
        finally:
            os.close(orphan)
    assert (result.outcome, result.stdout) == ("fault", b"said\n")
    assert b"holds the output" in result.stderr


@needs_bubblewrap
def test_closing_survives_a_server_that_is_dead_already():
    sandbox = Sandbox(slots=2)
    session = sandbox.open("import time; time.sleep(600)")
    server = session._server.box
    os.kill(server.server_pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{server.server_pid}").exists())
    closing = threading.Thread(target=sandbox.close)
    closing.start()
    assert session.finish().outcome == "fault"
    closing.join()
    sandbox.close()
    assert sandbox.server_pids() == []
    assert not any(slot._cgroup.exists() for slot in sandbox._slots if slot._cgroup)
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("print(1)")


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.1])
def test_closing_while_a_server_starts_leaves_none(delay):
    # The kernel may leave out children while a sibling ends.
    before = {pid for _ in range(10) for pid in descendants(os.getpid())}
    sandbox = Sandbox(slots=1, isolation="process")  # a server per program
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(sandbox.run, "print(1)")
        time.sleep(delay)
        sandbox.close()
        error = running.exception(60)
    assert isinstance(error, RuntimeError) or running.result().outcome in ("fault", "exited")
    assert not [pid for pid in set(descendants(os.getpid())) - before if alive(pid)]


@needs_bubblewrap
def test_a_jail_that_does_not_start_again_is_a_fault_of_one_run(monkeypatch, tmp_path):
    with Sandbox(slots=1) as one:
        one._slots[0].discard_server()
        open_files = len(os.listdir("/proc/self/fd"))
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: no more processes' >&2\nexit 1\n")
        fake.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
            for _ in range(3):
                result = one.run("print(1)")
                assert result.outcome == "fault"
                assert b"no more processes" in result.stderr
                with one.open(ECHO) as session:
                    assert session.receive(1, time.monotonic() + 30) == b""
        assert len(os.listdir("/proc/self/fd")) == open_files
        assert one.run("print(1)").stdout == b"1\n"


@needs_bubblewrap
def test_a_jail_makes_its_cgroup_anew_if_somebody_swept_it():
    with Sandbox(slots=1) as one:
        slot = one._slots[0]
        if slot._cgroup is None:
            pytest.skip("needs a memory cgroup that may be written")
        slot.discard_server()
        wait_until(lambda: not (slot._cgroup.folder / "cgroup.procs").read_text())
        slot._cgroup.remove()
        assert one.run("print(1)").stdout == b"1\n"
        assert slot._cgroup.exists()


def test_too_few_descriptors_are_a_fault_and_none_is_lost():
    source = """
import os, resource
from r1mega.rewards.sandbox import Sandbox
with Sandbox(slots=1, isolation="process") as sandbox:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, outcomes = sorted(os.listdir("/proc/self/fd")), []
    for more in range(0, 16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + more, hard))
        outcomes.append(sandbox.run("print(1)").outcome)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert sorted(os.listdir("/proc/self/fd")) == before, more
    print(outcomes[0], set(outcomes) <= {"fault", "exited"}, sandbox.run("print(1)").outcome)
"""
    ended = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, timeout=120)
    assert ended.stdout == b"fault True exited\n", ended


def test_an_interrupt_right_after_the_start_leaves_no_program(process, monkeypatch):
    start, boxes = ForkServer.start, []

    def interrupted(server, job, descriptors):
        boxes.append(server.box)
        start(server, job, descriptors)
        raise KeyboardInterrupt

    open_files = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(ForkServer, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.run("import time; time.sleep(600)")
    assert not alive(boxes[0].server_pid)
    assert len(os.listdir("/proc/self/fd")) <= open_files
    assert process._idle.qsize() == 2
    assert process.run("print(1)").stdout == b"1\n"


# ---------------------------------------------------------------- where there is no cgroup


@pytest.fixture
def without_cgroup(monkeypatch):
    if shutil.which("bwrap") is None:
        pytest.skip("needs the package bubblewrap")
    monkeypatch.setattr("r1mega.rewards.jail.slot.make_cgroup", lambda number: None)
    with Sandbox(slots=1) as sandbox:
        assert "no cgroup" in sandbox.isolation
        yield sandbox


def test_without_a_cgroup_no_memory_can_be_hidden(without_cgroup):
    source = """
import mmap, os
def refused(what, *arguments, **options):
    try: mmap.mmap(*arguments, **options)
    except PermissionError: return
    print("BROKEN", what)
refused("anonymous", -1, 1 << 20)
refused("of a device", os.open("/dev/zero", os.O_RDWR), 1 << 20)
mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("end")
"""
    assert without_cgroup.run(source).stdout == b"end\n"
    assert without_cgroup.run("x = bytearray(200 << 20)", limits=SHORT).outcome == "memory"


def test_without_a_cgroup_children_that_nobody_waits_for_count(without_cgroup):
    source = "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfor _ in range(30):\n"
    source += " if os.fork() == 0:\n  while time.process_time() < 0.4: pass\n  os._exit(0)\n"
    source += " try: os.wait()\n except ChildProcessError: pass"
    result = without_cgroup.run(source, limits=SHORT)
    assert result.outcome == "time"
    assert result.cpu_seconds < 6
