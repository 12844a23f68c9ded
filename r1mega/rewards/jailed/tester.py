"""Inside the tester's jail: runs the tests; the functions under test are stand-ins that ask the host.

The host sends one message, ["test", nonce, setup, tests, names, classes, first_only]; the tests are already
instrumented (code_asserts.py): each check reports its site here. The reply to end with is ["verdict", nonce,
passed sites, failure or None], a failure being [site, kind, type name, message] with kind one of wrong (the check
said no), raised (the candidate raised), error (the test's own expression raised).

Values reach this process as plain data only (plain_data.py), so nothing of the candidate's runs here.
"""

from __future__ import annotations

import builtins
import random
import sys
import types
from typing import Any

from r1mega.rewards.jailed.channel import Channel
from r1mega.rewards.jailed.plain_data import Handle, PlainDataError, decode, encode, refuse

SEED = 0
"""Of `random`: the same candidate gets the same tests."""
NAME_CHARACTERS = 100
MESSAGE_CHARACTERS = 500


ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration)


class Stop(BaseException):
    """The first failure, when no more are wanted."""


class UnfitArgumentError(Exception):
    """The test passes something that is not plain data."""


class Remote:
    """Asks the host to call, read or set; hands back the value or raises what the candidate raised.

    objects: whether the tests construct any; otherwise an answer that claims to be one is no answer.
    """

    def __init__(self, channel: Channel, objects: bool) -> None:
        self.channel = channel
        self.resolve = self._object if objects else refuse

    def ask(self, action: str, *parts: Any, write_back: tuple[Any, ...] = ()) -> Any:
        try:
            request = encode([action, *parts], _handle_of)
        except PlainDataError as error:
            raise UnfitArgumentError(f"a test passes what is not plain data: {error}") from None
        self.channel.send(b"C" + request)
        try:
            outcome, *rest = decode(self.channel.receive(), self.resolve)
            if outcome == "ok":
                result, changed = rest
                for argument, new in zip(write_back, changed or ()):
                    _overwrite(argument, new)
                return result
            bases, message = rest
        except (PlainDataError, ValueError, TypeError) as error:
            bases, message = ["TypeError"], f"not an answer: {error}"
        raise _as_raised(bases, message)

    def _object(self, handle: Handle) -> Any:
        return RemoteObject(self, handle)


class RemoteFunction:
    """A function, class or method of the candidate's."""

    def __init__(self, remote: Remote, target: Any, name: str | None = None) -> None:
        self._remote, self._target, self._name = remote, target, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.ask("call", self._target, self._name, list(args), kwargs, False)

    def in_place(self, *args: Any, **kwargs: Any) -> Any:
        """A call that changes its arguments: what it made of them is written back."""
        return self._remote.ask("call", self._target, self._name, list(args), kwargs, True, write_back=args)


class RemoteObject:
    """An object of a class that the tests construct; it has attributes and methods, and nothing else.

    It refuses to be compared, tested or hashed: no check can be answered by the candidate's own `__eq__`.
    """

    def __init__(self, remote: Remote, handle: Handle) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_handle", handle)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Attribute(self._remote, self, name).read()

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote.ask("set", self, name, value)

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("an object of the candidate's class cannot be compared, tested or hashed")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _refuse  # type: ignore[assignment]


class _Attribute:
    """An attribute of a remote object: its value when that is data or an object, else a method to call."""

    def __init__(self, remote: Remote, owner: RemoteObject, name: str) -> None:
        self.remote, self.owner, self.name = remote, owner, name

    def read(self) -> Any:
        try:
            return self.remote.ask("get", self.owner, self.name)
        except Exception as error:
            if "PlainDataError" in getattr(error, "candidate_bases", ()):
                return RemoteFunction(self.remote, self.owner, self.name)
            raise


def _handle_of(value: Any) -> Handle:
    if type(value) is RemoteObject:
        handle: Handle = object.__getattribute__(value, "_handle")
        return handle
    raise PlainDataError(f"{type(value).__name__} object")


