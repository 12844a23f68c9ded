"""Counts the words by which the paper watches reflection emerge (R1, appendix: "wait" and nine others)."""

from __future__ import annotations

import re

REFLECTIVE_WORDS = (
    "wait",
    "mistake",
    "however",
    "but",
    "retry",
    "error",
    "verify",
    "wrong",
    "evaluate",
    "check",
)

_WORD = re.compile(rf"\b(?:{'|'.join(REFLECTIVE_WORDS)})\b", re.IGNORECASE)


def reflective_words(text: str) -> dict[str, int]:
    """How often each of the ten words stands in `text`: whole words, any case. All ten keys are present."""
    counts = dict.fromkeys(REFLECTIVE_WORDS, 0)
    for match in _WORD.finditer(text):
        counts[match[0].lower()] += 1
    return counts
