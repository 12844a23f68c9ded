"""The client of the judge's endpoint, against a server on a real socket that does everything wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from scripted_endpoint import (
    WHOLE,
    WRONG_ANSWERS,
    Answer,
    ScriptedEndpoint,
    client_of,
    completion,
    error,
    in_turn,
    judge_config,
    question,
)

from r1mega.config import ConfigError, JudgeConfig
from r1mega.rewards.chat_protocol import Question, Reply, Sampling, question_key, retry_after_seconds
from r1mega.rewards.endpoint import MAX_TRIES, Endpoint, EndpointFault, TooLong

KEY = "sk-very-secret-1234567890"


def ask(endpoint: Endpoint, *questions: Question) -> list[Reply]:
    async def all_of_them() -> list[Reply]:
        return await asyncio.gather(*map(endpoint.ask, questions))

    return asyncio.run(all_of_them())


def test_a_question_gets_its_reply_and_the_bill() -> None:
    with client_of(in_turn(completion("fine", usage=(1000, 20))), price=(3.0, 50.0)) as (server, endpoint):
        (reply,) = ask(endpoint, question("how are you?"))
        metrics = endpoint.metrics()
    assert (reply.text, reply.finish_reason, reply.model, reply.tries) == ("fine", "stop", "scripted-1", 1)
    assert reply.cost == metrics["cost"] == pytest.approx((1000 * 3.0 + 20 * 50.0) / 1e6)
    assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (1000, 20)
    sent = server.requests[0].body
    assert sent["messages"] == [{"role": "user", "content": "how are you?"}]
    assert (sent["model"], sent["temperature"], sent["top_p"], sent["max_tokens"]) == (
        "scripted",
        0.0,
        1.0,
        100,
    )


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_every_failure_is_counted_and_tried_again(name: str) -> None:
    kind, wrong = WRONG_ANSWERS[name]
    with client_of(in_turn(wrong, wrong, completion("fine")), timeout_seconds=0.5) as (server, endpoint):
        (reply,) = ask(endpoint, question())
        metrics = endpoint.metrics()
    assert (reply.text, reply.tries) == ("fine", 3)
    assert {k: n for k, n in metrics.items() if k.startswith("failures/") and n} == {f"failures/{kind}": 2}
    assert (metrics["tries"], metrics["requests"], len(server.requests)) == (3, 1, 3)


def test_a_server_that_is_not_there_is_a_connection_failure() -> None:
    with ScriptedEndpoint(in_turn(WHOLE)) as gone:
        config = judge_config(gone)
    with Endpoint(config, first_wait=0.001) as endpoint:
        with pytest.raises(EndpointFault, match=rf"no usable reply in {MAX_TRIES} tries \(connection 6x\)"):
            ask(endpoint, question())
        assert endpoint.metrics()["faults"] == 1


def test_no_more_than_six_tries_and_the_fault_names_what_happened() -> None:
    script = in_turn(error(500, "oops"), error(429, "slow down"), Answer(b"{"), error(500, "no\nidea"))
    with client_of(script) as (server, endpoint):
        with pytest.raises(EndpointFault) as fault:
            ask(endpoint, question())
    assert len(server.requests) == MAX_TRIES == 6
    words = str(fault.value)
    assert server.url in words
    assert "server_error 4x, rate_limited 1x, broken_body 1x" in words
    assert words.endswith("last server_error: status 500 no idea")


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 422])
def test_a_refusal_is_not_tried_again_and_is_one_line(status: int) -> None:
    with client_of(in_turn(error(status, "The model `x`\n does not exist"))) as (server, endpoint):
        with pytest.raises(ConfigError) as refusal:
            ask(endpoint, question())
    words = str(refusal.value)
    assert len(server.requests) == 1
    assert "\n" not in words
    for part in (server.url, "judge.model=scripted", str(status), "The model `x` does not exist"):
        assert part in words


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens"),
        Answer(b'{"error": {"message": "too big", "code": "context_length_exceeded"}}', 400),
        Answer(b"Payload Too Large", 413),
    ],
)
def test_a_question_beyond_the_context_is_told_apart_from_a_refusal(answer: Answer) -> None:
    with client_of(in_turn(answer, WHOLE)) as (server, endpoint):
        with pytest.raises(TooLong):
            ask(endpoint, question("x" * 5000))
        assert ask(endpoint, question("short"))[0].text == "fine"
    assert len(server.requests) == 2


def test_cut_replies_say_so() -> None:
    cut = completion("I think", finish_reason="length")
    while_reasoning = completion(None, finish_reason="length")
    with client_of(in_turn(cut, while_reasoning)) as (_, endpoint):
        assert ask(endpoint, question("a"))[0].finish_reason == "length"
        assert ask(endpoint, question("b"))[0].text == ""
        assert endpoint.metrics()["length"] == 2


def test_a_reply_without_usage_is_counted() -> None:
    with client_of(in_turn(completion("fine", usage=None))) as (_, endpoint):
        assert ask(endpoint, question())[0].prompt_tokens == 0
        assert endpoint.metrics()["no_usage"] == 1


def test_text_that_no_file_could_hold_is_mended() -> None:
    broken = Answer(WHOLE.body.replace(b"fine", rb"fine \ud800"))
    with client_of(in_turn(broken)) as (_, endpoint):
        assert ask(endpoint, question())[0].text == "fine ?"


# ---------------------------------------------------------------- limits


def test_no_more_requests_at_once_than_configured() -> None:
    with client_of(in_turn(Answer(WHOLE.body, delay=0.03)), concurrency=3) as (server, endpoint):
        replies = ask(endpoint, *(question(f"{i}") for i in range(20)))
    assert len(replies) == len(server.requests) == 20
    assert server.most_at_once == 3


def test_requests_start_at_the_configured_pace_in_the_order_they_came() -> None:
    with client_of(in_turn(WHOLE), requests_per_minute=1200) as (server, endpoint):
        ask(endpoint, *(question(f"{i}") for i in range(8)))
    starts = [request.at for request in server.requests]
    assert starts[-1] - starts[0] >= 7 * 0.05 - 0.03  # 1200 a minute is one in 50 ms
    assert [request.text for request in server.requests] == [f"{i}" for i in range(8)]


def test_retry_after_holds_back_every_request() -> None:
    first = error(429, "slow down", retry_after="0.4")
    with client_of(in_turn(first, WHOLE), concurrency=1) as (server, endpoint):
        ask(endpoint, *(question(f"{i}") for i in range(3)))
    times = [request.at for request in server.requests]
    assert len(times) == 4
    assert times[1] - times[0] >= 0.39


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 0), ("2", 2), ("1.5", 1.5), ("-3", 0), ("86400", 300), ("inf", 300), ("nan", 0), ("soon", 0)],
)
def test_retry_after_is_understood_and_bounded(header: str, seconds: float) -> None:
    assert retry_after_seconds(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    assert 50 < retry_after_seconds(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_waiting_takes_no_processor_time() -> None:
    with client_of(in_turn(Answer(WHOLE.body, delay=1.0)), requests_per_minute=120) as (_, endpoint):
        before = time.process_time()
        ask(endpoint, *(question(f"{i}") for i in range(3)))
        assert time.process_time() - before < 0.5  # of 2 s; a loop that polls would use all of them


# ---------------------------------------------------------------- sharing and the cache


def test_any_thread_and_loop_may_ask() -> None:
    replies: list[Reply] = []
    with client_of(lambda request: completion(request.text), concurrency=4) as (server, endpoint):
        threads = [
            threading.Thread(target=lambda i=i: replies.extend(ask(endpoint, *(question(f"{i}-{j}") for j in range(5)))))
            for i in range(4)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(reply.text for reply in replies) == sorted(f"{i}-{j}" for i in range(4) for j in range(5))
    assert server.most_at_once <= 4


def test_equal_questions_under_way_are_sent_once() -> None:
    with client_of(in_turn(Answer(WHOLE.body, delay=0.1))) as (server, endpoint):
        replies = ask(endpoint, *[question()] * 10, question(sample=1))
        metrics = endpoint.metrics()
    assert len(replies) == 11
    assert len(server.requests) == metrics["tries"] == 2
    assert (metrics["requests"], metrics["joined"]) == (11, 9)


def test_a_fault_reaches_everyone_who_waits() -> None:
    with client_of(in_turn(error(500, "oops"))) as (server, endpoint):

        async def both() -> list[Reply | BaseException]:
            return await asyncio.gather(
                endpoint.ask(question()), endpoint.ask(question()), return_exceptions=True
            )

        assert [type(result) for result in asyncio.run(both())] == [EndpointFault, EndpointFault]
    assert len(server.requests) == MAX_TRIES


def test_one_cancelled_caller_does_not_take_the_reply_from_another() -> None:
    async def one_leaves(endpoint: Endpoint) -> Reply:
        leaves = asyncio.create_task(endpoint.ask(question()))
        stays = asyncio.create_task(endpoint.ask(question()))
        await asyncio.sleep(0.05)
        leaves.cancel()
        return await stays

    with client_of(in_turn(Answer(WHOLE.body, delay=0.3))) as (server, endpoint):
        assert asyncio.run(one_leaves(endpoint)).text == "fine"
    assert len(server.requests) == 1


def test_a_question_that_everyone_left_is_given_up_and_can_be_asked_again() -> None:
    async def leave(endpoint: Endpoint) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(endpoint.ask(question()), 0.1)

    with client_of(in_turn(Answer(WHOLE.body, delay=60.0), WHOLE), concurrency=1) as (server, endpoint):
        asyncio.run(leave(endpoint))
        assert ask(endpoint, question())[0].text == "fine"  # and the one slot is free again
    assert len(server.requests) == 2


def test_a_repeated_question_costs_nothing_in_this_run_and_the_next(tmp_path: Path) -> None:
    settings = {"cache": str(tmp_path / "new" / "answers.sqlite"), "price": (1.0, 1.0)}
    with client_of(in_turn(completion("first"), completion("second")), **settings) as (server, endpoint):
        bought = ask(endpoint, question())[0]
        again = ask(endpoint, question())[0]
        assert ask(endpoint, question(sample=1))[0].text == "second"
        assert len(server.requests) == 2
    with client_of(in_turn(completion("another server")), **settings) as (server, endpoint):
        later = ask(endpoint, question())[0]
        metrics = endpoint.metrics()
    assert bought.cost > 0
    assert not bought.cached
    assert again == later
    assert (later.text, later.cost, later.cached, later.tries) == ("first", 0.0, True, 0)
    assert (metrics["cache_hits"], metrics["tries"], metrics["cost"], len(server.requests)) == (1, 0, 0.0, 0)


def test_failures_are_not_cached(tmp_path: Path) -> None:
    script = in_turn(*[error(500, "oops")] * MAX_TRIES, WHOLE)
    with client_of(script, cache=str(tmp_path / "answers.sqlite")) as (_, endpoint):
        with pytest.raises(EndpointFault):
            ask(endpoint, question())
        assert ask(endpoint, question())[0].text == "fine"


def test_everything_that_decides_a_reply_is_in_the_key() -> None:
    base, s = question(), Sampling(0.0, 1.0, 100)
    others = [
        question("other"), question(sample=1), Question((("system", "how are you?"),), s),
        Question(base.messages, Sampling(0.1, 1.0, 100)), Question(base.messages, Sampling(0.0, 0.9, 100)),
        Question(base.messages, Sampling(0.0, 1.0, 101)),
    ]  # fmt: skip
    keys = {question_key("m", q) for q in (base, *others)} | {question_key("m2", base)}
    assert len(keys) == 8


KILLED = """
import asyncio, sys, os, signal
from r1mega.config import JudgeConfig
from r1mega.rewards.chat_protocol import Question, Sampling
from r1mega.rewards.endpoint import Endpoint
async def main(endpoint):
    for i in range(1000000):
        await endpoint.ask(Question((("user", str(i)),), Sampling(0.0, 1.0, 100)))
        print(i, flush=True)
