r"""One canonical spelling of an answer: Unicode to LaTeX, synonyms, delimiters, sizes, thin spaces, money.

Works on text alone, in linear time, with the standard library.
"""

# ruff: noqa: RUF001  (look-alike characters are what this module is about)

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from r1mega.rewards.math_extraction import BOXED, closing_brace

MAX_LAYERS = 8
"""Delimiters around one another that are unwrapped."""

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ",
    "∙": r"\cdot ", "∗": "*", "÷": r"\div ", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "φ": r"\phi ", "ϕ": r"\phi ", "ω": r"\omega ",
    "λ": r"\lambda ", "√": r"\sqrt ", "′": "'", "’": "'", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}",
    "“": "", "”": "", "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u2062": "",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CHARACTER = re.compile("|".join(map(re.escape, _CHARACTERS)))
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
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


_END = "(?![a-zA-Z])"
_FUNCTION_NAMES = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|gcd|det"
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(rf"\\(?:left|right|[bB]igg?[lrm]?){_END}\.?"), ""),
    (re.compile(rf"\\(?:displaystyle|textstyle|limits|nolimits|quad|qquad|rm|bf|it){_END}"), " "),
    (re.compile(r"(?<=\d)(?:,\s*\\!\s*|\\!\s*,\s*|\s*\{\s*,\s*\}\s*)(?=\d{3})"), ""),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(rf"(?<!\\)\\[,;:> ]|~|\\thinspace{_END}"), " "),
    (re.compile(rf"\^\s*\{{?\s*\\(?:circ|degree)\s*\}}?|\\(?:text)?degree{_END}"), " degrees"),
    (re.compile(rf"\\leq(?:slant)?{_END}|<=|=<"), r"\\le "),
    (re.compile(rf"\\geq(?:slant)?{_END}|>=|=>"), r"\\ge "),
    (re.compile(rf"\\neq{_END}|!="), r"\\ne "),
    (re.compile(rf"\\lt{_END}"), "<"),
    (re.compile(rf"\\gt{_END}"), ">"),
    (re.compile(r"\\%|\\?\b(?:percent|pct|percentage)\b"), "%"),
    (re.compile(rf"(?:US)?\\\$|\\pounds{_END}|\\euro{_END}|[€£¥₹]"), ""),
    (re.compile(rf"\\operatorname\s*\{{({_FUNCTION_NAMES})\}}|(?<![a-zA-Z\\])({_FUNCTION_NAMES})(?=\s*[({{\\^_\d])"), r"\\\1\2"),
    (re.compile(rf"(?<![a-zA-Z\\])(sqrt|pi){_END}"), r"\\\1"),
    (re.compile(rf"(?<![a-zA-Z\\])(?:infinity|inf|infty|oo){_END}"), r"\\infty"),
    (re.compile(rf"\\(?:varnothing|O){_END}"), r"\\emptyset"),
    (re.compile(rf"\\langle{_END}"), "("),
    (re.compile(rf"\\rangle{_END}"), ")"),
    (re.compile(rf"\\lbrace{_END}"), r"\\{"),
    (re.compile(rf"\\rbrace{_END}"), r"\\}"),
    (re.compile(r"\*\*"), "^"),
]  # fmt: skip
_MONEY = re.compile(r"(-?)\s*(?:US)?(\\\$|[€£¥₹])\s*(-?(?:[\d.,]|\\!|\{,\})+)\s*")
_CURRENCIES = {"\\$": "dollars", "€": "euros", "£": "sterling", "¥": "yen", "₹": "rupees"}
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_ARGUMENT = r"(?:\{[^{}]*\}|\d|[a-z]|\\pi)"
_FRAC_SHORT = re.compile(rf"\\frac{_END}\s*({_ARGUMENT})\s*({_ARGUMENT})|\\frac\s*(\\pi)\s*({_ARGUMENT})")
_SQRT_SHORT = re.compile(r"\\sqrt\s*(\d|[a-z](?![a-zA-Z])|\\pi)")
_SQRT_BRACKET = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|emph)"
    r"\s*\{([^{}]*)\}"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_PREFIX = re.compile(
    r"(?:\*\*)?(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*:?|:)\s*(?:\*\*)?|"
    r"(?:\\approx(?![a-zA-Z])|approximately|about|roughly)\s*",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*]+)\*\*\.?")
_WORD = re.compile(r"(?!degrees)(?<![^\W\d_])[^\W\d_]{2,}")
PROSE_WORDS = 3


def normalised(text: str) -> str:
    """One canonical spelling of an answer, still LaTeX; spaces collapsed to single ones.

    Unwraps maths delimiters and text commands, drops sizes, thin spaces, money signs and the final full stop,
    shortens synonyms (dfrac, leq, percent, degree signs).
    """
    text = undelimited(plain_unicode(text))
    if match := _BOLD.fullmatch(text):
        text = undelimited(match[1])
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _MONEY.sub(lambda m: f"{m[1]}{m[3]} {_CURRENCIES[m[2]]}", text) if _MONEY.fullmatch(text) else text
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _TEXT.sub(lambda m: f" {m[1].strip()} ", text)
    text = _FRAC_SHORT.sub(_full_frac, text)
    text = _SQRT_BRACKET.sub(r"\\sqrt{\1}", _SQRT_SHORT.sub(r"\\sqrt{\1}", text))
    text = " ".join(undelimited(text).split())
    text = text.removeprefix("$") if text.startswith("$") and "$" not in text[1:] else text
    text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    return undelimited(text.strip(" ;,"))


def has_delimiters(text: str) -> bool:
    return bool(BOXED.search(text) or "$" in text or "\\(" in text or "\\[" in text)


def is_prose(text: str) -> bool:
    """Words without LaTeX: a sentence, perhaps with a number in it."""
    return "\\" not in text and len(_WORD.findall(text)) >= PROSE_WORDS


def _full_frac(match: re.Match[str]) -> str:
    top, bottom = (part.removeprefix("{").removesuffix("}") for part in match.groups() if part is not None)
    return rf"\frac{{{top}}}{{{bottom}}}"


def undelimited(text: str) -> str:
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
        if match and closing_brace(text, match.end()) == len(text) - 1:
            text = text[match.end() : -1]
        if text == before:
            break
    return text
