"""Is this the reference answer? Extraction, normalisation and exact comparison of math answers.

Three stages, each only when the one before cannot tell:
1. equal text after normalisation (`normalised`);
2. exact numbers and tuples of them, as fractions (`quick_compare`): 1/3 is not 0.3333;
3. sympy, in a killable process (math_symbolic.py).

Stages 1 and 2 live here, use the standard library alone, cost microseconds and are bounded by MAX_ANSWER
characters, so they run inside the scoring process. Departure from the paper: it says only that
answers are matched by rules ("in a specified format, e.g. within a box"); the rules are ours.

Verdicts: equal | unequal | unparsable | timeout | too_long (here and in the workers), and missing |
truncated | memory | fault (scoring.py, workers.py).
"""

# ruff: noqa: RUF001  (look-alike characters are what this module is about)

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 4000
"""Characters; a longer answer is not compared but called too_long."""
MAX_LAYERS = 8
"""Delimiters around one another that are unwrapped."""
MAX_DIGITS = 400
"""Digits and exponent of numbers compared as fractions; longer ones go to sympy and its limits."""

# ---------------------------------------------------------------- extraction


def answer_block(text: str) -> str | None:
    """What stands in the last <answer>...</answer>; None without a closed block."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} or \fbox{...}, braces nested; None without one."""
    contents = all_boxed(text)
    return contents[-1] if contents else None


def all_boxed(text: str) -> list[str]:
    r"""The contents of every outermost complete \boxed{...} or \fbox{...}, in order."""
    contents, position = [], 0
    while match := BOXED.search(text, position):
        end = _closing_brace(text, match.end())
        if end < 0:
            break
        contents.append(text[match.end() : end])
        position = end + 1
    return contents


def extract_answer(response: str) -> str | None:
    r"""The final answer a response commits to; None when there is none.

    First choice is the last <answer> block; without one, the part after the last </think> counts: its last
    \boxed{}, or what follows "####". Text inside the reasoning is never taken for an answer.
    """
    block = answer_block(response)
    if block is not None:
        return block.strip() or None
    summary = response.rsplit("</think>", 1)[-1]
    if "<think>" in summary:
        return None
    content = boxed(summary)
    if content is not None:
        return content.strip() or None
    if "####" in summary:
        return summary.rsplit("####", 1)[1].strip() or None
    return None


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in _BRACE_OR_ESCAPE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1


BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)

# ---------------------------------------------------------------- normalisation

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ",
    "∙": r"\cdot ", "∗": "*", "÷": r"\div ", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "φ": r"\phi ", "√": r"\sqrt ", "′": "'", "’": "'",
    "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "\u200b": "", "\ufeff": "", "\u2062": "",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CHARACTER = re.compile("|".join(map(re.escape, _CHARACTERS)))
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_UNICODE_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))")


def plain_unicode(text: str) -> str:
    """Unicode mathematics as LaTeX: full-width digits, minus signs, vulgar fractions, exponents, roots, degrees."""
    if text.isascii():
        return text
    text = _VULGAR.sub(lambda m: _fraction_of(m[0]), text)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _UNICODE_ROOT.sub(lambda m: r"\sqrt{" + (m[1] or m[2]) + "}", text)
    text = _CHARACTER.sub(lambda m: _CHARACTERS[m[0]], text)
    return unicodedata.normalize("NFKC", text)


def _fraction_of(character: str) -> str:
    value = Fraction(unicodedata.numeric(character)).limit_denominator(10)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_REWRITES = [
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|quad|qquad)(?![a-zA-Z])"), " "),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;:> ]|~|\\thinspace(?![a-zA-Z])"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])"), " degrees"),
    (re.compile(r"\\leq(?![a-zA-Z])|\\leqslant(?![a-zA-Z])|<="), r"\\le "),
    (re.compile(r"\\geq(?![a-zA-Z])|\\geqslant(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\%|\\?\b(?:percent|pct)\b"), "%"),
    (re.compile(r"(?:US)?\\\$|\\pounds(?![a-zA-Z])|\\euro(?![a-zA-Z])|[€£¥₹]"), ""),
    (re.compile(r"\\(?:,|;|!)\s*$"), ""),
]  # fmt: skip
_FRAC_SHORT = re.compile(
    r"\\frac(?![a-zA-Z])\s*(?:([\da-z])\s*([\da-z])|\{([^{}]*)\}\s*([\da-z])|([\da-z])\s*\{([^{}]*)\})"
)
_SQRT_SHORT = re.compile(r"\\sqrt\s*(\d|[a-z](?![a-zA-Z]))")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|hbox|operatorname|rm|bf)\s*\{([^{}]*)\}"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def normalised(text: str) -> str:
    """One canonical spelling of an answer, still LaTeX; spaces collapsed to single ones.

    Unwraps maths delimiters and text commands, drops sizes, thin spaces, money signs and the final full stop,
    shortens synonyms (dfrac, leq, percent, degree signs).
    """
    text = _undelimited(plain_unicode(text))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _TEXT.sub(lambda m: f" {m[1].strip()} ", text)
    text = _FRAC_SHORT.sub(_full_frac, text)
    text = _SQRT_SHORT.sub(r"\\sqrt{\1}", text)
    text = " ".join(_undelimited(text).split())
    if text.startswith("$") and "$" not in text[1:]:
        text = text[1:]
    return text.strip(" ;")


