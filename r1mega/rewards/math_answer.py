"""Is this the reference answer? Three stages, each only when the one before cannot tell:

1. equal text after normalisation (math_normal.py);
2. exact numbers and lists of them, as fractions (math_quantity.py, math_structure.py): 1/3 is not 0.3333;
3. expressions by value, then sympy, in a killable process (math_symbolic.py).

Stages 1 and 2 live here, use the standard library alone, cost microseconds and are bounded by MAX_ANSWER
characters, so they run inside the scoring process. Departure from the paper: it says only that
answers are matched by rules; the rules are ours.

Verdicts: equal | unequal | unparsable | timeout | too_long (here and in the workers), and missing |
truncated | memory | fault (terms.py, workers.py).
"""

from __future__ import annotations

import re

from r1mega.rewards.math_extraction import answer_block, boxed, extract_answer
from r1mega.rewards.math_normal import has_delimiters, is_prose, normalised
from r1mega.rewards.math_quantity import Quantity, quantity, same_quantity
from r1mega.rewards.math_structure import Leaf, same_structure

__all__ = ["MAX_ANSWER", "answer_block", "boxed", "extract_answer", "normalised", "quantity", "quick_compare"]

MAX_ANSWER = 4000
"""Characters; a longer answer is not compared but called too_long."""

_PLAIN_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
"""A space that does not stand between two digits."""
_DIGIT_GROUPS = re.compile(r"\d+(?: \d+)+")
_CLOCK = re.compile(r"(\d+(?:\s*:\s*\d+)+|\d{1,2}(?=\s*[aApP]\.?\s?[mM]))\s*([aApP])?(?:\.?\s?[mM]\.?)?")
_CHOICE = re.compile(r"\(?\s*([A-Ja-j])\s*\)?[.:]?")
_CHOICES = re.compile(r"[A-Z](?:(?:\s?,\s?|\s?,?\s?and\s)?[A-Z])+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+[A-Za-z]")
_SHORT_WORDS = frozenset(["yes", "no", "true", "false", "none"])
_LONG_WORD = re.compile(r"[A-Za-z]{3}")


def quick_compare(gold: str, pred: str) -> str | None:
    """ "equal", "unequal", "unparsable" or "too_long" where text and exact arithmetic can tell; None where not.

    `gold` and `pred` are final answers, with or without maths delimiters or \\boxed{}.
    """
    if len(gold) > MAX_ANSWER or len(pred) > MAX_ANSWER:
        return "too_long"
    if _PLAIN_INTEGER.fullmatch(gold) and _PLAIN_INTEGER.fullmatch(pred):
        return "equal" if int(gold) == int(pred) else "unequal"
    gold, pred = normalised(gold), normalised(pred)
    if gold != pred and any(has_delimiters(text) or is_prose(text) for text in (gold, pred)):
        return None if pred else "unparsable"
    verdict = compare_normalised(gold, pred, QUANTITIES)
    return verdict if isinstance(verdict, str) or verdict is None else "equal" if verdict else "unequal"


def compare_normalised(gold: str, pred: str, leaf: Leaf) -> bool | str | None:
    """The rules for text, then the parts by `leaf`; "unparsable" without a prediction."""
    if not pred:
        return "unparsable"
    if _SPACE.sub("", gold) == _SPACE.sub("", pred):
        return True
    for same in (_same_digit_groups, _same_clock, _same_choice, _same_words):
        verdict = same(gold, pred)
        if verdict is not None:
            return verdict
    return same_structure(gold, pred, leaf)


def _same_quantities(a: Quantity, b: Quantity) -> bool | None:
    if a.name and b.name and a.name != b.name:
        return None
    return same_quantity(a, b)


QUANTITIES = Leaf(quantity, _same_quantities)


def _same_digit_groups(gold: str, pred: str) -> bool | None:
    """Digits apart are no number: "1 2" is not 12."""
    return False if any(_DIGIT_GROUPS.fullmatch(t) and not quantity(t) for t in (gold, pred)) else None


def _same_clock(gold: str, pred: str) -> bool | None:
    """Times and ratios of numbers equal only themselves: 12:00 is not 1:00, 12:30 is not 12.5."""
    a, b = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(pred)
    if a and b:
        first, second = ([part.strip().lstrip("0") for part in t[1].split(":")] for t in (a, b))
        if a[2] and b[2]:  # 6 pm is 6:00 pm
            first, second = (
                parts + [""] * (len(other) - len(parts))
                for parts, other in ((first, second), (second, first))
            )
        halves = {(t[2] or "").lower() for t in (a, b)}
        return first == second and not halves >= {"a", "p"}
    if a or b:
        return False if quantity(gold) or quantity(pred) else None
    return None


def _same_choice(gold: str, pred: str) -> bool | None:
    """Letters of multiple choice, in brackets or not, one or several."""
    a, b = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(pred)
    if a and b:
        return a[1].casefold() == b[1].casefold()
    if _CHOICES.fullmatch(gold) and _CHOICES.fullmatch(pred) and ("," in gold or "," in pred):
        return set(re.findall("[A-Z]", gold)) == set(re.findall("[A-Z]", pred))
    return None


def _same_words(gold: str, pred: str) -> bool | None:
    """Names and words, apart from case; letters that may be a product of variables are left to sympy."""
    a, b = gold.casefold(), pred.casefold()
    if {a, b} <= _SHORT_WORDS:
        return a == b
    if not (_WORDS.fullmatch(gold) and _WORDS.fullmatch(pred)) or not (
        _LONG_WORD.search(gold) and _LONG_WORD.search(pred)
    ):
        return None
    if a == b:
        return True
    return None if sorted(a) == sorted(b) else False
