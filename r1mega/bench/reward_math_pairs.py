"""Labelled answer pairs by construction: reference answers rewritten (equal) and perturbed (unequal).

Each kind takes a reference answer in LaTeX and returns another text, or None where it does not apply. What a rewrite
says is the same answer to any reader; what a perturbation says is another one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Pair:
    gold: str
    pred: str
    equal: bool
    kind: str


Kind = Callable[[str, random.Random], str | None]

_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
_DECIMAL = re.compile(r"-?\d*\.\d+")
_TERMS = re.compile(r"(?<![\^{(\[])(?=[+-])")
_GROUPED = re.compile(r"(?:\\\$)?\s?\d{1,3}(?:(?:,|\{,\}|\\!,|,\\!\s?)\d{3})+")
_PAIR = re.compile(r"(\\left)?([(\[])(.+?),(.+?)(\\right)?([)\]])")
_LETTER = re.compile(r"\\text\{\(?([A-E])\)?\}|([A-E])")


def _integer(make: Callable[[int, random.Random], str | None]) -> Kind:
    return lambda gold, rng: make(int(gold), rng) if _INTEGER.fullmatch(gold) else None


def _fraction(make: Callable[[str, int, int, random.Random], str | None]) -> Kind:
    def kind(gold: str, rng: random.Random) -> str | None:
        match = _FRACTION.fullmatch(gold)
        return make(match[1], int(match[2]), int(match[3]), rng) if match else None

    return kind


def _grouped(separator: str) -> Kind:
    return _integer(lambda n, rng: f"{n:,}".replace(",", separator) if abs(n) >= 1000 else None)


def _with_degrees(replacement: str) -> Kind:
    def kind(gold: str, rng: random.Random) -> str | None:
        if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", gold):
            return None
        new = re.sub(r"\^\{?\\circ\}?", lambda _: replacement, gold)
        return new if new != gold else None

    return kind


def _replaced(pattern: str, replacement: str) -> Kind:
    def kind(gold: str, rng: random.Random) -> str | None:
        new = re.sub(pattern, replacement, gold)
        return new if new != gold else None

    return kind


def _mixed(sign: str, top: int, bottom: int, rng: random.Random) -> str | None:
    if top <= bottom or top % bottom == 0:
        return None
    return rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"


def _finite_decimal(sign: str, top: int, bottom: int, rng: random.Random) -> str | None:
    value = Fraction(top, bottom)
    for digits in range(1, 8):
        if value * 10**digits % 1 == 0:
            return f"{sign}{top / bottom:.{digits}f}"
    return None


def _rounded(sign: str, top: int, bottom: int, rng: random.Random) -> str | None:
    digits = rng.randint(1, 6)
    text = f"{top / bottom:.{digits}f}"
    return sign + text if Fraction(text) != Fraction(top, bottom) else None


def _top_level_terms(gold: str) -> list[str] | None:
    """The terms of a sum without brackets; None for anything else."""
    if re.search(r"[()\[\],=<>|]|\\(?:text|mbox|in|cup|pm|begin|\{|left)", gold):
        return None
    terms, depth, start = [], 0, 0
    for position, character in enumerate(gold):
        depth += (character == "{") - (character == "}")
        if character in "+-" and depth == 0 and gold[start:position].strip():
            terms.append(gold[start:position].strip())
            start = position
    terms.append(gold[start:].strip())
    return terms if len(terms) > 1 else None


def _reordered(gold: str, rng: random.Random) -> str | None:
    terms = _top_level_terms(gold)
    if terms is None:
        return None
    signed = [term if term[0] in "+-" else "+" + term for term in reversed(terms)]
    return "".join(signed).removeprefix("+")


def _list_items(gold: str) -> list[str] | None:
    if re.search(r"[()\[\]=]|\\(?:text|begin|cup|mbox)", gold) or _GROUPED.fullmatch(gold):
        return None
    inner = gold.removeprefix("\\{").removesuffix("\\}")
    items = [item.strip() for item in re.split(r",(?!\\!)", inner)]
    return items if len(items) > 1 and len(set(items)) == len(items) else None


def _other_order(gold: str, rng: random.Random) -> str | None:
    items = _list_items(gold)
    if items is None:
        return None
    new = ", ".join(reversed(items))
    return f"\\{{{new}\\}}" if gold.startswith("\\{") else new


def _is_value(gold: str) -> bool:
    """A single number or expression, to which signs, factors and units can be put."""
    return not re.search(
        r"[,=<>_|%$]|\\(?:text|mbox|in|cup|pm|begin|circ|\{|%|\$|approx|infty)", gold
    ) and not re.search(r"[()\[\]]", gold)


def _number_like(gold: str) -> bool:
    return (
        _is_value(gold)
        and not re.search(r"(?<![\\a-z])[a-zA-Z](?![a-z])", gold)
        and bool(re.search(r"\d|pi", gold))
    )


def _swapped(gold: str, rng: random.Random) -> str | None:
    match = _PAIR.fullmatch(gold)
    if not match or "," in match[4] or match[3].strip() == match[4].strip() or "\\cup" in gold:
        return None
    return f"{match[2]}{match[4].strip()}, {match[3].strip()}{match[6]}"


def _other_bracket(gold: str, rng: random.Random) -> str | None:
    match = _PAIR.fullmatch(gold)
    if not match or "," in match[4] or "\\cup" in gold:
        return None
    other = {"(": "[", "[": "("}[match[2]]
    return f"{other}{match[3]},{match[4]}{match[6] if 'infty' in match[4] else {'(': ')', '[': ']'}[other]}"


def _root_of_square(n: int, rng: random.Random) -> str | None:
    return rf"\sqrt{{{n * n}}}" if 1 < n < 10**6 else None


def _changed_sign(gold: str, rng: random.Random) -> str | None:
    terms = _top_level_terms(gold)
    if terms is None or terms[-1][0] != "+":
        return None
    return gold[: gold.rindex("+")] + "-" + gold[gold.rindex("+") + 1 :] if gold.count("+") == 1 else None


def _next_radicand(gold: str, rng: random.Random) -> str | None:
    match = re.search(r"\\sqrt\{(\d+)\}", gold)
    return gold[: match.start(1)] + str(int(match[1]) + 1) + gold[match.end(1) :] if match else None


def _other_letter(gold: str, rng: random.Random) -> str | None:
    match = _LETTER.fullmatch(gold)
    if not match:
        return None
    letter = match[1] or match[2]
    return rf"\text{{{rng.choice([x for x in 'ABCDEZ' if x != letter])}}}"


def _next_digit(gold: str, rng: random.Random) -> str | None:
    """One digit of anything made one larger."""
    places = [m.start() for m in re.finditer(r"\d", gold)]
    if not places:
        return None
    place = rng.choice(places)
    return gold[:place] + str((int(gold[place]) + 1) % 10) + gold[place + 1 :]


REWRITES: dict[str, Kind] = {
    "same": lambda gold, rng: gold,
    "boxed": lambda gold, rng: rf"\boxed{{{gold}}}",
    "dollar+dot": lambda gold, rng: f"${gold}$.",
    "spaces": lambda gold, rng: " " + re.sub(r",(?!\\!|\d{3})", " , ", gold) + " ",
    "dfrac": _replaced(r"\\frac", r"\\dfrac"),
    "tfrac": _replaced(r"\\frac", r"\\tfrac"),
    "frac short": _replaced(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2"),
    "slash": _fraction(lambda s, a, b, rng: f"{s}{a}/{b}"),
    "div": _fraction(lambda s, a, b, rng: rf"{s}{a} \div {b}"),
    "unreduced": _fraction(lambda s, a, b, rng: rf"{s}\frac{{{3 * a}}}{{{3 * b}}}"),
    "unreduced integer": _integer(lambda n, rng: rf"\frac{{{2 * n}}}{{2}}"),
    "sign in num": _fraction(lambda s, a, b, rng: rf"\frac{{{s}{a}}}{{{b}}}"),
    "sign in den": _fraction(lambda s, a, b, rng: rf"\frac{{{a}}}{{{s}{b}}}" if s else None),
    "mixed number": _fraction(_mixed),
    "decimal": _fraction(_finite_decimal),
    "float": _integer(lambda n, rng: f"{n}.0"),
    "plus": _integer(lambda n, rng: f"+{n}" if n > 0 else None),
    "pow1": _integer(lambda n, rng: f"{n}^1" if n > 0 else None),
    "sqrt": _integer(_root_of_square),
    "sum": _integer(lambda n, rng: f"{n + 3}-3"),
    "product": _integer(lambda n, rng: rf"{n} \cdot 7 / 7" if n > 0 else None),
    "scientific": _integer(lambda n, rng: rf"{n / 1000:.3f} \times 10^{{3}}" if abs(n) > 999 else None),
    "unicode minus": _replaced("^-", "\u2212"),
    "full width": _integer(lambda n, rng: str(n).translate({48 + i: 0xFF10 + i for i in range(10)})),
    "thousands": _grouped(","),
    "latex thousands": _grouped("{,}"),
    "thin-space thousands": _grouped("\\!,"),
    "other thin-space thousands": _grouped(",\\!"),
    "unicode thin space": _grouped("\u202f"),
    "x=": lambda gold, rng: f"x = {gold}" if _number_like(gold) else None,
    "times one": lambda gold, rng: rf"1\cdot {gold}" if _number_like(gold) and gold[0] not in "+-" else None,
    "plus zero": lambda gold, rng: f"{gold} + 0" if _number_like(gold) else None,
    "unit": lambda gold, rng: rf"{gold}\text{{ units}}" if _number_like(gold) else None,
    "words after": lambda gold, rng: rf"{gold} \text{{ apples}}" if _INTEGER.fullmatch(gold) else None,
    "reordered terms": _reordered,
    "set order": _other_order,
    "and": lambda gold, rng: " and ".join(items) if (items := _list_items(gold)) and len(items) == 2 else None,
    "left right": lambda gold, rng: rf"\left{gold[0]}{gold[1:-1]}\right{gold[-1]}" if _PAIR.fullmatch(gold) else None,
    "no left/right": _replaced(r"\\left|\\right", ""),
    "no text": _replaced(r"\\text\{([^{}]*)\}", r"\1"),
    "mathrm": _replaced(r"\\text\{", r"\\mathrm{"),
    "textbf": _replaced(r"\\text\{", r"\\textbf{"),
    "no degree": _with_degrees(""),
    "unicode degree": _with_degrees("°"),
    "circ braces": _with_degrees(r"^{\circ}"),
    "degrees": _with_degrees(r"\text{ degrees}"),
    "pmatrix to bmatrix": _replaced("pmatrix", "bmatrix"),
    "spaces in matrix": _replaced(" & ", "&"),
    "no dollar": _replaced(r"\\\$ ?", ""),
    "percent word": _replaced(r"\\%", " percent"),
    "unicode pi": _replaced(r"\\pi(?![a-z])", "π"),
    "unicode root": _replaced(r"\\sqrt\{(\d+)\}", r"√\1"),
    "unicode infinity": _replaced(r"\\infty", "∞"),
    "plain root": _replaced(r"\\sqrt\{(\d+)\}", r"sqrt(\1)"),
}  # fmt: skip
"""kind -> the same answer in other words."""

PERTURBATIONS: dict[str, Kind] = {
    "neg:+1": lambda gold, rng: (
        str(int(gold) + 1) if _INTEGER.fullmatch(gold) else
        rf"{m[1]}\frac{{{int(m[2]) + int(m[3])}}}{{{m[3]}}}" if (m := _FRACTION.fullmatch(gold)) else None),
    "neg:sign": lambda gold, rng: (
        (gold[1:] if gold[0] == "-" else "-" + gold)
        if _number_like(gold) and _top_level_terms(gold) is None and gold != "0" else None),
    "neg:inverse": _fraction(lambda s, a, b, rng: rf"{s}\frac{{{b}}}{{{a}}}" if a != b and a else None),
    "neg:rounded": _fraction(_rounded),
    "neg:times ten": _integer(lambda n, rng: f"{n}0" if n else None),
    "neg:thousandth": _integer(lambda n, rng: f"{n},5" if abs(n) < 100 else None),
    "neg:plus->minus": _changed_sign,
    "neg:radicand+1": _next_radicand,
    "neg:swapped pair": _swapped,
    "neg:other bracket": _other_bracket,
    "neg:other letter": _other_letter,
    "neg:one digit": lambda gold, rng: (
        _next_digit(gold, rng) if _number_like(gold) and not re.search(r"\^\{?0|(?<![\d.])0\^|\\sqrt\[", gold) else None),
    "neg:one more": lambda gold, rng: f"{gold}, {rng.randint(5000, 9000)}" if _list_items(gold) else None,
    "neg:alternatives": lambda gold, rng: f"{gold} or {rng.randint(5000, 9000)}" if _INTEGER.fullmatch(gold) else None,
    "neg:variable": lambda gold, rng: f"{gold}z" if _INTEGER.fullmatch(gold) and gold != "0" else None,
    "neg:other unit": lambda gold, rng: rf"{gold[:-3]}m}}" if gold.endswith("{ cm}") else None,
    "neg:word": lambda gold, rng: r"\text{zebra}" if re.fullmatch(r"\\text\{[a-zA-Z]{3,}\}", gold) else None,
}  # fmt: skip
"""kind -> another answer."""


def generated_pairs(golds: Iterable[str], seed: int) -> Iterator[Pair]:
    """Every kind that applies to each reference answer; the same for the same seed."""
    rng = random.Random(seed)
    for gold in golds:
        for kinds, equal in ((REWRITES, True), (PERTURBATIONS, False)):
            for kind, make in kinds.items():
                pred = make(gold, rng)
                if pred is not None:
                    yield Pair(gold, pred, equal, kind)


def invented_golds(count: int, seed: int) -> list[str]:
    """Reference answers of the shapes that occur in MATH and GSM8K, where neither is at hand."""
    rng = random.Random(seed)

    def n(low: int = 1, high: int = 99) -> int:
        return rng.randint(low, high)

    shapes: list[Callable[[], str]] = [
        lambda: str(n(-500, 99999)),
        lambda: str(n()),
        lambda: rf"\left( {n()}, {n(100, 200)} \right)",
        lambda: rf"\frac{{{n()}}}{{{n(2)}}}",
        lambda: rf"-\frac{{{n(1, 9)}}}{{{n(2, 9)}}}",
        lambda: rf"{n()}\sqrt{{{n(2, 30)}}}",
        lambda: rf"{n()} + {n()}\sqrt{{{n(2, 30)}}}",
        lambda: rf"{n()}\pi",
        lambda: rf"{n()}^\circ",
        lambda: rf"({n(-9, 9)},{n(10, 30)})",
        lambda: rf"[{n(-9, 9)},\infty)",
        lambda: rf"x^2 + {n()}x - {n()}",
        lambda: rf"{n()}+{n()}i",
        lambda: rf"{n(1, 30)}, {n(31, 60)}",
        lambda: rf"\text{{({rng.choice('ABCDE')})}}",
        lambda: rf"{n()}\%",
        lambda: rf"\begin{{pmatrix}} {n()} & {n()} \\ {n()} & {n()} \end{{pmatrix}}",
    ]
    return [rng.choice(shapes)() for _ in range(count)]