def _full_frac(match: re.Match[str]) -> str:
    top = next(g for g in match.group(1, 3, 5) if g is not None)
    bottom = next(g for g in match.group(2, 4, 6) if g is not None)
    return rf"\frac{{{top}}}{{{bottom}}}"


def _undelimited(text: str) -> str:
    r"""Without the delimiters, the \boxed{} and the final full stop that enclose all of the text."""
    for _ in range(MAX_LAYERS):
        before = text
        text = text.strip()
        if text.endswith(".") and not text.endswith(("..", "\\.")):
            text = text[:-1].rstrip()
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            enclosed = inner and text.startswith(opening) and text.endswith(closing)
            if enclosed and opening not in inner and closing not in inner and not inner.endswith("\\"):
                text = inner
        match = BOXED.match(text)
        if match and _closing_brace(text, match.end()) == len(text) - 1:
            text = text[match.end() : -1]
        if text == before:
            break
    return text


# ---------------------------------------------------------------- exact numbers


@dataclass(frozen=True)
class Quantity:
    value: Fraction
    percent: bool
    unit: str
    """Canonical unit word, "" without one. Degrees count as none."""
    name: str
    """Left side of "x = 5", else ""."""


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<tens>[+-]?\d+)\s*\}|(?P<ten>\d))|[eE](?P<e>[+-]?\d+))"
_SIGN = r"(?P<sign>[+-]?)\s*\$?\s*"
_FRACTION = r"\\frac\s*\{\s*(?P<top>[+-]?\d+)\s*\}\s*\{\s*(?P<bottom>[+-]?\d+)\s*\}"
_NUMBER = re.compile(
    rf"(?:(?P<name>[a-zA-Z](?:_\{{?\w\}}?)?)\s*=\s*)?{_SIGN}(?:"
    rf"(?P<mixed>\d+)\s*{_FRACTION}"
    rf"|{_FRACTION.replace('top', 'top2').replace('bottom', 'bottom2')}"
    r"|(?P<mixed3>\d+)\s+(?P<top3>\d+)\s*/\s*(?P<bottom3>\d+)"
    rf"|(?P<top4>{_DECIMAL})\s*(?:/|\\div)\s*(?P<bottom4>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL}){_POWER}?"
    r")(?P<rest>\s*%|\s+[a-zA-Z][a-zA-Z .]*(?:\^\s*\{?[23]\}?)?|[a-zA-Z]{2,}\s*(?:\^\s*\{?[23]\}?)?)?\s*"
)
_UNIT_NAMES = """
cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
in inch inches
ft foot feet
yd yard yards
mi mile miles
g gram grams
kg kilogram kilograms
lb lbs pound pounds
oz ounce ounces
s sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
week weeks
month months
year years yr yrs
mph
l liter liters litre litres
ml milliliter milliliters
dollar dollars usd
cent cents
euro euros eur
yuan
radian radians rad
point points
people
cm^2 square_centimeters square_cm sq_cm
m^2 square_meters square_m sq_m
in^2 square_inches sq_in
ft^2 square_feet sq_ft
cm^3 cubic_centimeters cubic_cm
m^3 cubic_meters
in^3 cubic_inches
ft^3 cubic_feet
"""
_NO_UNIT = ("unit", "units", "degree", "degrees", "square units", "cubic units", "sq units")


def _unit_table() -> dict[str, str]:
    """Every spelling -> the first of its line; the empty unit for words that say nothing."""
    table = dict.fromkeys(_NO_UNIT, "")
    for line in _UNIT_NAMES.split("\n"):
        for name in line.split():
            table[name.replace("_", " ")] = line.split()[0]
    return table


_UNITS = _unit_table()


