"""Chat completions, the part of OpenAI's protocol that a judge needs: one question, one reply, as plain data.

Pure functions; endpoint.py does the talking.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

LONGEST_RETRY_AFTER = 300.0
"""Seconds: a server that asks for more patience gets this much."""


class TryFailed(Exception):
    """One try that failed and may be made again."""

    def __init__(self, kind: str, words: str, retry_after: float = 0.0):
        super().__init__(f"{kind}: {words}" if words else kind)
        self.kind, self.retry_after = kind, retry_after


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    max_tokens: int
    """Length limit of the reply; reasoning counts."""


@dataclass(frozen=True)
class Question:
    messages: tuple[tuple[str, str], ...]
    """(role, content)."""
    sampling: Sampling
    sample: int = 0
    """Tells samples of one question apart; it is not sent, but the cache keeps each."""


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str
    """"stop" | "length" (cut at max_tokens) | what else the server says."""
    model: str
    """As the server names it."""
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """At the configured price; 0 when it came from the cache."""
    seconds: float
    """From the first try to the reply, waits included."""
    tries: int
    """0 when it came from the cache."""
    cached: bool = False


def request_body(model: str, question: Question) -> bytes:
    sampling = question.sampling
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": role, "content": content} for role, content in question.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
    ).encode()


def question_key(model: str, question: Question) -> str:
    """SHA-256 of what decides the reply: model, messages, sampling, sample index."""
    return hashlib.sha256(request_body(model, question) + f"#{question.sample}".encode()).hexdigest()


def parse_completion(content: bytes, price: tuple[float, ...]) -> Reply:
    """The first choice of a chat completion; raises TryFailed (broken_body, no_choice)."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise TryFailed("broken_body", "") from None
    try:
        choice = data["choices"][0]
        text, finish_reason = choice["message"].get("content"), str(choice.get("finish_reason") or "unknown")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TryFailed("no_choice", "") from None
    if text is None and finish_reason in ("length", "content_filter"):
        text = ""  # cut while still reasoning, or withheld: no other try will mend it
    if not isinstance(text, str):
        raise TryFailed("no_choice", "")
    text = text.encode(errors="replace").decode()  # half a surrogate pair could not be written to a file
    usage = data.get("usage")
    prompt_tokens, completion_tokens = _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens")
    cost = (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6
    return Reply(
        text, finish_reason, str(data.get("model", "")), prompt_tokens, completion_tokens, cost, 0.0, 1
    )


def _tokens(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else 0


def retry_after_seconds(header: str) -> float:
    """A Retry-After header in seconds from now (a number or an HTTP date), at most LONGEST_RETRY_AFTER; 0 for none."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else 0.0
