"""LaTeX arithmetic as a tree: numbers, letters, + - * /, powers, roots, fractions, functions; nothing else.

Whatever is ambiguous or unknown raises Unsupported. Bounded in tokens, digits and depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_TOKENS = 400
MAX_DEPTH = 60
MAX_DIGITS = 1500
"""Of a number."""


class Unsupported(Exception):
    """Not in the grammar, ambiguous, undefined or too large: ask sympy."""


@dataclass(frozen=True)
class Node:
    op: str
    args: tuple[Any, ...] = ()


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>degrees\b)|(?P<letter>[A-Za-z])|(?P<symbol>\*\*|[-+*/^_(){}\[\]|!]))"
)
_GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau
phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"""
_LETTERS = frozenset("\\" + name for name in _GREEK.split())
_TRIGONOMETRIC = frozenset(["\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc"])
_FUNCTIONS = _TRIGONOMETRIC | {
    *("\\sinh", "\\cosh", "\\tanh", "\\arcsin", "\\arccos", "\\arctan", "\\ln", "\\exp", "\\log")
}
_INVERSES = {"\\sin": "\\arcsin", "\\cos": "\\arccos", "\\tan": "\\arctan"}
_SIGNS = {"\\cdot": "*", "\\times": "*", "\\ast": "*", "\\div": "/", "\\lbrace": "{", "**": "^"}
_FENCES = {"\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\lbrack": "[", "\\rbrack": "]"}
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_FUNCTION_NAMES = frozenset("fgh")
_LONG_WORD = re.compile(r"(?<![A-Za-z\\])(?!degrees\b)[A-Za-z]{3,}")


def read(text: str) -> Node:
    """The tree of one normalised LaTeX expression. Raises Unsupported."""
    if _LONG_WORD.search(text):
        raise Unsupported("a word")
    reader = _Reader(_tokens(text))
    tree = reader.sum(0)
    if reader.token:
        raise Unsupported(reader.token)
    return tree


def has_function(text: str) -> bool:
    """Trigonometric, where degrees are part of the value."""
    return any(name in text for name in _TRIGONOMETRIC)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) > MAX_TOKENS:
            raise Unsupported(text[position : position + 10])
        token = match[match.lastgroup or 0]
        tokens.append(_FENCES.get(token, _SIGNS.get(token, token)))
        position = match.end()
    return tokens


