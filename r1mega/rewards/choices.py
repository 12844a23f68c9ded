r"""Multiple choice: is this the reference option?

`compare_choice(reference, answer)` reads a final answer or a whole summary: the last "ANSWER: C" (GPQA's wording in
the R1 paper, D.1), the last \boxed{}, "(C)", "C.", "**C**", the option's own text, several letters where
the reference has several. An answer that hedges ("A or B"), names the wrong number of options or gives the text of
another one is wrong; prose that commits to nothing is unparsable. The rules are ours.
"""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from r1mega.rewards.math_answer import quick_compare
from r1mega.rewards.math_extraction import all_boxed

MAX_TEXT = 4000
"""Characters; of a longer answer only the end is read."""
MAX_OPTION = 200
"""Characters of an answer that may equal an option as mathematics ("0.5" for 1/2)."""
LABELS = "ABCDEFGHIJ"
"""Options where none are given; RL prompts of the paper have four to eight (Table 4)."""


def compare_choice(reference: str, answer: str, options: Mapping[str, str] | None = None) -> str:
    """equal | unequal | unparsable.

    reference: a letter ("C", "(C)"), several ("A, C" or "AC"), or the text of an option.
    options: label -> text, from `read_options`, say; without them only letters can be recognised, and a
    reference that is text must be met word for word.
    """
    labels = _labels_of(options)
    wanted = _chosen(reference, labels, options)
    given = final_text(answer)
    if not given:
        return "unparsable"
    if wanted is None:
        return "equal" if _same_text(reference, given) else "unequal"
    chosen = _chosen(given, labels, options)
    if chosen is None:
        return "unparsable"
    return "equal" if chosen == wanted else "unequal"


def read_options(question: str) -> dict[str, str]:
    """The options listed in a question as "A. ...", "(A) ..." or "A) ..."; {} unless they run A, B, C ..."""
    marks = list(_OPTION_MARK.finditer(question))
    first = max((i for i, mark in enumerate(marks) if (mark[1] or mark[2]) == "A"), default=len(marks))
    marks = marks[first:]
    letters = [mark[1] or mark[2] for mark in marks]
    if len(letters) < 2 or letters != list(LABELS[: len(letters)]):
        return {}
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    return {
        letter: question[mark.end() : end].strip().rstrip(",;").strip()
        for letter, mark, end in zip(letters, marks, ends)
    }


def final_text(answer: str) -> str:
    r"""The part that commits: after the last "ANSWER:", in the last \boxed{}, else the last line; unwrapped."""
    text = answer.rsplit("</think>", 1)[-1].strip()[-MAX_TEXT:]
    boxes = all_boxed(text)
    marks = list(_MARKER.finditer(text))
    if marks and (not boxes or "boxed" in text[marks[-1].end() :]):
        after = text[marks[-1].end() :].strip()
        text = after if all_boxed(after) else after.split("\n", 1)[0]
        boxes = all_boxed(text)
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    return unwrapped(boxes[-1] if boxes else lines[-1])


def unwrapped(text: str) -> str:
    r"""Without Markdown emphasis, maths delimiters, \text{}, full-width forms and enclosing quotes."""
    text = unicodedata.normalize("NFKC", text[-MAX_TEXT:])
    for _ in range(3):
        text = _COMMAND.sub(r"\1", text)
    text = _MARKS.sub("", text).replace("\\ ", " ").replace("~", " ")
    return text.strip().strip("\"'“”‘’").strip()


_OPTION_MARK = re.compile(r"(?:^|(?<=[\s,;]))(?:\(([A-J])\)|([A-J])[.):、．](?=\s))", re.MULTILINE)
_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|fbox|bf|rm|operatorname)\s*\{([^{}]*)\}"
)
_MARKS = re.compile(r"\*\*|__|`|\$|\\[()\[\]]|</?answer>")
_MARKER = re.compile(
    r"\banswer(?:\s+is)?\s*[*_]*\s*[:：]|\banswer\s+is\b|答案(?:是|为|為|选|選)?\s*[:：]?|\bAntwort(?:\s+ist)?\s*[:：]?"
    r"|\bréponse(?:\s+est)?\s*[:：]|\brespuesta(?:\s+es)?\s*[:：]",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"^(?:(?:so|thus|therefore|hence|the|my|final|correct|right|best|answer|option|options|choice|choices|is|are|"
    r"would be|must be|both|letter|select|choose|i choose|i select|选项|選項|选|選|答案|是|为|為)\b[\s:：,]*|[选選为為是]\s*)+",
    re.IGNORECASE,
)
_TRAIL = re.compile(
    r" (?:is|are)(?: the)? (?:correct|right)(?: (?:answers?|options?|choices?))?$| ?(?:选项|選項)$",
    re.IGNORECASE,
)
_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|not|oder|ou|probably)\b|[?？/]|或", re.IGNORECASE)
_SEPARATOR = re.compile(r" ?(?:,|;|&|\+|、|\band\b|\bund\b|\bet\b|\by\b|和| ) ?", re.IGNORECASE)


