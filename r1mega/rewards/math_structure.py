r"""Answers made of answers: lists, sets, points, intervals, unions, matrices, "x =", plus/minus, inequalities.

The parts are read and compared by a Leaf: exact quantities in the scoring process (math_answer.py), expressions by
value in the workers (math_symbolic.py). A verdict of None means that neither equality nor difference is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_ITEMS = 100
MAX_LAYERS = 6


@dataclass(frozen=True)
class Leaf:
    read: Callable[[str], Any]
    """Normalised text of one answer -> its value; None when it cannot."""
    same: Callable[[Any, Any], bool | None]
    """Of two values."""


@dataclass(frozen=True)
class Sequence:
    r"""A point, an interval, a list: opening and closing are "(", "[", "\{" or, for a bare list, ""."""

    opening: str
    items: tuple[str, ...]
    closing: str

    @property
    def unordered(self) -> bool:
        return self.opening in ("", "\\{")


_NAME = re.compile(
    r"\(?(?:[a-zA-Z]|\\[a-z]+)(?:_\{?\w+\}?)?'?(?:\([a-z]\))?(?:,\s?[a-z](?:_\{?\w\}?)?)*\)?|[A-Z]{2,3}"
    r"|\\angle ?[A-Z]{1,3}|m ?\\angle ?[A-Z]{1,3}|[A-Z]:[A-Z]|\\frac\{[A-Z]+\}\{[A-Z]+\}|[a-zA-Z]+"
)
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")
_MEMBER = re.compile(rf"(?:{_NAME.pattern})\s*\\in(?![a-zA-Z])\s*")
_AND = re.compile(r"\s*,?\s+(?:and|or)\s+")
_SPACES = re.compile(r"\s+")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end\{\1\}", re.DOTALL)
_RELATION = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|<|>")
_VARIABLE = re.compile(r"[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\)")
_INFINITY = re.compile(r"[+]?\\infty|-\s*\\infty")
_CONSTANTS = frozenset(["e", "i", "\\pi"])


def same_structure(gold: str, pred: str, leaf: Leaf, depth: int = 0) -> bool | None:
    """Whether two normalised answers are equal; None where it cannot be told."""
    if depth > MAX_LAYERS:
        return None
    if gold == pred:
        return True
    sides = _without_names(gold, pred)
    if sides is None:
        return None
    gold, pred = sides
    for compare in (_same_matrix, _same_union, _same_sequence):
        found, verdict = compare(gold, pred, leaf, depth)
        if found:
            return verdict
    return _same_item(gold, pred, leaf)


def _same_item(gold: str, pred: str, leaf: Leaf) -> bool | None:
    if "=" in gold or "=" in pred:
        return None
    infinite = [_SPACES.sub("", t).lstrip("+") for t in (gold, pred) if _INFINITY.fullmatch(t)]
    if len(infinite) == 2:
        return infinite[0] == infinite[1]
    a, b = (None if _INFINITY.fullmatch(text) else leaf.read(text) for text in (gold, pred))
    if infinite:
        return False if a is not None or b is not None else None
    return None if a is None or b is None else leaf.same(a, b)


def _without_names(gold: str, pred: str) -> tuple[str, str] | None:
    r"""Both right sides, where "x = 5" stands beside "5" or "x = 5"; None where the left sides differ."""
    gold, pred = _MEMBER.sub("", gold, count=1), _MEMBER.sub("", pred, count=1)
    (gold_name, gold_value), (pred_name, pred_value) = _named(gold), _named(pred)
    if gold_name and pred_name:
        names = {_compact(gold_name), _compact(pred_name)}
        return (gold_value, pred_value) if len(names) == 1 or names == {"y", "f(x)"} else (gold, pred)
    if gold_name or pred_name:
        return gold_value, pred_value
    return gold, pred


def _named(text: str) -> tuple[str, str]:
    """(name, value) of "name = value"; ("", text) of everything else."""
    if "=" not in text:
        return "", text
    parts = _EQUALS.split(text)
    if len(parts) != 2 or not _NAME.fullmatch(parts[0].strip()):
        return "", text
    return parts[0].strip(), parts[1].strip()


# ---------------------------------------------------------------- sequences

_Verdict = tuple[bool, bool | None]
"""(this rule applies, its verdict)."""


def _same_sequence(gold: str, pred: str, leaf: Leaf, depth: int) -> _Verdict:
    a, b = sequence(gold), sequence(pred)
    if a is None and b is None:
        return False, None
    if a is None or b is None:
        return True, _beside_single(a or b, pred if a else gold, leaf, depth)
    if len(a.items) > MAX_ITEMS or len(b.items) > MAX_ITEMS:
        return True, None

    def same(x: str, y: str) -> bool | None:
        return same_structure(x, y, leaf, depth + 1)

    if (a.opening, a.closing) != (b.opening, b.closing):
        return True, _across_brackets(a, b, same)
    if a.unordered:
        return True, _same_members(a.items, b.items, same)
    return True, _in_order(a.items, b.items, same)


def _beside_single(many: Sequence | None, single: str, leaf: Leaf, depth: int) -> bool | None:
    """A list of several different things is not one thing; a list of one, or of equal things, may be."""
    assert many is not None
    if not many.unordered and many.opening not in ("(", "["):
        return None
    if _UNION.search(single) or "\\begin" in single or "=" in single or leaf.read(single) is None:
        return None
    if not many.unordered:
        return False if all(leaf.read(item) is not None for item in many.items) else None
    return _same_members(many.items, (single,), lambda x, y: same_structure(x, y, leaf, depth + 1))


def _across_brackets(a: Sequence, b: Sequence, same: Callable[[str, str], bool | None]) -> bool | None:
    """(1,2) is not [1,2] nor \\{1,2\\}; \\{1,2\\} is the bare list 1,2; a point may be written without its brackets."""
    if a.unordered and b.unordered:
        return _same_members(a.items, b.items, same)
    if len(a.items) == len(b.items) == 2 and {a.opening, b.opening} <= {"(", "["}:
        return False
    if (a.opening == "\\{") != (b.opening == "\\{") and "" not in (a.opening, b.opening):
        return False
    if "" in (a.opening, b.opening):
        if _in_order(a.items, b.items, same):
            return True
        return False if _same_members(a.items, b.items, same) is False else None
    return None


def _in_order(a: tuple[str, ...], b: tuple[str, ...], same: Callable[[str, str], bool | None]) -> bool | None:
    if len(a) != len(b):
        return False
    verdicts = [same(x, y) for x, y in zip(a, b)]
    return False if False in verdicts else None if None in verdicts else True


def _same_members(
    a: tuple[str, ...], b: tuple[str, ...], same: Callable[[str, str], bool | None]
) -> bool | None:
    """As many members, and every member of each is in the other."""
    a, b = _without_signs(a), _without_signs(b)
    if len(a) != len(b):
        return False if all(same(x, x) for x in a + b) else None
    unsure = False
    table = [[same(x, y) for y in b] for x in a]
    for row in [*table, *map(list, zip(*table))]:
        if True in row:
            continue
        if None not in row:
            return False
        unsure = True
    return None if unsure else True


def _without_signs(items: tuple[str, ...]) -> tuple[str, ...]:
    r"""The members of "1 \pm 2" apart: 1 + 2 and 1 - 2."""
    return tuple(one for item in items for one in both_signs(item))


def both_signs(text: str) -> list[str]:
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    return [upper.strip(), lower.strip()]


def sequence(text: str) -> Sequence | None:
    r"""(1, 2], \{1, 2\}, "1, 2", "1 and 2", "1 \pm 2", and "0 \le x < 1" as the interval it is."""
    bracketed = _bracketed(text)
    if bracketed is not None:
        return bracketed
    interval = _interval(text)
    if interval is not None:
        return interval
    if "\\pm" in text and not _AND.search(text) and "," not in text:
        return Sequence("", tuple(both_signs(text)), "")
    return None


def _bracketed(text: str) -> Sequence | None:
    opening = next((b for b in ("(", "[", "\\{") if text.startswith(b)), "")
    closing = next((b for b in (")", "]", "\\}") if text.endswith(b)), "")
    if opening and closing and _encloses(text, opening, closing):
        inner = text[len(opening) : len(text) - len(closing)]
        items = split_commas(inner, thousands=opening == "\\{")
        if len(items) > 1 or opening == "\\{":
            return Sequence(opening, tuple(items), closing)
        return None
    items = split_commas(_AND.sub(", ", text))
    if len(items) == 1 and text.startswith("{") and text.endswith("}"):
        items = split_commas(text[1:-1])
    return Sequence("", tuple(items), "") if len(items) > 1 and all(items) else None


def _encloses(text: str, opening: str, closing: str) -> bool:
    """The first bracket is closed by the last."""
    depth = 0
    inner = text[len(opening) : len(text) - len(closing)]
    for character in inner.replace("\\{", "(").replace("\\}", ")"):
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            return False
    return depth == 0


def split_commas(text: str, *, thousands: bool = True) -> list[str]:
    """Parts between the commas (and semicolons) outside brackets; "1,234" is one number with `thousands`."""
    items, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth <= 0 and not (thousands and _is_thousands(text, position)):
            items.append(text[start:position].strip())
            start = position + 1
    return [*items, text[start:].strip()]


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def _is_thousands(text: str, comma: int) -> bool:
    return any(m.start() < comma < m.end() for m in _THOUSANDS.finditer(text, max(0, comma - 40), comma + 40))


def _interval(text: str) -> Sequence | None:
    """Of one variable between or beside constants: 0 <= x < 1, x > 3."""
    signs = _RELATION.findall(text)
    if not 1 <= len(signs) <= 2 or "," in text:
        return None
    parts = [part.strip() for part in _RELATION.split(text)]
    less = [sign in ("<", "\\le") for sign in signs]
    closed = [sign in ("\\le", "\\ge") for sign in signs]
    if len(set(less)) > 1 or not all(parts):
        return None
    if not less[0]:
        parts, closed = parts[::-1], closed[::-1]
    variable = 1 if len(parts) == 3 else next((i for i in (0, 1) if _is_variable(parts[i])), -1)
    if (
        variable < 0
        or not _is_variable(parts[variable])
        or any(_is_variable(part) for i, part in enumerate(parts) if i != variable)
    ):
        return None
    if len(parts) == 3:
        return Sequence("[" if closed[0] else "(", (parts[0], parts[2]), "]" if closed[1] else ")")
    if variable == 0:
        return Sequence("(", ("-\\infty", parts[1]), "]" if closed[0] else ")")
    return Sequence("[" if closed[0] else "(", (parts[0], "\\infty"), ")")


def _is_variable(text: str) -> bool:
    return bool(_VARIABLE.fullmatch(text)) and text not in _CONSTANTS and text != "\\infty"


# ---------------------------------------------------------------- unions and matrices


def _same_union(gold: str, pred: str, leaf: Leaf, depth: int) -> _Verdict:
    """Equal parts in any order; other ways to write a union are for sympy."""
    a, b = _union_parts(gold), _union_parts(pred)
    if len(a) == len(b) == 1:
        return False, None
    if max(len(a), len(b)) > MAX_ITEMS or any(sequence(part) is None for part in a + b):
        return True, None
    same = _same_members(a, b, lambda x, y: same_structure(x, y, leaf, depth + 1))
    return True, same or None


def _union_parts(text: str) -> tuple[str, ...]:
    r"""Of "(1,2) \cup (3,4)" and of "x < 1 or x > 2"; a text without either is its own part."""
    parts = _UNION.split(text)
    if len(parts) == 1 and " or " in text and _RELATION.search(text):
        parts = text.split(" or ")
    return tuple(part.strip() for part in parts)


def _same_matrix(gold: str, pred: str, leaf: Leaf, depth: int) -> _Verdict:
    a, b = matrix(gold), matrix(pred)
    if a is None and b is None:
        return False, None
    if a is None or b is None:
        return True, None
    if [len(row) for row in a] != [len(row) for row in b]:
        return True, False
    cells = [(x, y) for row, other in zip(a, b) for x, y in zip(row, other)]
    if len(cells) > MAX_ITEMS:
        return True, None
    verdicts = [same_structure(x, y, leaf, depth + 1) for x, y in cells]
    return True, False if False in verdicts else None if None in verdicts else True


def matrix(text: str) -> list[list[str]] | None:
    """Rows of a text that is one matrix or column vector."""
    match = _MATRIX.fullmatch(text)
    if not match:
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _compact(text: str) -> str:
    return re.sub(r"[\s{}]", "", text)