class _Reader:
    """Recursive descent; each method reads one level of precedence."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position = tokens, 0
        self.in_angle = False
        """Inside the argument of a trigonometric function, where degrees count."""

    @property
    def token(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.token
        if not token or (expected and token != expected):
            raise Unsupported(f"{token!r} where {expected!r} was expected")
        self.position += 1
        return token

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unsupported("depth")
        node = self.product(depth)
        while self.token in ("+", "-"):
            sign = self.take()
            node = Node("add" if sign == "+" else "subtract", (node, self.product(depth)))
        return node

    def product(self, depth: int) -> Node:
        negative = False
        while self.token in ("+", "-"):
            negative ^= self.take() == "-"
        node, slash = self.power(depth), False
        while True:
            if self.token in ("*", "/"):
                slash = self.take() == "/"
                sign = 1
                while self.token in ("+", "-"):
                    sign = -sign if self.take() == "-" else sign
                right = self.power(depth)
                right = Node("negate", (right,)) if sign < 0 else right
                node = Node("divide" if slash else "multiply", (node, right))
            elif self._starts_factor():
                if slash:
                    raise Unsupported("a/bc")
                node = self._times(node, depth)
            else:
                return Node("negate", (node,)) if negative else node

    def _starts_factor(self) -> bool:
        token = self.token
        return (
            bool(token) and (token[0].isalnum() or token in "({" or token[0] == "\\") and token != "degrees"
        )

    def _times(self, left: Node, depth: int) -> Node:
        """Implicit product; "3 4" is nothing and f(x) no product."""
        called = left.op == "letter" and left.args[0] in _FUNCTION_NAMES and self.token == "("
        if self.token[0].isdigit() or called:
            raise Unsupported("juxtaposition")
        return Node("multiply", (left, self.power(depth)))

    def power(self, depth: int) -> Node:
        base = self.postfix(self.atom(depth))
        if self.token == "^":
            self.take()
            sign = -1 if self.token == "-" and self.take() else 1
            exponent = self.atom(depth + 1)
            if self.token == "^":
                exponent = Node("power", (exponent, self._exponents(depth + 1)))
            if self.token == "!":
                raise Unsupported("x^n!")
            base = Node("power", (base, Node("negate", (exponent,)) if sign < 0 else exponent))
        if self.token == "degrees":
            self.take()
            if self.in_angle:
                base = Node("multiply", (base, Node("divide", (Node("pi"), _number("180")))))
            elif self.token:
                raise Unsupported("degrees")
        return base

    def _exponents(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unsupported("depth")
        self.take("^")
        exponent = self.atom(depth)
        return Node("power", (exponent, self._exponents(depth + 1))) if self.token == "^" else exponent

    def postfix(self, node: Node) -> Node:
        if self.token == "!":
            self.take()
            node = Node("factorial", (node,))
            if self.token == "!":
                raise Unsupported("double factorial")
        return node

    def atom(self, depth: int) -> Node:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            if self.token == "_":
                raise Unsupported("number in a base")
            return self.mixed(_number(token), depth)
        if token in _CLOSING:
            return self.group(token, depth)
        if token == "|":
            inner = self.sum(depth + 1)
            self.take("|")
            return Node("absolute", (inner,))
        if token.isalpha() or token in _LETTERS:
            return self.letter(token)
        if token in _FUNCTIONS:
            return self.function(token, depth)
        if token in _COMMANDS:
            return _COMMANDS[token](self, depth)
        raise Unsupported(token)

    def mixed(self, whole: Node, depth: int) -> Node:
        r"""3\frac12 is a mixed number; 3\frac{x}{2} is a product."""
        if self.token != "\\frac" or whole.args[0].denominator != 1:
            return whole
        part = self.atom(depth)
        fractional = part.op == "divide" and all(arg.op == "number" for arg in part.args)
        return Node("add" if fractional else "multiply", (whole, part))

    def group(self, opening: str, depth: int) -> Node:
        node = self.sum(depth + 1)
        self.take(_CLOSING[opening])
        return node

    def braced(self, depth: int) -> Node:
        if self.token == "{":
            self.take()
            return self.group("{", depth)
        token = self.take()
        if token.isdigit() and len(token) == 1:
            return _number(token)
        if token.isalpha() and len(token) == 1:
            return self.letter(token)
        raise Unsupported(token)

    def letter(self, name: str) -> Node:
        if self.token == "_":
            self.take()
            if self.token == "{":
                self.take()
                parts = []
                while self.token != "}":
                    parts.append(self.take())
                self.take("}")
                return Node("letter", (name + "_" + "".join(parts),))
            return Node("letter", (name + "_" + self.take(),))
        return Node("i") if name == "i" else Node("e") if name == "e" else Node("letter", (name,))

    def function(self, name: str, depth: int) -> Node:
        base, exponent = None, None
        if self.token == "_" and name == "\\log":
            self.take()
            base = self.braced(depth + 1)
        if self.token == "^":
            self.take()
            exponent = self.braced(depth + 1)
            if exponent == Node("negate", (_number("1"),)):
                name, exponent = _INVERSES.get(name, "?"), None
        if name == "?" or (name == "\\log") != (base is not None):
            raise Unsupported("function without a certain meaning")
        outer, self.in_angle = self.in_angle, name in _TRIGONOMETRIC
        argument = self.argument(depth + 1)
        self.in_angle = outer
        node = Node(name, (argument,)) if base is None else Node("log", (argument, base))
        return node if exponent is None else Node("power", (node, exponent))

    def argument(self, depth: int) -> Node:
        r"""Of a function: a bracket, or factors up to the next bracket, function or sign (\sin 2x)."""
        if self.token in ("(", "{", "["):
            node = self.group(self.take(), depth)
            if self.token in ("^", "!", "("):
                raise Unsupported("f(x)^2")
            return node
        node = self.power(depth)
        while self._starts_factor() and self.token not in ("(", "{") and self.token not in _FUNCTIONS:
            node = self._times(node, depth)
        return node

    def fraction(self, depth: int) -> Node:
        return Node("divide", (self.braced(depth + 1), self.braced(depth + 1)))

    def root(self, depth: int) -> Node:
        if self.token == "[":
            self.take()
            degree = self.sum(depth + 1)
            self.take("]")
            return Node("root", (self.braced(depth + 1), degree))
        if self.token == "(":
            self.take()
            return Node("root", (self.group("(", depth), _number("2")))
        return Node("root", (self.braced(depth + 1), _number("2")))

    def binomial(self, depth: int) -> Node:
        return Node("binomial", (self.braced(depth + 1), self.braced(depth + 1)))

    def rounded(self, op: str, closing: str, depth: int) -> Node:
        inner = self.sum(depth + 1)
        self.take(closing)
        return Node(op, (inner,))


_COMMANDS: dict[str, Callable[[_Reader, int], Node]] = {
    "\\frac": _Reader.fraction,
    "\\sqrt": _Reader.root,
    "\\binom": _Reader.binomial,
    "\\pi": lambda reader, depth: Node("pi"),
    "\\imath": lambda reader, depth: Node("i"),
    "\\lfloor": lambda reader, depth: reader.rounded("floor", "\\rfloor", depth),
    "\\lceil": lambda reader, depth: reader.rounded("ceiling", "\\rceil", depth),
}


def _number(text: str) -> Node:
    text = text.replace(",", "")
    if len(text) > MAX_DIGITS:
        raise Unsupported("digits")
    return Node("number", (Fraction(text.rstrip(".") if text.endswith(".") else text),))


def letters(tree: Node) -> frozenset[str]:
    """The unknowns."""
    if tree.op == "letter":
        return frozenset(tree.args)
    return frozenset().union(*(letters(arg) for arg in tree.args if isinstance(arg, Node)))
