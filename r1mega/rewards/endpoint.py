"""A model behind an OpenAI-compatible endpoint: one question in, one reply out, whatever the network does.

An `Endpoint` has a thread with an event loop of its own, so that one set of limits, counters and connections
serves every loop and thread of the process. A failed try is made again, up to MAX_TRIES in all, after waits
that double, with jitter; a Retry-After holds back every request. What a second try cannot mend (400, 401, 403,
404 ...) is the user's mistake and rises at once as ConfigError; a question that the model's context cannot
hold rises as TooLong. Answers are kept in the cache (endpoint_cache.py), and questions that are equal and under
way at the same time are sent once.

Built on httpx2, which the `openai` package is built on too: it takes a seventh of the time to import, and
deadlines, retries and counting are ours in either case.

The API key is read from the environment and goes into one request header; it is in no message, log or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from r1mega.config import ConfigError, JudgeConfig
from r1mega.rewards.chat_protocol import (
    Question,
    Reply,
    TryFailed,
    parse_completion,
    question_key,
    request_body,
    retry_after_seconds,
)
from r1mega.rewards.endpoint_cache import AnswerCache

if TYPE_CHECKING:
    import httpx2

MAX_TRIES = 6
FIRST_WAIT = 0.5
"""Seconds before the second try; each later wait is twice as long, up to LONGEST_WAIT."""
LONGEST_WAIT = 30.0
MAX_BODY = 8 << 20
"""Bytes of one reply; more is a failure (too_large)."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Never asked by way of a proxy that the environment names."""
WORDS = 300
"""Characters of a server's own words in a message."""
RETRIED_STATUS = {408: "timeout", 409: "server_error", 425: "server_error", 429: "rate_limited"}
"""Statuses below 500 that a later try may mend, and the failure they count as."""
TOO_LONG_WORDS = (
    "context length",
    "context_length",
    "context window",
    "prompt is too long",
    "maximum model length",
)
FAILURES = (
    "timeout", "connection", "half_reply", "rate_limited", "server_error", "broken_body", "no_choice", "too_large",
)  # fmt: skip


class EndpointFault(RuntimeError):
    """The endpoint gave no usable reply in MAX_TRIES tries."""


class TooLong(ValueError):
    """The question and its reply do not fit into the model's context: no other try will help."""


@dataclass
class _UnderWay:
    """A question that has been sent, and how many callers wait for it."""

    task: asyncio.Task[Reply]
    waiting: int = 0


