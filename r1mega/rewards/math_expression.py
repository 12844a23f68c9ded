"""LaTeX arithmetic by value: fast, exact where it can be, and refusing what it does not know.

A small grammar (numbers, letters, + - * /, powers, roots, fractions, binomials, factorials, absolute values,
trigonometric, exponential and logarithmic functions) is read into a tree and evaluated: as fractions while all is
rational, else as complex numbers with so many digits that two different answers of that size cannot
agree by accident. Letters stand for numbers drawn from a hash of the pair compared, so that equal polynomials and
identities agree at every draw and others do not (Schwartz-Zippel), and nobody can prepare a collision.

Whatever is ambiguous or unknown raises Unsupported, and the caller asks sympy. Everything is bounded: digits,
exponents, depth. Used in worker processes only, because mpmath keeps its precision in global state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mpmath

from r1mega.rewards.math_tree import Node, Unsupported, has_function, letters, read

__all__ = ["Node", "Unsupported", "has_function", "letters", "read", "same_equation", "same_expression"]

MAX_BITS = 16_000
"""Of numerators and denominators."""
MAX_EXPONENT = 10_000
MAX_DIGITS = 1500
"""Working precision, decimal."""
BASE_DIGITS = 90
DRAWS = 3
"""Points at which expressions with letters are compared."""

Number = Any
"""Fraction, mpmath.mpf or mpmath.mpc."""


@dataclass
class _Evaluation:
    """One pass over a tree. `digits` grows to the largest size met, before or after the decimal point."""

    values: dict[str, Fraction]
    digits: int = 0
    steps: int = field(default=0)

    def of(self, node: Node) -> Number:
        if node.op == "number":
            return self.noted(node.args[0])
        if node.op == "letter":
            return self.values[node.args[0]]
        try:
            result = _OPERATIONS[node.op](*(self.of(arg) for arg in node.args))
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            raise Unsupported(str(error)) from error
        return self.noted(result)

    def noted(self, value: Number) -> Number:
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        else:
            if not mpmath.isfinite(value):
                raise Unsupported("not finite")
            size = mpmath.mag(value)
            bits = 0 if size == -mpmath.inf else abs(int(size))
            # a value that rounding left where zero should be is not small on purpose
            bits = 0 if bits > mpmath.mp.prec // 2 and size < 0 else bits
        if bits > MAX_BITS:
            raise Unsupported("size")
        self.digits = max(self.digits, bits * 3 // 10)
        return value


def _real(value: Number) -> Number:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        power = exponent.numerator
        if abs(power) > MAX_EXPONENT:
            raise Unsupported("exponent")
        if isinstance(base, Fraction):
            if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
                raise Unsupported("power")
            if base == 0 and power <= 0:
                raise Unsupported("0^0")
            return base**power
        return base**power
    if isinstance(base, Fraction) and base <= 0:
        if base < 0 and isinstance(exponent, Fraction):
            raise Unsupported("a power of a negative number with several values")
        if base == 0:
            raise Unsupported("0^x")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator <= 64:
        return _power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    if abs(_real(exponent)) > MAX_EXPONENT:
        raise Unsupported("exponent")
    return mpmath.power(_real(base), _real(exponent))


def _root(value: Number, degree: Number) -> Number:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 64:
        raise Unsupported("root")
    n = degree.numerator
    if isinstance(value, Fraction):
        if value < 0 and n % 2:
            return -_root(-value, degree)
        if value >= 0:
            top, bottom = _whole_root(value.numerator, n), _whole_root(value.denominator, n)
            if top is not None and bottom is not None:
                return Fraction(top, bottom)
    elif n % 2 and not isinstance(value, mpmath.mpc) and value < 0:
        return -mpmath.root(-value, n)
    return mpmath.sqrt(_real(value)) if n == 2 else mpmath.root(_real(value), n)


def _whole_root(value: int, n: int) -> int | None:
    """The exact n-th root of a natural number, if it is whole (Newton's method on integers)."""
    if n == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    if value < 2:
        return value
    guess = 1 << -(-value.bit_length() // n)
    while True:
        better = ((n - 1) * guess + value // guess ** (n - 1)) // n
        if better >= guess:
            return guess if guess**n == value else None
        guess = better


def _factorial(value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 1000:
        raise Unsupported("factorial")
    return Fraction(math.factorial(value.numerator))


def _binomial(n: Number, k: Number) -> Number:
    whole = all(isinstance(v, Fraction) and v.denominator == 1 and 0 <= v <= 1000 for v in (n, k))
    if not whole:
        raise Unsupported("binomial")
    return Fraction(math.comb(n.numerator, k.numerator))


def _floor(value: Number) -> Number:
    if not isinstance(value, Fraction):
        raise Unsupported("floor of an approximate number")
    return Fraction(math.floor(value))


def _small(function: Callable[[Number], Number]) -> Callable[[Number], Number]:
    def of(value: Number) -> Number:
        value = _real(value)
        if abs(value) > MAX_EXPONENT:
            raise Unsupported("argument")
        return function(value)

    return of


def _logarithm(value: Number, base: Number = None) -> Number:
    if value == 0 or base in (0, 1):
        raise Unsupported("logarithm")
    value = mpmath.log(_real(value))
    return value if base is None else value / mpmath.log(_real(base))


def _arithmetic(function: Callable[[Number, Number], Number]) -> Callable[[Number, Number], Number]:
    def of(a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return function(a, b)
        return function(_real(a), _real(b))

    return of


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "add": _arithmetic(lambda a, b: a + b),
    "subtract": _arithmetic(lambda a, b: a - b),
    "multiply": _arithmetic(lambda a, b: a * b),
    "divide": _arithmetic(lambda a, b: a / b),
    "negate": lambda a: -a,
    "power": _power,
    "root": _root,
    "absolute": abs,
    "factorial": _factorial,
    "binomial": _binomial,
    "floor": _floor,
    "ceiling": lambda a: -_floor(-a),
    "pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
    "log": _logarithm,
    "\\ln": _logarithm,
    "\\exp": _small(mpmath.exp),
    "\\sin": _small(mpmath.sin),
    "\\cos": _small(mpmath.cos),
    "\\tan": _small(mpmath.tan),
    "\\cot": _small(mpmath.cot),
    "\\sec": _small(mpmath.sec),
    "\\csc": _small(mpmath.csc),
    "\\sinh": _small(mpmath.sinh),
    "\\cosh": _small(mpmath.cosh),
    "\\tanh": _small(mpmath.tanh),
    "\\arcsin": _small(mpmath.asin),
    "\\arccos": _small(mpmath.acos),
    "\\arctan": _small(mpmath.atan),
}


# ---------------------------------------------------------------- comparison


def same_expression(a: Node, b: Node) -> bool:
    """Equal at every draw of their letters. Raises Unsupported."""
    names = sorted(letters(a) | letters(b))
    if not names:
        return same_value(a, b, {})
    return all(same_value(a, b, values) for values in draws(names, a, b))


def same_equation(a: tuple[Node, Node], b: tuple[Node, Node]) -> bool:
    """Left minus right of one is a constant multiple of that of the other. Raises Unsupported."""
    first, second = (Node("subtract", sides) for sides in (a, b))
    names = sorted(letters(first) | letters(second))
    if not names or letters(first) != letters(second):
        return False
    points = list(draws(names, first, second))
    anchor = points[0]
    ratios = [Node("multiply", (first, _at(second, anchor))), Node("multiply", (second, _at(first, anchor)))]
    one, two = _Evaluation(anchor).of(first), _Evaluation(anchor).of(second)
    if one == 0 or two == 0:
        raise Unsupported("a draw on the curve")
    return all(same_value(ratios[0], ratios[1], values) for values in points[1:])


def _at(tree: Node, values: dict[str, Fraction]) -> Node:
    """The tree with its letters replaced."""
    if tree.op == "letter":
        return Node("number", (values[tree.args[0]],))
    return Node(tree.op, tuple(_at(arg, values) if isinstance(arg, Node) else arg for arg in tree.args))


def same_value(a: Node, b: Node, values: dict[str, Fraction]) -> bool:
    """With the letters' values given; the precision follows the size of what is met on the way."""
    digits = BASE_DIGITS
    while digits <= MAX_DIGITS:
        with mpmath.workdps(digits):
            evaluation = _Evaluation(values)
            one, two = evaluation.of(a), evaluation.of(b)
            if isinstance(one, Fraction) and isinstance(two, Fraction):
                return one == two
            needed = BASE_DIGITS + 3 * evaluation.digits
            if needed <= digits:
                one, two = _real(one), _real(two)
                bound = mpmath.mpf(10) ** -(digits // 3)
                return bool(abs(one - two) <= bound * max(1, abs(one), abs(two)))
        digits = needed
    raise Unsupported("precision")


def draws(names: list[str], *trees: Node) -> list[dict[str, Fraction]]:
    """DRAWS points, negative and positive, drawn from a hash of the trees: the same for the same pair."""
    seed = hashlib.sha256(repr(trees).encode()).digest()
    points = []
    for draw in range(DRAWS):
        values = {}
        for name in names:
            word = hashlib.sha256(seed + f"{draw} {name}".encode()).digest()
            top, bottom = 1 + int.from_bytes(word[:2], "big") % 997, 2 + int.from_bytes(word[2:4], "big") % 89
            values[name] = Fraction(-top if (word[4] + draw) % 2 else top, bottom)
        points.append(values)
    return points
