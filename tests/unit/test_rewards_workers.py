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
from contextlib import suppress
from pathlib import Path

import pytest

from r1mega.rewards import nursery, workers
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


def kill_if_alive(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children_of(pid: int | None) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_and_nurseries_killed_at_random_lose_none_of_5000_tasks() -> None:
    rng = random.Random()
    with WorkerPool(3) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        futures = [pool.submit("math", f"x+{i}", f"{i}+x" if i % 2 else f"{i}-x") for i in range(5000)]
        kills = 0
        while not all(future.done() for future in futures):
            time.sleep(rng.random() * 0.1)
            victims = [pool.nursery_pid()] if kills % 20 == 10 else pool.pids()
            if victims and victims[0] and kills < 40:
                kill_if_alive(rng.choice(victims))
                kills += 1
        verdicts = [future.result(timeout=0) for future in futures]
        assert pool.lost >= 3
    assert len(verdicts) == 5000
    # a task may, with bad luck, lose two workers: then it says so
    for index, verdict in enumerate(verdicts):
        assert verdict in (("equal" if index % 2 else "unequal"), "fault"), (index, verdict)
    assert Counter(verdicts)["fault"] <= 10


def test_a_killed_nursery_is_replaced_and_no_task_pays_for_it() -> None:
    with WorkerPool(2, cpu_seconds=1.0) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        futures = [pool.submit("math", *ENDLESS), pool.submit("math", *HARD)]
        before, pids = pool.nursery_pid(), pool.pids()
        for _ in range(3):
            nursery_pid = pool.nursery_pid()
            assert nursery_pid is not None
            os.kill(nursery_pid, signal.SIGKILL)
            wait_until(lambda: pool.nursery_pid() not in (None, nursery_pid) and len(pool.pids()) == 2)  # noqa: B023
        assert [future.result(timeout=60) for future in futures] == ["timeout", "equal"]
        assert pool.nursery_pid() != before
        wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_nursery_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerPool(1) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        before = pool.nursery_pid()
        assert before is not None
        monkeypatch.setattr(workers, "START_SECONDS", 0.2)
        os.kill(before, signal.SIGSTOP)
        os.kill(pool.pids()[0], signal.SIGKILL)
        wait_until(lambda: pool.nursery_pid() not in (None, before))
        monkeypatch.setattr(workers, "START_SECONDS", 120.0)
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        assert not alive(before)


def test_many_replacements_leave_no_process_and_no_descriptor() -> None:
    with WorkerPool(2) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        wait_until(lambda: len(pool.pids()) == 2)
        descriptors, seen = len(os.listdir("/proc/self/fd")), set(pool.pids())
        for _ in range(30):
            kill_if_alive(pool.pids()[0])
            assert pool.submit("math", *HARD).result(timeout=60) == "equal"
            wait_until(lambda: len(pool.pids()) == 2 and all(map(alive, pool.pids())))
            seen |= set(pool.pids())
        assert len(seen) >= 30
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
        wait_until(lambda: set(children_of(pool.nursery_pid())) == set(pool.pids()))


def test_a_task_over_its_limit_is_a_timeout_even_when_it_ends_before_the_kill() -> None:
    """What a busy machine does: the parent looks too late. The verdict follows the CPU time that was used."""
    with WorkerPool(1) as pool:
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"
        pool.cpu_seconds = 1e-6
        assert pool.submit("math", *HARD).result(timeout=60) == "timeout"
        assert pool.lost == 0
        pool.cpu_seconds = 5.0
        assert pool.submit("math", *HARD).result(timeout=60) == "equal"


def test_a_worker_that_shares_its_core_with_others_gives_the_verdicts_of_an_idle_machine() -> None:
    pairs = [HARD, ("x+1", "1+x"), (r"\sin(x)^2", r"1-\cos^2 x"), ("5", "[0,1)"), ENDLESS, ("x^2=4", "x=2")]
    with WorkerPool(1, cpu_seconds=1.0) as pool:
        idle = [pool.submit("math", *pair).result(timeout=120) for pair in pairs]
        wait_until(lambda: len(pool.pids()) == 1)
        core = min(os.sched_getaffinity(0))
        burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        try:
            for pid in (pool.pids()[0], *(burner.pid for burner in burners)):
                os.sched_setaffinity(pid, {core})
            busy = [pool.submit("math", *pair).result(timeout=120) for pair in pairs]
        finally:
            for burner in burners:
                burner.kill()
                burner.wait()
    assert busy == idle
    assert "timeout" in idle


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
        print(*pool.pids(), pool.nursery_pid(), flush=True)
        time.sleep(60)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(alive(pid) for pid in pids), seconds=20)


def test_workers_that_cannot_start_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "_CHILD", "import no_such_package")
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


def test_a_fault_of_the_pools_thread_is_told_to_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no descriptor is left: not a cancellation, which would look like the user's."""

    def no_descriptors(_: object) -> None:
        raise OSError(24, "Too many open files")

    pool = WorkerPool(1)
    monkeypatch.setattr(pool, "_hire", no_descriptors)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pool:
        job = pool.submit("math", "1", "1")
        with pytest.raises(WorkerError, match="Too many open files"):
            job.result(60)
        with pytest.raises(WorkerError, match="Too many open files"):
            pool.submit("math", "1", "1")


def test_many_workers_are_asked_for_a_few_at_a_time() -> None:
    with WorkerPool(40) as pool:
        pool.submit("math", "\\sqrt{8}", "2\\sqrt{2}").result(120)
        deadline = time.monotonic() + 60
        while len(pool.pids()) < 40 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(set(pool.pids())) == 40
        assert pool.lost == 0
