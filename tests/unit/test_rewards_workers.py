"""Workers may die at any moment; no task is lost, no process is left, no limit depends on the machine's load."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from r1mega.rewards import workers
from r1mega.rewards.workers import WorkerError, WorkerPool, cpu_seconds_of, resident_mib_of

ROOT = Path(__file__).resolve().parents[2]
HARD = (r"\sqrt{8}", r"2\sqrt{2}")
ENDLESS = ("5", "9^{9^{9^{9}}}")


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Running: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_killed_at_random_lose_no_task() -> None:
    rng = random.Random()
    with WorkerPool(2) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        futures = [pool.submit("math", f"x+{i}", f"{i}+x" if i % 2 else f"{i}-x") for i in range(300)]
        for _ in range(3):
            time.sleep(rng.random() * 0.2)
            for pid in pool.pids()[:1]:
                os.kill(pid, signal.SIGKILL)
        verdicts = [future.result(timeout=120) for future in futures]
        assert pool.lost >= 1
    # a task may, with bad luck, lose two workers: then it says so
    for index, verdict in enumerate(verdicts):
        assert verdict in (("equal" if index % 2 else "unequal"), "fault"), (index, verdict)
    assert Counter(verdicts)["fault"] <= 1


def test_endless_work_ends_at_its_cpu_limit_and_the_next_answer_is_right() -> None:
    with WorkerPool(1, cpu_seconds=0.3) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        before = pool.pids()
        assert pool.submit("math", *ENDLESS).result(timeout=60) == "timeout"
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        assert pool.pids() != before
        assert not alive(before[0])


def test_a_worker_that_sleeps_is_caught_by_the_wall_limit_and_its_task_is_done_by_another() -> None:
    with WorkerPool(1, wall_seconds=0.5) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        os.kill(pool.pids()[0], signal.SIGSTOP)
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        assert pool.lost == 1


def test_a_task_over_its_memory_is_named() -> None:
    with WorkerPool(1, cpu_seconds=30.0) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        pool.memory_mib = int(resident_mib_of(pool.pids()[0])) + 5
        assert pool.submit("math", "5", "10^{10^{9}}").result(timeout=120) == "memory"
        pool.memory_mib = 2048
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"


def test_workers_import_no_torch_and_inherit_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1MEGA_TEST_SECRET", "xyzzy")
    with WorkerPool(1) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        (pid,) = pool.pids()
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "numpy" not in maps
        assert b"xyzzy" not in Path(f"/proc/{pid}/environ").read_bytes()
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert sum(link.startswith("socket:") for link in links) == 1, links


def test_the_pool_serves_several_threads_and_event_loops_at_once() -> None:
    verdicts: list[str] = []

    async def ask() -> list[str]:
        return await asyncio.gather(*(pool.run("math", f"x+{i}", f"{i}+x") for i in range(10)))

    with WorkerPool(2) as pool:
        threads = [threading.Thread(target=lambda: verdicts.extend(asyncio.run(ask()))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verdicts == ["equal"] * 40


def test_closing_leaves_no_process_and_no_task_in_the_air() -> None:
    pool = WorkerPool(2)
    pool.start()
    wait_until(lambda: len(pool.pids()) == 2)
    assert pool.submit("math", *HARD).result(timeout=60) == "equal"
    pids = pool.pids()
    futures = [pool.submit("math", *ENDLESS) for _ in range(6)]
    time.sleep(0.1)
    pool.close()
    pool.close()
    assert not any(alive(pid) for pid in pids)
    assert all(future.done() for future in futures)
    for future in futures:
        assert future.cancelled() or isinstance(future.exception(), WorkerError)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("math", *HARD)


def test_a_cancelled_task_is_not_run() -> None:
    with WorkerPool(1, cpu_seconds=0.5) as pool:
        first, second = pool.submit("math", *ENDLESS), pool.submit("math", *ENDLESS)
        assert second.cancel()
        assert first.result(timeout=60) == "timeout"
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        assert pool.lost == 1


def test_workers_die_with_a_killed_parent() -> None:
    script = textwrap.dedent(
        """
        from r1mega.rewards.workers import WorkerPool
        pool = WorkerPool(2)
        futures = [pool.submit("math", "5", "9^{9^{9^{9}}}") for _ in range(2)]
        pool.submit("math", "x+1", "1+x")
        import time
        while len(pool.pids()) < 2:
            time.sleep(0.01)
        print(*pool.pids(), flush=True)
        time.sleep(60)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(alive(pid) for pid in pids), seconds=20)


def test_workers_that_cannot_start_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CHILD", "import no_such_package")
    with WorkerPool(1) as pool:
        future = pool.submit("math", *HARD)
        with pytest.raises(
            WorkerError, match=r"(?s)reward workers do not start: .*No module named 'no_such_package'"
        ):
            future.result(timeout=60)
        with pytest.raises(WorkerError, match="do not start"):
            pool.submit("math", *HARD).result(timeout=60)


def test_a_task_that_raises_is_a_fault_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with WorkerPool(1) as pool:
        assert pool.submit("math", 5, None).result(timeout=60) == "fault"
        assert "raised in its worker" in caplog.text
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        assert pool.lost == 0


def test_a_request_too_large_for_a_socket_is_named() -> None:
    with WorkerPool(1) as pool:
        assert pool.submit("math", "5", "x" * 10**6).result(timeout=60) == "too_long"


def test_zero_workers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards.workers=0"):
        WorkerPool(0)


def test_cpu_time_is_that_of_the_process() -> None:
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        wait_until(lambda: cpu_seconds_of(burner.pid) > 0.2)
    finally:
        burner.kill()
        burner.wait()
