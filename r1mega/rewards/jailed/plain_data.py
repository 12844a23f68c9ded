"""Plain data as text: the only thing that passes between a candidate's functions and the tests that call them.

Nothing is unpickled and no class of the sender's is ever looked up, so a received value is made of builtin
types alone: a subclass of int, str, list, ... arrives as its base, an object with a clever `__eq__` not at all.

JSON null, booleans, strings, floats and integers under 2^53 stand for themselves; an array is [tag, ...], by the
tables below; objects, NaN and Infinity literals are refused. Iterators arrive as iterators over a list, views of
dicts as views of a new dict; an endless iterator is too much data. Standard library only: this file also runs inside jails.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_DEPTH = 100
MAX_ITEMS = 500_000
"""Values in one message, containers counted too."""
MAX_BYTES = 8 << 20
MAX_SAFE_INTEGER = 1 << 53


class PlainDataError(ValueError):
    """Not plain data, or too much of it."""


class Handle:
    """Stands for an object that stays where it is: its number in the sender's table."""

    def __init__(self, number: int) -> None:
        self.number = number


Keep = Callable[[Any], Any]
"""Object that is not plain -> Handle, or PlainDataError."""


def refuse(value: Any) -> Any:
    raise PlainDataError(f"{type(value).__name__} object is not plain data")


def encode(value: Any, keep: Keep = refuse) -> bytes:
    """PlainDataError where the value is not plain, too deep, too long, or contains itself."""
    text = json.dumps(_Encoder(keep).tree(value, 0), separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_BYTES:
        raise PlainDataError(f"{len(text)} bytes of data; at most {MAX_BYTES} are passed on")
    return text.encode()


def decode(data: bytes, resolve: Callable[[Handle], Any] = refuse) -> Any:
    """The value, of builtin types alone; PlainDataError for anything that `encode` does not write."""
    if len(data) > MAX_BYTES:
        raise PlainDataError(f"{len(data)} bytes of data; at most {MAX_BYTES} are passed on")
    try:
        tree = json.loads(data, object_pairs_hook=refuse, parse_constant=refuse)
        return _Decoder(resolve).value(tree, 0)
    except PlainDataError:
        raise
    except (ValueError, TypeError, ArithmeticError, IndexError, KeyError, RecursionError) as error:
        raise PlainDataError(f"malformed data: {error}") from None


class _Encoder:
    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.left = MAX_ITEMS

    def tree(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise PlainDataError(f"more than {MAX_ITEMS} values")
        if value is None or type(value) in (bool, str):
            return value
        for kind, tree_of in _SCALARS:
            if isinstance(value, kind):
                return tree_of(value)
        if depth >= MAX_DEPTH:
            raise PlainDataError(f"nested deeper than {MAX_DEPTH}")
        for kind, tag, parts in _CONTAINERS:
            if isinstance(value, kind):
                return [tag, *(self.tree(part, depth + 1) for part in parts(value))]
        if type(value) is type and value in _TYPES:
            return ["type", value.__name__]
        if isinstance(value, Iterator):
            first = itertools.islice(value, self.left + 1)
            return ["iterator", *(self.tree(part, depth + 1) for part in first)]
        handle = self.keep(value)
        return ["handle", handle.number]


_TYPES = {bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict}
"""Types that may be passed themselves, as in `remove_type(values, int)`."""


def _integer(value: int) -> Any:
    value = int.__pos__(value)
    return value if abs(value) < MAX_SAFE_INTEGER else ["int", f"{value:x}"]


def _float(value: float) -> Any:
    value = float.__pos__(value)
    return value if math.isfinite(value) else ["float", repr(value)]


def _decimal(value: decimal.Decimal) -> Any:
    return ["decimal", decimal.Decimal.__str__(value)]


def _fraction(value: fractions.Fraction) -> Any:
    return ["fraction", f"{value.numerator:x}", f"{value.denominator:x}"]


def _complex(value: complex) -> Any:
    return ["complex", repr(value.real), repr(value.imag)]


def _range(value: range) -> Any:
    return ["range", *(f"{part:x}" for part in (value.start, value.stop, value.step))]


def _timedelta(value: datetime.timedelta) -> Any:
    return ["timedelta", value.days, value.seconds, value.microseconds]


def _iso(tag: str) -> Callable[[Any], Any]:
    return lambda value: [tag, value.isoformat()]


_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, _integer),
    (float, _float),
    (str, str.__str__),
    (bytes, lambda value: ["bytes", bytes.hex(value)]),
    (bytearray, lambda value: ["bytearray", bytearray.hex(value)]),
    (complex, _complex),
    (range, _range),
    (decimal.Decimal, _decimal),
    (fractions.Fraction, _fraction),
    (datetime.datetime, _iso("datetime")),
    (datetime.date, _iso("date")),
    (datetime.time, _iso("time")),
    (datetime.timedelta, _timedelta),
)


def _flat(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(pairs)


_CONTAINERS: tuple[tuple[type, str, Callable[[Any], Iterable[Any]]], ...] = (
    (list, "list", list.__iter__),
    (tuple, "tuple", tuple.__iter__),
    (dict, "dict", lambda value: _flat(dict.items(value))),
    (set, "set", set.__iter__),
    (frozenset, "frozenset", frozenset.__iter__),
    (collections.deque, "deque", collections.deque.__iter__),
    (type({}.keys()), "keys", iter),
    (type({}.values()), "values", iter),
    (type({}.items()), "items", _flat),
)


class _Decoder:
    def __init__(self, resolve: Callable[[Handle], Any]) -> None:
        self.resolve = resolve
        self.left = MAX_ITEMS

    def value(self, tree: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise PlainDataError("too many values, or nested too deep")
        if not isinstance(tree, list):
            return tree
        tag, *parts = tree
        if tag == "handle":
            (number,) = parts
            if type(number) is not int:
                raise PlainDataError("a handle is a number")
            return self.resolve(Handle(number))
        if tag in _FROM_TEXT:
            return _FROM_TEXT[tag](*parts)
        return _FROM_VALUES[tag]([self.value(part, depth + 1) for part in parts])


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    if len(flat) % 2:
        raise PlainDataError("a key without a value")
    return dict(zip(flat[::2], flat[1::2]))


def _from_hex(text: str) -> int:
    return int(text, 16)


_FROM_TEXT: dict[str, Callable[..., Any]] = {
    "type": {kind.__name__: kind for kind in _TYPES}.__getitem__,
    "int": _from_hex,
    "float": float,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "range": lambda start, stop, step: range(*map(_from_hex, (start, stop, step))),
    "decimal": decimal.Decimal,
    "fraction": lambda top, bottom: fractions.Fraction(_from_hex(top), _from_hex(bottom)),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": datetime.timedelta,
}

_FROM_VALUES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": _pairs,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "iterator": iter,
    "keys": lambda flat: dict.fromkeys(flat).keys(),
    "values": lambda flat: dict(enumerate(flat)).values(),
    "items": lambda flat: _pairs(flat).items(),
}