def _overwrite(argument: Any, new: Any) -> None:
    if isinstance(argument, (list, bytearray)):
        argument[:] = new
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(new)


def _as_raised(bases: Any, message: Any) -> Exception:
    """The nearest builtin exception type with the candidate's message, marked as the candidate's.

    Never StopIteration: `all(map(f, cases))` would take it for the end of the cases.
    """
    message, error = str(message), None
    for name in bases:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ENDS_OF_LOOPS):
            try:
                error = kind(message)
                break
            except TypeError:
                continue
        elif kind in ENDS_OF_LOOPS:
            break
    if error is None:
        error = RuntimeError(f"{bases[0] if bases else 'exception'}: {message}")
    error.candidate_bases = [str(name) for name in bases]  # type: ignore[attr-defined]
    return error


class Sites:
    """Which checks ran and how they went; the instrumented tests call these."""

    def __init__(self, first_only: bool) -> None:
        self.first_only = first_only
        self.current = -1
        self.ran: set[int] = set()
        self.failures: dict[int, list[Any]] = {}

    def enter(self, site: int) -> None:
        self.current = site

    def passed(self, site: int) -> None:
        self.ran.add(site)
        self.current = -1

    def failed(self, site: int, error: BaseException) -> None:
        if isinstance(error, Stop):
            raise error
        self.failures.setdefault(site, [site, *_described(error)])
        self.current = -1
        if self.first_only:
            raise Stop


def _described(error: BaseException) -> tuple[str, str, str]:
    name = type(error).__name__
    if hasattr(error, "candidate_bases"):
        return "raised", (error.candidate_bases or [name])[0][:NAME_CHARACTERS], _message(error)
    return "wrong" if isinstance(error, AssertionError) else "error", name, _message(error)


def _message(error: BaseException) -> str:
    """Shortened; an answer that a test puts into its message may have no text, as an integer of 5000 digits."""
    try:
        return str(error)[:MESSAGE_CHARACTERS]
    except Exception as without:
        return f"no text: {type(without).__name__}"


def statement(function: Any) -> Any:
    """For a call whose result is thrown away: then its arguments are what the test looks at."""
    return function.in_place if type(function) is RemoteFunction else function


def run(channel: Channel, message: list[Any]) -> bytes:
    _, nonce, setup, tests, names, classes, first_only = message
    remote, sites = Remote(channel, bool(classes)), Sites(first_only)
    proxies = {name: RemoteFunction(remote, name) for name in [*names, *classes]}
    space: dict[str, Any] = {"__name__": "tests", "_check_": sites, "_statement_": statement, **proxies}
    solution = types.ModuleType("solution")
    solution.__dict__.update(proxies)
    sys.modules["solution"] = solution
    random.seed(SEED)
    try:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), space)
        space.update(proxies)
        exec(compile(tests, "tests.py", "exec", dont_inherit=True), space)
        _call_the_tests(space, names)
    except Stop:
        pass
    except BaseException as error:
        sites.failures.setdefault(sites.current, [sites.current, *_described(error)])
    first = next(iter(sites.failures.values()), None)
    return encode(["verdict", nonce, sorted(sites.ran), sorted(sites.failures), first])


def _call_the_tests(space: dict[str, Any], names: list[str]) -> None:
    """HumanEval's check(candidate), functions named test..., methods of unittest.TestCase classes."""
    for name, value in list(space.items()):
        if name == "check" and type(value) is types.FunctionType:
            value(space[names[0]])
        elif name.startswith("test") and type(value) is types.FunctionType and not value.__code__.co_argcount:
            value()
        elif isinstance(value, type) and any(base.__name__ == "TestCase" for base in value.__mro__[1:]):
            for method in [method for method in dir(value) if method.startswith("test")]:
                case = value(method)
                case.setUp()
                getattr(case, method)()
                case.tearDown()


def serve(descriptor: int) -> None:
    channel = Channel(descriptor)
    channel.send(b"V" + run(channel, decode(channel.receive())))
