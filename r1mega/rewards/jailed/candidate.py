"""Inside the candidate's jail: runs its code, then calls its functions for the host, one request at a time.

A request is a 16-byte id and a message of plain data; the reply repeats the id. Nothing here is trusted by the
host: the candidate shares this process and may change or forge whatever it likes, but all it can forge is what
its own functions return. It never sees the tests.

["load", preamble, code, names, classes] -> ["ok", None] | ["compile", message] | ["raise", bases, message]
["call", target, name or None, args, kwargs, in_place] -> ["ok", result, args or None] | ["raise", ...]
["get", target, name], ["set", target, name, value] -> as a call, of attributes.
A target is an entry point's name or the handle of an object of one of the named classes.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from r1mega.rewards.jailed.channel import Channel
from r1mega.rewards.jailed.plain_data import Handle, PlainDataError, decode, encode, refuse

ID_BYTES = 16
MODULE = "solution"
"""Name of the candidate's module, so that what stands under `if __name__ == "__main__"` does not run."""
MAX_OBJECTS = 100_000
MESSAGE_CHARACTERS = 2000


class Candidate:
    def __init__(self) -> None:
        self.module = types.ModuleType(MODULE)
        self.classes: tuple[type, ...] = ()
        self.objects: list[Any] = []

    def answer(self, body: bytes) -> bytes:
        action, *parts = decode(body, self.resolve)
        try:
            reply = ["ok", *getattr(self, action)(*parts)] if action != "load" else self.load(*parts)
            return encode(reply, self.keep)
        except BaseException as error:
            return encode(["raise", _builtin_bases(error), _message(error)])

    def load(self, preamble: str, code: str, names: list[str], classes: list[str]) -> list[Any]:
        try:
            program = compile(code, "solution.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            return ["compile", f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS]]
        sys.modules[MODULE] = self.module
        sys.stdin = None  # type: ignore[assignment]  # who reads fails, as in HumanEval's harness
        exec(compile(preamble, "preamble.py", "exec", dont_inherit=True), self.module.__dict__)
        exec(program, self.module.__dict__)
        for name in names:
            self.named(name)
        self.classes = tuple(kind for kind in map(self.named, classes) if isinstance(kind, type))
        return ["ok", None]

    def call(
        self, target: Any, name: str | None, args: list[Any], kwargs: dict[str, Any], in_place: bool
    ) -> Any:
        function = self.named(target) if isinstance(target, str) else target
        if name is not None:
            function = getattr(function, name)
        result = function(*args, **kwargs)
        return result, args if in_place else None

    def get(self, target: Any, name: str) -> Any:
        return getattr(target, name), None

    def set(self, target: Any, name: str, value: Any) -> Any:
        setattr(target, name, value)
        return None, None

    def named(self, name: str) -> Any:
        """A global of the candidate's, else that method of its class Solution."""
        if hasattr(self.module, name) or not hasattr(self.module, "Solution"):
            return _attribute(self.module, name)
        return getattr(self.module.Solution(), name)

    def keep(self, value: Any) -> Handle:
        if not self.classes or not isinstance(value, self.classes):
            return refuse(value)
        for number, known in enumerate(self.objects):
            if known is value:
                return Handle(number)
        if len(self.objects) >= MAX_OBJECTS:
            raise PlainDataError(f"more than {MAX_OBJECTS} objects")
        self.objects.append(value)
        return Handle(len(self.objects) - 1)

    def resolve(self, handle: Handle) -> Any:
        return self.objects[handle.number]


def _attribute(module: types.ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise NameError(f"the solution defines no {name}")
    return getattr(module, name)


def _builtin_bases(error: BaseException) -> list[str]:
    return [base.__name__ for base in type(error).__mro__ if base.__module__ in ("builtins", __name__)]


def _message(error: BaseException) -> str:
    text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    return text[:MESSAGE_CHARACTERS]


def serve(descriptor: int) -> None:
    channel, candidate = Channel(descriptor), Candidate()
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(request[:ID_BYTES] + candidate.answer(request[ID_BYTES:]))
