"""Workers as Ray runs them: environment, errors, streams, death."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from r1mega import cluster

GROUP_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "SHADE",
)


class Unpicklable(Exception):
    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


class Worker:
    def __init__(self, start: int = 0):
        if start < 0:
            raise ValueError(f"start={start} is negative")
        self.value = start
        self.seen = {name: os.environ.get(name) for name in GROUP_VARIABLES}

    def environment(self) -> dict[str, str | None]:
        return self.seen

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def fail_on(self, rank: str) -> None:
        if self.seen["RANK"] == rank:
            raise KeyError("lost", rank)

    def fail_oddly(self) -> None:
        raise Unpicklable("two", "arguments")

    def die(self) -> None:
        os._exit(7)

    async def count(self, end: int) -> AsyncIterator[int]:
        for i in range(end):
            yield i
        if end > 3:
            raise OverflowError(f"{end} is too far")


@pytest.fixture(scope="module")
def group(ray_cluster: None) -> Iterator[Any]:
    async def create() -> cluster.WorkerGroup:
        return await cluster.WorkerGroup.create(
            Worker, 10, size=2, name="trainer", threads=3, env={"SHADE": "blue"}
        )

    created = asyncio.run(create())
    yield created
    created.kill()


def test_ranks_find_their_place_in_the_environment(group: Any) -> None:
    first, second = asyncio.run(group.call("environment"))
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        assert first[name] == second[name]
    for found in (first, second):
        assert (found["WORLD_SIZE"], found["OMP_NUM_THREADS"], found["SHADE"]) == ("2", "3", "blue")


def test_results_come_in_rank_order(group: Any) -> None:
    before = asyncio.run(group.call("add", 0))
    after = asyncio.run(group.scatter("add", [(1,), (5,)]))
    assert after == [before[0] + 1, before[1] + 5]


def test_the_workers_own_exception_rises_and_names_its_rank(group: Any) -> None:
    with pytest.raises(KeyError) as caught:
        asyncio.run(group.call("fail_on", "1"))
    assert caught.value.args == ("lost", "1")
    assert cluster.origin(caught.value) == "trainer rank 1"
    assert "fail_on" in str(caught.value.__cause__)


def test_an_exception_that_cannot_travel_keeps_its_message(group: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^Unpicklable: two arguments\n"):
        asyncio.run(group.call("fail_oddly"))


def test_streams_deliver_in_order_and_then_their_error(group: Any) -> None:
    found: list[int] = []

    async def run(end: int) -> None:
        async for i in group.workers[0].count(end):
            found.append(i)

    asyncio.run(run(3))
    assert found == [0, 1, 2]
    with pytest.raises(OverflowError, match="5 is too far"):
        asyncio.run(run(5))
    assert found == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_failing_constructor_rises_for_whoever_waits(ray_cluster: None) -> None:
    async def run() -> None:
        handle = cluster.spawn(Worker, -1, name="negative worker")
        for waiting in (handle.ready, lambda: handle.add(1)):
            with pytest.raises(ValueError, match=r"^start=-1 is negative\n") as caught:
                await waiting()
            assert cluster.origin(caught.value) == "negative worker"
        cluster.kill(handle)

    asyncio.run(run())


def test_a_dead_worker_is_named(ray_cluster: None) -> None:
    async def run() -> None:
        handle = cluster.spawn(Worker, name="mortal worker")
        with pytest.raises(cluster.WorkerDied, match="mortal worker died"):
            await handle.die()
        with pytest.raises(AttributeError, match="no method 'fly'"):
            handle.fly()

    asyncio.run(run())