def _labels_of(options: Mapping[str, str] | None) -> dict[str, str]:
    """Upper-case label -> label as given."""
    return {label.upper(): label for label in options or LABELS}


def _chosen(text: str, labels: Mapping[str, str], options: Mapping[str, str] | None) -> frozenset[str] | None:
    """The labels a final text commits to, {""} where it hedges; None where it names none."""
    text = " ".join(unwrapped(text).split())
    by_text = _by_option_text(text, options)
    if by_text:
        return by_text
    rest = _LEAD.sub("", text).strip().rstrip(".。!").strip() if not _is_label(text, labels) else text
    rest = _TRAIL.sub("", rest)
    plain = _letters(rest, labels)
    if plain:
        return plain
    if _letters(_HEDGE.sub(",", rest), labels):
        return frozenset({""})
    return _letter_and_text(rest, labels, options) or _by_option_text(rest, options)


def _is_label(text: str, labels: Mapping[str, str]) -> bool:
    return text.upper() in labels


def _letters(text: str, labels: Mapping[str, str]) -> frozenset[str] | None:
    """ "C", "(C)", "A, C", "A and C", "AC": nothing but labels."""
    parts = [part.strip("()[]{}.:、") for part in _SEPARATOR.split(text) if part.strip("()[]{}.:、,; ")]
    if not parts:
        return None
    if len(parts) == 1 and len(parts[0]) > 1 and parts[0] == parts[0].upper():
        letters = list(parts[0])
        if len(set(letters)) == len(letters) and letters == sorted(letters):
            parts = parts if parts[0] in labels else letters
    chosen = [part.upper() for part in parts]
    return frozenset(chosen) if all(label in labels for label in chosen) else None


def _letter_and_text(
    text: str, labels: Mapping[str, str], options: Mapping[str, str] | None
) -> frozenset[str] | None:
    """ "C. Paris", "(C) Paris", "C: Paris", "Paris (C)": the letter, if the text is its own."""
    match = _LETTER_FIRST.match(text) or _LETTER_LAST.match(text)
    if not match:
        return None
    letter, own = match["letter"].upper(), match["own"].strip()
    if letter not in labels:
        return None
    if options:
        named = _by_option_text(own, options)
        return frozenset({letter}) if named == {letter} else frozenset({""}) if named else None
    others = {other[1] for other in _OTHER_LETTER.finditer(own)} & set(labels) - {letter}
    return frozenset({""}) if _HEDGE.search(own) or others else frozenset({letter})


_LETTER_FIRST = re.compile(r"\(?\s*(?P<letter>\w)\s*(?:[).:、]|\s[-–—])\s*(?P<own>[^\n]+)$", re.DOTALL)
_LETTER_LAST = re.compile(r"(?P<own>[^\n]+?)\s*\(\s*(?P<letter>\w)\s*\)$")
_OTHER_LETTER = re.compile(r"[(\s]([A-J])[).\s]")


def _by_option_text(text: str, options: Mapping[str, str] | None) -> frozenset[str] | None:
    """The one option that says this; {""} for several; None for none."""
    if not options or not text.strip():
        return None
    if text.strip().upper() in _labels_of(options):
        return None
    same = [label.upper() for label, own in options.items() if _same_text(own, text)]
    if not same and len(text) <= MAX_OPTION:
        same = [label.upper() for label, own in options.items() if quick_compare(own, text) == "equal"]
    return frozenset(same if len(same) == 1 else {""}) if same else None


def _same_text(one: str, other: str) -> bool:
    return _squeezed(one) == _squeezed(other) != ""


def _squeezed(text: str) -> str:
    """Lower case, single spaces, no articles and no punctuation at the ends."""
    text = " ".join(unwrapped(text).casefold().split()).strip(" .,;:!。，；")
    return re.sub(r"^(?:the|an|a)\s+", "", text)
