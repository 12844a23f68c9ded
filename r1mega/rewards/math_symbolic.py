"""The slow stage of math answers: expressions by value, then sympy through math-verify. Runs in killable workers.

Nothing here limits time or memory: sympy may think for ever about `9^{9^{9^9}}`, and the parent process
(workers.py) ends it. math-verify's own time-outs are off because they need SIGALRM in a main thread.
Departures from math-verify: answers are compared by value first (math_expression.py), which is exact and a hundred
times faster; Unicode is rewritten; decimals are compared to 12 digits and not to 6; inequalities equal intervals.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import math_verify
import sympy

from r1mega.rewards import math_expression
from r1mega.rewards.math_answer import MAX_ANSWER, compare_normalised
from r1mega.rewards.math_expression import Node, Unsupported
from r1mega.rewards.math_extraction import BOXED, boxed_answer
from r1mega.rewards.math_normal import has_delimiters, is_prose, normalised, plain_unicode
from r1mega.rewards.math_quantity import (
    DIMENSIONS,
    UNIT_TEXT,
    Quantity,
    Unit,
    quantity,
    same_quantity,
    unit_of,
)
from r1mega.rewards.math_structure import Leaf

FLOAT_DIGITS = 12
WINDOW = 800
"""Characters kept on either side of the last \\boxed{ of a text that is too long."""
EVALUATED_DIGITS = 30
"""Numbers that differ in the first half of these digits are not tried symbolically."""
MAX_NESTING = 40
"""Brackets open at once; the parser's time grows steeply with them and no answer needs so many."""
_OVERLINE = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_BROKEN_INLINE = re.compile(
    r"(?<![$\\])\$(?!\$)[^$]*\n[^$]*\$(?!\$)|\\\((?:[^\\]|\\(?!\)))*\n(?:[^\\]|\\(?!\)))*\\\)"
)


def compare(gold: str, pred: str) -> str:
    """Verdict on two final answers: equal | unequal | unparsable | too_long.

    Either may be bare ("3,5"), delimited ("$3$") or a sentence that holds the answer in $...$ or \\boxed{}.
    """
    gold, pred = _tail(gold), _tail(pred)
    if len(gold) > MAX_ANSWER or len(pred) > MAX_ANSWER:
        return "too_long"
    by_value = _compare_by_value(gold, pred)
    if by_value is not None:
        return by_value
    if max(_nesting(gold), _nesting(pred)) > MAX_NESTING:
        return "unparsable"
    gold_values, pred_values = _parsed(gold), _parsed(pred)
    if not pred_values or not gold_values:
        return "unparsable"
    if _verified(gold_values, pred_values) or _same_number(gold_values, pred_values):
        return "equal"
    if all(isinstance(value, str) for value in pred_values):
        return "unequal" if all(isinstance(value, str) for value in gold_values) else "unparsable"
    return "unequal"


def warm_up() -> None:
    """Runs the parser over the grammar once: what it learns is shared by every worker forked later."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text in _WARM_UP:
        for value in _parsed(text):
            assert _verified([value], [value]), text
    assert compare(r"\frac{\sqrt{2}}{2}", r"\sqrt{\frac{1}{2}}") == "equal"


_WARM_UP = (
    r"$\frac{\sqrt{2}}{2}$", r"$(1, 2] \cup [3, \infty)$", r"$\{1, 2, x\}$", r"$x^2+2x-1=0$", r"$0 \le x < 5$",
    r"$\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$", r"$x=1, y=\sin(x)+\log_2 8$", r"$1 \pm \sqrt[3]{5}$",
    r"$12\%$", r"$3\pi + 2i$", r"$\binom{5}{2}$", r"$f(x) = e^{-x}|x|$", "so the answer is 1,000.5", r"\boxed{\text{east}}",
    r"$\sum_{k=0}^{n} a_k x^k$", r"$\int_0^1 x dx$", r"$\lim_{x \to 0} x$", r"$10^{-3} \cdot 5!$", r"$x \ne 5$",
)  # fmt: skip


# ---------------------------------------------------------------- by value


@dataclass(frozen=True)
class _Answer:
    """One answer without structure: its exact quantity, its tree, its base, as far as they exist."""

    exact: Quantity | None
    tree: Node | None
    unit: Unit
    digits_in_base: str = ""


_TRAILING_UNIT = re.compile(rf"(.*[\d}})a-z\]])\s+({UNIT_TEXT})", re.DOTALL)
_IN_BASE = re.compile(r"-?[\dA-F]+_\{?\d{1,2}\}?")


def _compare_by_value(gold: str, pred: str) -> str | None:
    """The verdict of text, structure and values; None where sympy must, or where prose hides the answer.

    What stands in the last box of a sentence may be shown equal here, but not unequal: which part of a sentence is
    the answer is for math-verify to say.
    """
    if normalised(gold) == normalised(pred):
        return "equal"
    gold_core, pred_core = _core(gold), _core(pred)
    if gold_core is None or pred_core is None:
        return "unparsable" if pred_core is None and _hides_answer(pred) else None
    verdict = compare_normalised(gold_core, pred_core, EXPRESSIONS)
    if verdict is None and "=" in gold_core and "=" in pred_core:
        verdict = _same_equation(gold_core, pred_core)
    elif verdict is None and ("=" in gold_core or "=" in pred_core):
        verdict = _equation_beside_number(gold_core, pred_core)
    if verdict is False and (_is_sentence(gold) or _is_sentence(pred)):
        return None
    return verdict if isinstance(verdict, str) or verdict is None else "equal" if verdict else "unequal"


@lru_cache(maxsize=256)
def _core(text: str) -> str | None:
    """The one final answer in a text, normalised; None for prose without a box."""
    core = normalised(text)
    if BOXED.search(core):
        content = boxed_answer(core)
        return None if content is None else normalised(content)
    return None if has_delimiters(core) or is_prose(core) else _without_periods(core)


def _is_sentence(text: str) -> bool:
    core = normalised(text)
    return bool(BOXED.search(core)) or has_delimiters(core)


def _hides_answer(text: str) -> bool:
    """Its only mathematics is inline and runs over the end of its line, where no inline mathematics goes."""
    return (
        not BOXED.search(text)
        and not has_delimiters(_BROKEN_INLINE.sub("", text))
        and bool(_BROKEN_INLINE.search(text))
    )


@lru_cache(maxsize=512)
def _read(text: str) -> _Answer | None:
    if _IN_BASE.fullmatch(text):
        return _Answer(None, None, Unit(), re.sub("[{}]", "", text))
    exact = quantity(text)
    if exact is not None and (exact.unit or exact.percent):
        return _Answer(exact, None, Unit(exact.unit, exact.size))
    unit = Unit()
    match = None if exact is not None else _TRAILING_UNIT.fullmatch(text)
    found = unit_of(match[2]) if match else None
    angle = found is not None and found.dimension == "degrees" and math_expression.has_function(text)
    if match and found and found.multiplier == 1 and found.dimension != "%" and not angle:
        text, unit = match[1], found
    try:
        return _Answer(exact, math_expression.read(text), unit)
    except Unsupported:
        return None if exact is None else _Answer(exact, None, unit)


def _same_answer(a: _Answer, b: _Answer) -> bool | None:
    if a.digits_in_base or b.digits_in_base:
        return a.digits_in_base == b.digits_in_base if a.digits_in_base and b.digits_in_base else None
    if a.exact is not None and b.exact is not None:
        return same_quantity(a.exact, b.exact)
    if a.unit.dimension and b.unit.dimension and a.unit != b.unit:
        return False if {a.unit.dimension, b.unit.dimension} <= DIMENSIONS else None
    trees = [_tree_of(one) for one in (a, b)]
    if trees[0] is None or trees[1] is None:
        return None
    try:
        return math_expression.same_expression(trees[0], trees[1])
    except Unsupported:
        return None


def _tree_of(answer: _Answer) -> Node | None:
    if answer.tree is None and answer.exact is not None and not answer.exact.percent:
        return Node("number", (answer.exact.value,))
    return answer.tree


EXPRESSIONS = Leaf(_read, _same_answer)


def _same_equation(gold: str, pred: str) -> bool | None:
    """True for multiples of one another; never False, because equations have other ways to be the same."""
    sides = [text.split("=") for text in (gold, pred)]
    if any(len(pair) != 2 for pair in sides):
        return None
    try:
        first, second = ((math_expression.read(left), math_expression.read(right)) for left, right in sides)
        return math_expression.same_equation(first, second) or None
    except Unsupported:
        return None


def _equation_beside_number(gold: str, pred: str) -> bool | None:
    """False for "x + z = 2" beside "2": an equation of several terms is no name for its right side."""
    equation, number = (gold, pred) if "=" in gold else (pred, gold)
    left, _, right = equation.partition("=")
    try:
        trees = [math_expression.read(text) for text in (left, right, number)]
    except Unsupported:
        return None
    has_letters = [bool(math_expression.letters(tree)) for tree in trees]
    return False if has_letters == [True, False, False] and trees[0].op != "letter" else None


def _without_periods(text: str) -> str:
    return _OVERLINE.sub(_periodic, text)


# ---------------------------------------------------------------- by sympy


def _parsed(text: str) -> list[Any]:
    """math-verify's reading: sympy objects, and the text as the last resort; empty where it finds nothing."""
    text = _without_periods(plain_unicode(text))
    if not has_delimiters(text) and not is_prose(text):
        text = rf"\boxed{{{normalised(text)}}}".replace(" degrees", r"^\circ")
    return list(math_verify.parse(text, parsing_timeout=None))


def _verified(gold_values: list[Any], pred_values: list[Any]) -> bool:
    return bool(
        math_verify.verify(
            gold_values,
            pred_values,
            float_rounding=FLOAT_DIGITS,
            timeout_seconds=None,
            allow_set_relation_comp=True,
        )
    )


def _same_number(gold_values: list[Any], pred_values: list[Any]) -> bool:
    """Both are closed expressions of the same complex number (i and e read as constants)."""
    a, b = gold_values[0], pred_values[0]
    if not all(isinstance(x, sympy.Expr) and not isinstance(x, sympy.MatrixExpr) for x in (a, b)):
        return False
    try:
        a, b = _with_constants(a).doit(), _with_constants(b).doit()
        if a.free_symbols or b.free_symbols or a.has(sympy.Float) or b.has(sympy.Float):
            return False
        if abs((a - b).evalf(EVALUATED_DIGITS)) > 10.0 ** -(EVALUATED_DIGITS // 2):
            return False
        return bool((a - b).equals(0))
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False  # what sympy raises on expressions that mean nothing: not shown to be equal


def _with_constants(expression: Any) -> Any:
    constants = {"i": sympy.I, "e": sympy.E}
    return expression.subs({s: constants[s.name] for s in expression.free_symbols if s.name in constants})


def _periodic(match: re.Match[str]) -> str:
    """0.1\\overline{6} as the fraction it is."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    top = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _tail(text: str) -> str:
    """The surroundings of the last box of a long text (a whole solution); else the text."""
    if len(text) <= MAX_ANSWER:
        return text
    starts = [match.start() for match in BOXED.finditer(text)]
    return text[max(0, starts[-1] - WINDOW) : starts[-1] + WINDOW] if starts else text


def _nesting(text: str) -> int:
    """The most brackets open at once (a closing one too many is not counted)."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest
