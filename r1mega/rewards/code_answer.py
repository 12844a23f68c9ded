"""The program in a response: the last fenced block of its final part, never of its reasoning."""

from __future__ import annotations

import re

from r1mega.rewards.math_answer import answer_block

LANGUAGES: dict[str, tuple[str, ...]] = {
    "python": ("python", "python3", "py", "py3"),
    "c++": ("c++", "cpp", "cc", "cxx", "c++17", "c++20", "cpp17", "cpp20"),
}
"""Language -> the words after ``` that mean it, in lower case."""

_OPENING = re.compile(r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)(?P<info>[^`\n]*+)$", re.MULTILINE)
_CLOSING = re.compile(r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)[ \t\r]*+$", re.MULTILINE)
"""Possessive: a model writes what these read, and they may not try one line in several ways."""


def extract_code(response: str, language: str = "python") -> str | None:
    """The last closed block that names the language, else the last closed block that names none; None without one.

    Only what follows the last </think> counts, and only the last <answer> block where there is one. A block of
    another language is never taken: models show sample output and shell commands after their program.
    """
    final = response.rsplit("</think>", 1)[-1]
    if "<think>" in final:
        return None
    inside = answer_block(final)
    blocks = fenced_blocks(final if inside is None else inside)
    named = [code for info, code in blocks if info in LANGUAGES[language]]
    unnamed = [code for info, code in blocks if not info]
    chosen = named or unnamed
    return chosen[-1] if chosen else None


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(first word after the fence in lower case, content) of each closed block, in order; a nested fence is content.

    A block that is never closed ends the search, so that no line is read twice.
    """
    blocks, position = [], 0
    while opening := _OPENING.search(text, position):
        closing = _closing(text, opening["fence"], opening.end())
        if closing is None:
            break
        words = opening["info"].strip().strip("{}.").lower().split()
        blocks.append((words[0] if words else "", text[opening.end() + 1 : closing.start()]))
        position = closing.end()
    return blocks


def _closing(text: str, fence: str, start: int) -> re.Match[str] | None:
    """The next line of at least as many of the same characters, and nothing else."""
    lines = _CLOSING.finditer(text, start)
    return next((line for line in lines if line["fence"].startswith(fence)), None)