with Endpoint(JudgeConfig(url=sys.argv[1], model="scripted", cache=sys.argv[2])) as endpoint:
    asyncio.run(main(endpoint))
"""


def test_answers_outlive_a_killed_process(tmp_path: Path) -> None:
    cache = str(tmp_path / "answers.sqlite")
    with ScriptedEndpoint(lambda request: completion(request.text)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, server.url, cache], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        sent = len(server.requests)
        with Endpoint(judge_config(server, cache=cache)) as endpoint:
            replies = ask(
                endpoint, *(Question((("user", str(i)),), Sampling(0.0, 1.0, 100)) for i in range(21))
            )
        assert [reply.text for reply in replies] == [str(i) for i in range(21)]
        assert len(server.requests) == sent


def test_two_processes_may_share_a_cache(tmp_path: Path) -> None:
    cache = str(tmp_path / "answers.sqlite")
    with (
        client_of(in_turn(WHOLE), cache=cache) as (_, one),
        client_of(in_turn(WHOLE), cache=cache) as (_, two),
    ):
        ask(one, *(question(f"{i}") for i in range(20)))
        ask(two, *(question(f"{i}") for i in range(10, 30)))
        assert two.metrics()["cache_hits"] == 10


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("dear diary " * 200)
    with pytest.raises(ConfigError, match=r"judge\.cache=.*notes\.txt: not a cache"):
        with Endpoint(JudgeConfig(url="http://127.0.0.1:1/v1", model="m", cache=str(file))):
            pass
    assert file.read_text().startswith("dear diary")


# ---------------------------------------------------------------- secrets


def test_the_key_goes_into_the_request_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    settings = {"api_key_env": "MY_KEY", "cache": str(tmp_path / "answers.sqlite")}
    said: list[str] = []
    for status in (200, 401, 500):
        answer = WHOLE if status == 200 else error(status, f"Incorrect API key provided: {KEY}.")
        with client_of(in_turn(answer), **settings) as (server, endpoint):
            try:
                ask(endpoint, question(f"{status}"))
            except (ConfigError, EndpointFault) as failure:
                said += [str(failure), repr(failure)]
            said += [repr(endpoint), repr(endpoint.judge), str(endpoint.metrics())]
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in str(server.requests[0].body)
    assert any("[key]" in text for text in said)
    assert KEY not in "".join(said)
    assert KEY not in caplog.text
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_no_key_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with client_of(in_turn(WHOLE, error(401, "who are you?"))) as (server, endpoint):
        ask(endpoint, question("a"))
        with pytest.raises(ConfigError, match="environment variable OPENAI_API_KEY is not set"):
            ask(endpoint, question("b"))
    assert "authorization" not in server.requests[0].headers


def test_a_key_with_a_line_end_inside_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ConfigError, match="MY_KEY") as refusal:
        Endpoint(JudgeConfig(url="http://127.0.0.1:1/v1", model="m", api_key_env="MY_KEY"))
    assert KEY not in str(refusal.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host/v1", "http://", "file:///etc/passwd"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"judge\.url"):
        Endpoint(JudgeConfig(url=url, model="m"))


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@host/v1", "https://host/v1?key=hunter2", "http://h/v1#hunter2"]
)
def test_an_address_with_a_secret_is_refused_unseen(url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Endpoint(JudgeConfig(url=url, model="m"))
    assert "hunter2" not in str(refusal.value)


def test_a_local_server_is_not_asked_by_way_of_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with client_of(in_turn(WHOLE)) as (_, endpoint):
        assert ask(endpoint, question())[0].tries == 1


def test_importing_the_client_loads_no_http_library() -> None:
    code = "import sys, r1mega.rewards.endpoint; print([m for m in ('httpx2', 'openai', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_left_running_after_the_context() -> None:
    before = threading.active_count()
    with client_of(in_turn(Answer(WHOLE.body, delay=60.0))) as (_, endpoint):

        async def leave_it() -> None:
            asyncio.get_running_loop().call_later(0.1, lambda: None)
            task = asyncio.create_task(endpoint.ask(question()))
            await asyncio.sleep(0.1)
            assert not task.done()
            task.cancel()

        asyncio.run(leave_it())
    assert threading.active_count() == before
    assert sqlite3.threadsafety >= 1  # the cache is handed from one thread to another
