"""The slow stage of math answers: sympy, through math-verify. Runs only inside killable workers.

Nothing here limits time or memory: sympy may think for ever about `9^{9^{9^9}}`, and the parent process
(workers.py) ends it. math-verify's own time-outs are off because they need SIGALRM in a main thread.
Departures from math-verify: Unicode is rewritten first, decimals are compared to 12 digits and not to 6,
inequalities equal intervals, and complex or periodic numbers are compared exactly.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from r1mega.rewards.math_answer import BOXED, MAX_ANSWER, normalised, plain_unicode, quick_compare

FLOAT_DIGITS = 12
WINDOW = 800
"""Characters kept on either side of the last \\boxed{ of a text that is too long."""
PROSE_WORDS = 3
EVALUATED_DIGITS = 30
"""Numbers that differ in the first half of these digits are not tried symbolically."""
MAX_NESTING = 40
"""Brackets open at once; the parser's time grows steeply with them and no answer needs so many."""
_WORD = re.compile(r"[^\W\d_]{2,}")
_OVERLINE = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")


def compare(gold: str, pred: str) -> str:
    """Verdict on two final answers: equal | unequal | unparsable | too_long.

    Either may be bare ("3,5"), delimited ("$3$") or a sentence that holds the answer in $...$ or \\boxed{}.
    """
    gold, pred = _tail(gold), _tail(pred)
    quick = quick_compare(gold, pred)
    if quick is not None:
        return quick
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
    """Imports everything and runs the parser once, so that the first answer costs no more than the others."""
    assert compare(r"\frac{\sqrt{2}}{2}", r"\sqrt{\frac{1}{2}}") == "equal"


def _parsed(text: str) -> list[Any]:
    """math-verify's reading: sympy objects, and the text as the last resort; empty where it finds nothing."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    text = _OVERLINE.sub(_periodic, plain_unicode(text))
    if not _has_delimiters(text) and not _is_prose(text):
        text = rf"\boxed{{{normalised(text)}}}"
    return list(parse(text, parsing_timeout=None))


def _verified(gold_values: list[Any], pred_values: list[Any]) -> bool:
    from math_verify import verify

    return bool(
        verify(
            gold_values,
            pred_values,
            float_rounding=FLOAT_DIGITS,
            timeout_seconds=None,
            allow_set_relation_comp=True,
        )
    )


def _same_number(gold_values: list[Any], pred_values: list[Any]) -> bool:
    """Both are closed expressions of the same complex number (i and e read as constants)."""
    import sympy

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
    import sympy

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


def _has_delimiters(text: str) -> bool:
    return bool(BOXED.search(text) or "$" in text or "\\(" in text or "\\[" in text)


def _is_prose(text: str) -> bool:
    return "\\" not in text and len(_WORD.findall(text)) >= PROSE_WORDS