def quantity(text: str) -> Quantity | None:
    """An exact number with its sign, percent or unit, from normalised text; None for everything else."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    rest = re.sub(r"[{}]| (?=\^)", "", (match["rest"] or "").strip().rstrip(".").lower())
    percent = rest == "%"
    if rest and not percent and rest not in _UNITS:
        return None
    value = _value(match)
    if value is None:
        return None
    if match["sign"] == "-":
        value = -value
    return Quantity(value, percent, "" if percent else _UNITS.get(rest, ""), match["name"] or "")


def _value(match: re.Match[str]) -> Fraction | None:
    groups = match.groupdict()
    if any(g is not None and len(g) > MAX_DIGITS for g in groups.values()):
        return None

    def first(*names: str) -> str:
        return next(v for v in map(groups.get, names) if v is not None)

    if groups["decimal"] is not None:
        exponent = int(groups["tens"] or groups["ten"] or groups["e"] or 0)
        if abs(exponent) > MAX_DIGITS:
            return None
        return _decimal(groups["decimal"]) * Fraction(10) ** exponent
    if groups["top4"] is not None:
        whole, top, bottom = Fraction(0), _decimal(groups["top4"]), _decimal(groups["bottom4"])
    else:
        whole = Fraction(groups["mixed"] or groups["mixed3"] or 0)
        top, bottom = Fraction(first("top", "top2", "top3")), Fraction(first("bottom", "bottom2", "bottom3"))
    return whole + top / bottom if bottom else None


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "").replace(" ", "").rstrip(".")
    return Fraction(text or 0)


# ---------------------------------------------------------------- comparison

_PLAIN_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
"""A space that does not stand between two digits."""
_DIGIT_GROUPS = re.compile(r"\d+(?: \d+)+")
_CLOCK = re.compile(r"\d+(?:\s*:\s*\d+)+(?:\s*[aApP]\.?[mM]\.?)?")
_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?\.?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+")


def quick_compare(gold: str, pred: str) -> str | None:
    """ "equal", "unequal" or "too_long" where text and exact arithmetic can tell; None where sympy must.

    `gold` and `pred` are final answers, with or without maths delimiters or \\boxed{}.
    """
    if len(gold) > MAX_ANSWER or len(pred) > MAX_ANSWER:
        return "too_long"
    if _PLAIN_INTEGER.fullmatch(gold) and _PLAIN_INTEGER.fullmatch(pred):
        return "equal" if int(gold) == int(pred) else "unequal"
    gold, pred = normalised(gold), normalised(pred)
    if not pred:
        return "unparsable"
    if _SPACE.sub("", gold) == _SPACE.sub("", pred):
        return "equal"
    for same in (_same_quantity, _same_digit_groups, _same_clock, _same_choice, _same_sequence):
        verdict = same(gold, pred)
        if verdict is not None:
            return "equal" if verdict else "unequal"
    return None


def _same_quantity(gold: str, pred: str) -> bool | None:
    a, b = quantity(gold), quantity(pred)
    if a is None or b is None or (a.name and b.name and a.name != b.name):
        return None
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if a.percent != b.percent:
        part, other = (a.value, b.value) if a.percent else (b.value, a.value)
        return part == other or part / 100 == other
    return a.value == b.value


def _same_digit_groups(gold: str, pred: str) -> bool | None:
    """Digits apart are no number: "1 2" is not 12."""
    return False if any(_DIGIT_GROUPS.fullmatch(t) and not quantity(t) for t in (gold, pred)) else None


def _same_clock(gold: str, pred: str) -> bool | None:
    """Times and ratios of numbers equal only themselves: 12:00 is not 1:00, 12:30 is not 12.5."""
    times = [_CLOCK.fullmatch(text) for text in (gold, pred)]
    if all(times):
        first, second = ([part.lstrip("0") or "0" for part in _compact(t).split(":")] for t in (gold, pred))
        return first == second
    if any(times):
        return False if quantity(gold) or quantity(pred) else None
    return None


def _same_choice(gold: str, pred: str) -> bool | None:
    """Letters of multiple choice, in brackets or not; words apart from case."""
    a, b = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(pred)
    if a and b:
        return a[1].casefold() == b[1].casefold()
    if _WORDS.fullmatch(gold) and _WORDS.fullmatch(pred) and gold.casefold() == pred.casefold():
        return True
    return None


def _same_sequence(gold: str, pred: str) -> bool | None:
    """Points, intervals, sets and lists whose elements are all exact numbers; and brackets that contradict."""
    a, b = _bracketed(gold), _bracketed(pred)
    if a is None or b is None:
        return None
    (open_a, items_a, close_a), (open_b, items_b, close_b) = a, b
    if (open_a, close_a) != (open_b, close_b):
        pairs = len(items_a) == len(items_b) == 2 and {open_a, open_b} <= {"(", "["}
        return False if pairs else None
    values_a, values_b = [quantity(i) for i in items_a], [quantity(i) for i in items_b]
    if any(v is None or v.name or v.unit or v.percent for v in values_a + values_b):
        return None
    exact_a, exact_b = ([v.value for v in values if v is not None] for values in (values_a, values_b))
    if open_a in ("", "\\{"):
        return sorted(set(exact_a)) == sorted(set(exact_b))
    return exact_a == exact_b


def _bracketed(text: str) -> tuple[str, list[str], str] | None:
    """(opening, items, closing) of "(1, 2]", "\\{1, 2\\}" or the bare list "1, 2"; None for anything else."""
    opening = next((b for b in ("(", "[", "\\{") if text.startswith(b)), "")
    closing = next((b for b in (")", "]", "\\}") if text.endswith(b)), "")
    if bool(opening) != bool(closing) or "," not in text:
        return None
    inner = text[len(opening) : len(text) - len(closing)]
    if opening and _unbalanced(inner):
        return None
    items = _split_commas(inner)
    return (opening, items, closing) if items and (opening or len(items) > 1) else None


def _unbalanced(inner: str) -> bool:
    depth = 0
    for character in inner:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            return True
    return depth != 0


def _split_commas(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
    return [*items, text[start:].strip()]


def _compact(text: str) -> str:
    return re.sub(r"[\s.]", "", text).casefold()
