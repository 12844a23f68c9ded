"""The scripted server in tests: scripts by name, and a client that does not wait long between tries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from r1mega.bench.scripted_endpoint import Answer, Request, Script, ScriptedEndpoint, completion, error
from r1mega.config import JudgeConfig
from r1mega.rewards.chat_protocol import Question, Sampling
from r1mega.rewards.endpoint import Endpoint

__all__ = ["Answer", "Request", "Script", "ScriptedEndpoint", "completion", "error"]

SAMPLING = Sampling(0.0, 1.0, 100)
WHOLE = completion("fine")


def question(text: str = "how are you?", sample: int = 0) -> Question:
    return Question((("user", text),), SAMPLING, sample)


def in_turn(*answers: Answer) -> Script:
    """The answers one after another; the last one for ever."""
    return lambda request: answers[min(request.index, len(answers) - 1)]


def judge_config(server: ScriptedEndpoint, **settings: Any) -> JudgeConfig:
    defaults: dict[str, Any] = {"url": server.url, "model": "scripted", "timeout_seconds": 10.0}
    return JudgeConfig(**(defaults | settings))


@contextmanager
def client_of(script: Script, **settings: Any) -> Iterator[tuple[ScriptedEndpoint, Endpoint]]:
    """A server with this script and a client of it."""
    with ScriptedEndpoint(script) as server:
        with Endpoint(judge_config(server, **settings), first_wait=0.01) as endpoint:
            yield server, endpoint


def verdict(correctness: str, analysis: str = "compared") -> Answer:
    return completion(json.dumps({"analysis": analysis, "correctness": correctness}))


def label(said: str) -> Answer:
    return completion(json.dumps({"analysis": "compared", "label": said}))


WRONG_ANSWERS: dict[str, tuple[str, Answer]] = {
    "429": ("rate_limited", error(429, "slow down")),
    "500": ("server_error", error(500, "oops")),
    "502 from a proxy": ("server_error", Answer(b"<html>Bad Gateway</html>", 502)),
    "503": ("server_error", error(503, "starting")),
    "closed at once": ("connection", Answer(silent=True)),
    "half a reply": ("half_reply", Answer(WHOLE.body, cut=40)),
    "headers only": ("half_reply", Answer(WHOLE.body, cut=0)),
    "half of the JSON": ("broken_body", Answer(WHOLE.body[:40])),
    "a web page": ("broken_body", Answer(b"<html>hello</html>")),
    "no body": ("broken_body", Answer(b"")),
    "deep nesting": ("broken_body", Answer(b"[" * 200_000)),
    "not UTF-8": ("broken_body", Answer(b'{"choices": "\xff\xfe"}')),
    "not gzip": ("broken_body", Answer(WHOLE.body, headers={"content-encoding": "gzip"})),
    "no choices": ("no_choice", Answer(b'{"choices": []}')),
    "null": ("no_choice", Answer(b"null")),
    "a number": ("no_choice", Answer(b"3")),
    "an error under status 200": ("no_choice", Answer(b'{"error": {"message": "upstream"}}')),
    "no content": ("no_choice", completion(None)),
    "too large": ("too_large", Answer(b" " * (9 << 20))),
    "nothing for a long time": ("timeout", Answer(WHOLE.body, delay=60.0)),
    "a byte now and then": ("timeout", Answer(WHOLE.body, drip=0.05)),
}
"""Name -> (the failure it counts as, what the server sends)."""