class Pace:
    """Lets requests start at least `interval` seconds apart, first come, first served; `pause` holds all back."""

    def __init__(self, interval: float):
        self.interval = interval
        self._next = 0.0
        self._line = asyncio.Lock()

    async def turn(self) -> None:
        async with self._line:
            while (wait := self._next - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            self._next = time.monotonic() + self.interval

    def pause(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
    """Asks the model of `judge` while the context is open; `ask` may be awaited in any loop of any thread.

    first_wait: seconds before a second try.
    Raises ConfigError for an address or a key that cannot be used.
    """

    def __init__(self, judge: JudgeConfig, *, first_wait: float = FIRST_WAIT):
        self.judge, self.first_wait = judge, first_wait
        self.url = checked_url(judge.url)
        self._key = _api_key(judge.api_key_env)
        self._counts: Counter[str] = Counter()
        self._cost = 0.0
        self._under_way: dict[str, _UnderWay] = {}
        self._jitter = random.Random()  # its own: the run's random numbers stay as they were

    def __enter__(self) -> Endpoint:
        self._cache = AnswerCache(self.judge.cache) if self.judge.cache else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge endpoint", daemon=True)
        self._thread.start()
        self._wait_for(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait_for(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def ask(self, question: Question) -> Reply:
        """The model's reply.

        Raises EndpointFault after MAX_TRIES failed tries, TooLong for a question beyond the model's context,
        ConfigError where the endpoint refuses (address, key, model, parameters).
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask(question), self._loop))

    def metrics(self) -> dict[str, float]:
        """Since the start: requests, tries, tokens, cost, cache_hits, joined, length, no_usage, failures by kind.

        requests = cache_hits + joined (equal to one under way) + questions sent. Tokens and cost are of replies
        that were paid for; no_usage counts replies whose server did not say how many tokens they took.
        """
        counts = dict(self._counts)
        names = (
            "requests", "tries", "cache_hits", "joined", "prompt_tokens", "completion_tokens", "length",
            "no_usage", "faults", "refused", "too_long", *(f"failures/{kind}" for kind in FAILURES),
        )  # fmt: skip
        return {name: float(counts.get(name, 0)) for name in names} | {"cost": self._cost}

    # ------------------------------------------------------------ all below runs in the endpoint's own loop

    async def _open(self) -> None:
        import httpx2

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.judge.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        proxies = urlsplit(self.url).hostname not in LOOPBACK
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=proxies)
        self._slots = asyncio.Semaphore(self.judge.concurrency)
        per_minute = self.judge.requests_per_minute
        self._pace = Pace(60.0 / per_minute if per_minute else 0.0)

    async def _close(self) -> None:
        this = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not this]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        if self._cache:
            self._cache.close()

    async def _ask(self, question: Question) -> Reply:
        self._counts["requests"] += 1
        key = question_key(self.judge.model, question)
        if self._cache and (kept := self._cache.get(key)):
            self._counts["cache_hits"] += 1
            return Reply(**kept, cost=0.0, seconds=0.0, tries=0, cached=True)
        return await self._shared(key, question)

    async def _shared(self, key: str, question: Question) -> Reply:
        """Sent once for all callers that wait for it; given up when the last of them is cancelled."""
        entry = self._under_way.get(key)
        if entry is None:
            entry = _UnderWay(asyncio.create_task(self._send_and_keep(key, question)))
            self._under_way[key] = entry
        else:
            self._counts["joined"] += 1
        entry.waiting += 1
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.waiting -= 1
            if entry.waiting == 0:
                entry.task.cancel()  # nothing happens to one that is done
                if self._under_way.get(key) is entry:
                    del self._under_way[key]

    async def _send_and_keep(self, key: str, question: Question) -> Reply:
        reply = await self._send(question)
        self._counts["prompt_tokens"] += reply.prompt_tokens
        self._counts["completion_tokens"] += reply.completion_tokens
        self._counts["length"] += reply.finish_reason == "length"
        self._counts["no_usage"] += reply.prompt_tokens == 0
        self._cost += reply.cost
        if self._cache:
            self._cache.put(
                key,
                {
                    "text": reply.text,
                    "finish_reason": reply.finish_reason,
                    "model": reply.model,
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                },
            )
        return reply

    async def _send(self, question: Question) -> Reply:
        """Try after try; a slot is held while a try is under way, not while waiting for the next."""
        failed: Counter[str] = Counter()
        body = request_body(self.judge.model, question)
        began = time.monotonic()
        for number in range(1, MAX_TRIES + 1):
            try:
                async with self._slots:
                    await self._pace.turn()
                    self._counts["tries"] += 1
                    reply = await self._try(body)
                return replace(reply, seconds=time.monotonic() - began, tries=number)
            except TryFailed as failure:
                failed[failure.kind] += 1
                self._counts[f"failures/{failure.kind}"] += 1
                last = str(failure)
                if failure.retry_after:
                    self._pace.pause(failure.retry_after)
                wait = min(LONGEST_WAIT, self.first_wait * 2 ** (number - 1)) * self._jitter.uniform(0.5, 1.0)
            if number < MAX_TRIES:
                await asyncio.sleep(wait)
        self._counts["faults"] += 1
        kinds = ", ".join(f"{kind} {count}x" for kind, count in failed.items())
        raise EndpointFault(
            f"{self.url}, model {self.judge.model}: no usable reply in {MAX_TRIES} tries ({kinds}); last {last}"
        )

    async def _try(self, body: bytes) -> Reply:
        import httpx2

        try:
            async with asyncio.timeout(self.judge.timeout_seconds):
                response, content = await self._post(body)
        except TimeoutError:
            raise TryFailed("timeout", f"nothing whole within {self.judge.timeout_seconds:g} s") from None
        except httpx2.DecodingError as error:
            raise TryFailed("broken_body", self._clean(str(error))) from None
        except httpx2.TransportError as error:
            raise TryFailed("connection", self._clean(str(error) or type(error).__name__)) from None
        if response.status_code != 200:
            raise self._refusal(response, content)
        try:
            return parse_completion(content, self.judge.price)
        except TryFailed as failure:
            raise TryFailed(failure.kind, self._clean(content.decode(errors="replace"))) from None

    async def _post(self, body: bytes) -> tuple[httpx2.Response, bytes]:
        address, headers = f"{self.url}/chat/completions", {"Content-Type": "application/json"}
        async with self._client.stream("POST", address, content=body, headers=headers) as response:
            return response, await self._read(response)

    async def _read(self, response: httpx2.Response) -> bytes:
        import httpx2

        parts, size = [], 0
        try:
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY:
                    raise TryFailed("too_large", f"a reply of more than {MAX_BODY >> 20} MiB")
        except httpx2.TransportError as error:
            raise TryFailed("half_reply", self._clean(str(error) or type(error).__name__)) from None
        return b"".join(parts)

    def _refusal(self, response: httpx2.Response, content: bytes) -> Exception:
        """What a status other than 200 means: another try, a question too long, or a user's mistake."""
        status = response.status_code
        words = self._clean(content.decode(errors="replace"))
        kind = RETRIED_STATUS.get(status, "server_error" if status >= 500 else "")
        if kind:
            retry_after = response.headers.get("retry-after", "")
            return TryFailed(kind, f"status {status} {words}", retry_after_seconds(retry_after))
        told = content[:4096].decode(errors="replace").lower()
        if status == 413 or (status in (400, 422) and any(mark in told for mark in TOO_LONG_WORDS)):
            self._counts["too_long"] += 1
            return TooLong(f"{self.url}, model {self.judge.model}: {words}")
        self._counts["refused"] += 1
        cures = {401: self._key_cure(), 403: self._key_cure(), 404: "check judge.url and judge.model"}
        cure = cures.get(status, "check judge.url, judge.model and what the server accepts")
        return ConfigError(
            f"judge.url={self.url}, judge.model={self.judge.model}: the server refused with status {status}"
            f" ({words or 'no words'}); {cure}"
        )

    def _key_cure(self) -> str:
        name = self.judge.api_key_env
        state = "holds a key the server does not take" if self._key else "is not set"
        return f"environment variable {name} {state}: set it, or name another with judge.api_key_env"

    def _clean(self, words: str) -> str:
        """A server's words, on one line, short, and without the key that some servers echo."""
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            words = str(json.loads(words)["error"]["message"])
        if self._key:
            words = words.replace(self._key, "[key]")
        words = " ".join(words.split())
        return words if len(words) <= WORDS else words[:WORDS] + "..."


def checked_url(url: str) -> str:
    """The base address without a final slash. Raises ConfigError; a password in it is not repeated."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"judge.url at host {parts.hostname}: an address with a password, a query or a fragment; give "
            "scheme, host and path alone, and the key in the variable that judge.api_key_env names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"judge.url={url}: not an http address, for example http://127.0.0.1:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


def _api_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"environment variable {variable} holds characters that no key has (a line end?): set it again"
        )
    return key
