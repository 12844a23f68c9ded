"""A chat-completions server on a loopback port that does what a script says: right answers, and every wrong one.

For the client's benchmark and tests. Real sockets, HTTP/1.1 with kept-alive connections, its own thread; with
`served_apart` its own process, so that the client can be timed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    index: int
    """Which request of the server's life it is, from 0."""
    headers: dict[str, str]
    """Names in lower case."""
    body: dict[str, Any]
    at: float
    """time.monotonic() of its arrival."""

    @property
    def text(self) -> str:
        """All messages."""
        return "\n".join(message["content"] for message in self.body["messages"])


@dataclass(frozen=True)
class Answer:
    """What is sent back, and how badly."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before anything is sent."""
    cut: int | None = None
    """Bytes of the body that are sent before the connection is closed, under a full Content-Length."""
    drip: float = 0.0
    """Seconds between single bytes of the body."""
    silent: bool = False
    """The connection is closed before a single byte."""


Script = Callable[[Request], Answer]


def completion(
    text: str | None, *, finish_reason: str = "stop", usage: tuple[int, int] | None = (100, 10)
) -> Answer:
    """A well-formed chat completion; usage: (prompt tokens, completion tokens), None to leave it out."""
    value: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "scripted-1",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        ],
    }
    if usage:
        value["usage"] = {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": sum(usage),
        }
    return Answer(json.dumps(value).encode())


def error(status: int, words: str, **headers: str) -> Answer:
    """An error as OpenAI's servers word it; a header's underscores become dashes."""
    body = json.dumps({"error": {"message": words, "type": "scripted", "code": status}}).encode()
    return Answer(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class ScriptedEndpoint:
    """Serves while the context is open; `requests` holds all that came, `most_at_once` how many overlapped."""

    def __init__(self, script: Script):
        self.script = script
        self.requests: list[Request] = []
        self.at_once = self.most_at_once = 0
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedEndpoint:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of ours: those that asyncio makes for a coroutine log their own cancellation in Python 3.11.
        task = asyncio.create_task(self._connection(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False when the connection ends with it."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:])
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        assert head[0].startswith("POST /v1/chat/completions "), head[0]
        request = Request(len(self.requests), headers, json.loads(body), time.monotonic())
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._send(writer, self.script(request))
        finally:
            self.at_once -= 1

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> bool:
        if answer.delay:
            await asyncio.sleep(answer.delay)
        if answer.silent:
            return False
        headers = {"content-type": "application/json", "content-length": str(len(answer.body))}
        lines = [f"{name}: {value}\r\n" for name, value in (headers | dict(answer.headers)).items()]
        writer.write(f"HTTP/1.1 {answer.status} Scripted\r\n{''.join(lines)}\r\n".encode())
        body = answer.body[: answer.cut]
        if answer.drip:
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(answer.drip)
        else:
            writer.write(body)
        await writer.drain()
        return answer.cut is None


@contextmanager
def served_apart(delay: float = 0.0) -> Iterator[str]:
    """The address of a server in another process, which gives every question a right answer after `delay` seconds."""
    command = [sys.executable, "-m", "r1mega.bench.scripted_endpoint", str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()  # it ends with its input
            process.wait()


def main() -> None:
    whole = completion('{"analysis": "the same number", "correctness": "correct"}')
    answer = Answer(whole.body, delay=float(sys.argv[1]))
    with ScriptedEndpoint(lambda _: answer) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
