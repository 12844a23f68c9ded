"""The judge's client against a local scripted server: throughput, overhead, cache, and what it survives.

The server of the timed rows runs in another process; what remains is the client's own cost. No network but the
loopback.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from r1mega.bench.reward_rows import Row
from r1mega.bench.scripted_endpoint import (
    Answer,
    Request,
    ScriptedEndpoint,
    completion,
    error,
    served_apart,
)
from r1mega.config import JudgeConfig
from r1mega.rewards.endpoint import Endpoint
from r1mega.rewards.judge import Judgement, judge_correctness

REQUESTS = 1000
ALONE = 100
SLOW_SECONDS = 0.25
"""A judge's reply takes seconds; this is enough to see whether waiting overlaps."""
QUESTION = "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether? " * 3
WHOLE = completion('{"analysis": "the same number", "correctness": "correct"}')
FAILURES = {
    "429 with Retry-After": error(429, "slow down", retry_after="0.01"),
    "500": error(500, "oops"),
    "connection closed": Answer(silent=True),
    "half a reply": Answer(WHOLE.body, cut=50),
    "broken JSON": Answer(WHOLE.body[:50]),
    "no choices": Answer(b'{"choices": []}'),
    "timeout": Answer(WHOLE.body, delay=30.0),
    "a byte now and then": Answer(WHOLE.body, drip=0.1),
    "unparsable verdict": completion("It is correct, I think."),
}
EACH = 20
"""Questions of each failure; the first try of each meets it."""


def measure(shared: Path | None = None) -> list[Row]:
    """Rows for the table of `r1mega bench rewards`; no shared data is used."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            *_alone(),
            *_throughput(),
            *_cached(Path(folder) / "answers.sqlite"),
            _overlap(),
            *_failures(),
        ]


def _alone() -> list[Row]:
    """One question after another."""
    with served_apart() as url, Endpoint(JudgeConfig(url=url, model="scripted")) as endpoint:

        async def one_by_one() -> list[float]:
            seconds = []
            for i in range(ALONE):
                began = time.perf_counter()
                await judge_correctness(endpoint, QUESTION, "72", f"{i}")
                seconds.append(time.perf_counter() - began)
            return seconds

        seconds = asyncio.run(one_by_one())
    note = "prompt, request, loopback server, reply, verdict; one after another"
    return [Row("judge: one question, median", 1000 * statistics.median(seconds), "ms", note=note)]


def _throughput() -> list[Row]:
    with served_apart() as url, Endpoint(JudgeConfig(url=url, model="scripted", concurrency=16)) as endpoint:
        _judge_all(endpoint, 50)  # connections
        wall, cpu = time.perf_counter(), time.process_time()
        judgements = _judge_all(endpoint, REQUESTS)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert all(judgement.verdict == "correct" for judgement in judgements)
    return [
        Row(
            "judge: throughput",
            REQUESTS / wall,
            "requests/s",
            note="16 at once, a server that answers at once",
        ),
        Row("judge: client's CPU time", 1000 * cpu / REQUESTS, "ms/request"),
    ]


def _cached(cache: Path) -> list[Row]:
    config = JudgeConfig(model="scripted", concurrency=16, cache=str(cache), price=(1.0, 1.0))
    with served_apart() as url:
        with Endpoint(_at(config, url)) as endpoint:
            wall = time.perf_counter()
            _judge_all(endpoint, REQUESTS)
            filled, paid = time.perf_counter() - wall, endpoint.metrics()["cost"]
        with Endpoint(_at(config, url)) as endpoint:
            wall, cpu = time.perf_counter(), time.process_time()
            _judge_all(endpoint, REQUESTS)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            metrics = endpoint.metrics()
    note = f"the same {REQUESTS} questions in a second run; the first took {filled:.1f} s and cost {paid:.4f}"
    return [
        Row("judge: cache hits", 100 * metrics["cache_hits"] / REQUESTS, "%", "100", note),
        Row(
            "judge: cost of a cache hit",
            1000 * cpu / REQUESTS,
            "ms CPU",
            note=f"{REQUESTS / wall:,.0f} hits/s",
        ),
        Row("judge: paid for repeated questions", metrics["cost"], "", "0"),
    ]


def _overlap() -> Row:
    """Concurrency times the delay is all that a slow judge should cost."""
    rounds, at_once = 8, 16
    with served_apart(SLOW_SECONDS) as url:
        with Endpoint(JudgeConfig(url=url, model="scripted", concurrency=at_once)) as endpoint:
            _judge_all(endpoint, at_once)
            wall = time.perf_counter()
            _judge_all(endpoint, rounds * at_once)
            wall = time.perf_counter() - wall
    least = rounds * SLOW_SECONDS
    note = f"{rounds * at_once} questions, {at_once} at once, a judge of {SLOW_SECONDS} s: at least {least:.1f} s"
    return Row("judge: waiting beyond the least", 100 * (wall / least - 1), "%", note=note)


def _failures() -> list[Row]:
    return [_failure(name, wrong) for name, wrong in FAILURES.items()]


def _failure(name: str, wrong: Answer) -> Row:
    """EACH questions, of which every first try fails in this way."""
    met: Counter[str] = Counter()

    def script(request: Request) -> Answer:
        met[request.text] += 1
        return wrong if met[request.text] == 1 else WHOLE

    with ScriptedEndpoint(script) as server:
        config = JudgeConfig(url=server.url, model="scripted", concurrency=EACH, timeout_seconds=2.0)
        with Endpoint(config, first_wait=0.05) as endpoint:
            judgements = _judge_all(endpoint, EACH)
            metrics = endpoint.metrics()
    kinds = {
        k.removeprefix("failures/"): int(n) for k, n in metrics.items() if k.startswith("failures/") and n
    }
    right = sum(judgement.verdict == "correct" for judgement in judgements)
    counted = ", ".join(f"{kind} {count}" for kind, count in kinds.items()) or "asked again by the judge"
    return Row(f"judge survives: {name}", right, f"of {EACH}", f"{EACH}", f"counted: {counted}")


def _at(config: JudgeConfig, url: str) -> JudgeConfig:
    return JudgeConfig(**{**vars(config), "url": url})


def _judge_all(endpoint: Endpoint, count: int) -> list[Judgement]:
    async def all_of_them() -> list[Judgement]:
        return await asyncio.gather(
            *(judge_correctness(endpoint, QUESTION, "72", f"the answer is {i}") for i in range(count))
        )

    return asyncio.run(all_of_them())
