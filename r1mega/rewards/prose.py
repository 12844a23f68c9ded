r"""What of a response is prose: its chain of thought, and a text without code, LaTeX, URLs and tags.

The paper measures language consistency over the chain of thought and says no more; what counts as prose is our
choice. Every pattern is linear in the text (possessive or bounded), because a policy writes it.
"""

# ruff: noqa: RUF001  (look-alike characters are what this module is about)

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"


def chain_of_thought(response: str, *, opened: bool = False) -> str:
    """The text between the first <think> and the last </think>; to the end where it is not closed.

    opened: the prompt already ends in <think>, as R1's chat template does, so the chain starts at once. A
    response with </think> alone is read so, too. "" where there is no chain.
    """
    end = response.rfind(_CLOSE)
    start = response.find(_OPEN)
    body = response if end < 0 else response[:end]
    if opened or start < 0 or start > len(body):
        return body if opened or end >= 0 else ""
    return body[start + len(_OPEN) :]


def whole_response(prompt: str, response: str) -> str:
    """The response with the <think> that the prompt's text ends in (R1's chat template opens the reasoning), if it does.

    So a chain that is never closed is known as one, and is neither a summary nor an answer.
    """
    opened = prompt.rstrip().endswith(_OPEN)
    return prompt[prompt.rindex(_OPEN) :] + response if opened else response


def summary(response: str) -> str:
    """What follows the last </think>, stripped; all of a response without the tags, "" of an unclosed chain.

    Of a whole response: what a policy wrote behind an opened <think> holds no tag of its own.
    """
    if _CLOSE in response:
        return response.rsplit(_CLOSE, 1)[1].strip()
    return "" if _OPEN in response else response.strip()


_FENCE = re.compile(r"(```+|~~~+).*?(?:\1|\Z)", re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]{1,300}+`")
_TAG = re.compile(r"</?[a-zA-Z][\w-]*+(?:\s++[\w:-]++=[^<>\n]{0,200}+)?\s*+/?>")
_ADDRESS = re.compile(r"(?:(?:https?|ftp)://|\bwww\.)[^\s\u3000-\u9fff，。）]*+")
_MATHS = (
    re.compile(r"\$\$[^$]*+\$\$"),
    re.compile(r"\\\[(?:[^\\]|\\[^\[\]])*+\\\]"),
    re.compile(r"\\\((?:[^\\]|\\[^()])*+\\\)"),
    re.compile(r"\$(?<![\d\\]\$)(?=[^\s$])[^$]{0,2000}+(?<=[^\s\\])\$(?!\d)"),
)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{(?!itemize|enumerate|center|document)[a-zA-Z]++\*?\}")
_COMMAND = re.compile(r"\\[a-zA-Z]++\*?(?:\[[^\[\]\n]{0,200}+\]|\{[^{}]{0,500}+\})*+")
_IDENTIFIER = re.compile(r"(?a:\b(?:[A-Z]?[a-z]++[A-Z0-9_]|[A-Z]*+[0-9_])\w*+)")
"""x1, my_list, camelCase, PyTorch, 3x, and numbers."""
_MAIL = re.compile(r"(?a:\b[\w.+-]{1,64}+@[\w.-]++)")
_UNIT = re.compile(
    r"[0-9]\s?(?:[kcmnµμ]?m|[kmµμ]?g|[mc]?l|[kM]?W|[kMG]?Hz|[KMGT]i?B|kWh|km/h|m/s|min|ms|ft|lbs?|mph)"
    r"[²³]?(?![a-zA-Z])"
)
_FULL_WIDTH = re.compile(r"[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")
_FULL_WIDTH_TABLE = {
    code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))
}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufe00-\ufe0f]+")


def prose(text: str) -> str:
    r"""`text` without code (fenced, inline, identifiers), LaTeX (with its \text{}), URLs, tags and units.

    Zero-width characters are dropped and full-width letters narrowed, so that neither can split or hide a
    word. An unclosed code fence reaches to the end. What is left is for counting words, not for reading.
    """
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
        if _FULL_WIDTH.search(text):
            text = text.translate(_FULL_WIDTH_TABLE)
    if "`" in text or "~~~" in text:
        text = _INLINE_CODE.sub(" ", _FENCE.sub("\n", text))
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "://" in text or "www." in text:
        text = _ADDRESS.sub(" ", text)
    if "$" in text or "\\" in text:
        text = _without_maths(text)
    if "@" in text:
        text = _MAIL.sub(" ", text)
    return _IDENTIFIER.sub(" ", _UNIT.sub(" ", text))


def _without_maths(text: str) -> str:
    for pattern in _MATHS:
        text = pattern.sub(" ", text)
    if "\\" not in text:
        return text
    return _COMMAND.sub(" ", _without_environments(text))


def _without_environments(text: str) -> str:
    r"""Without the outermost \begin{...} ... \end{...}; one that is never closed loses its marks only."""
    kept, depth, last = [], 0, 0
    for match in _ENVIRONMENT.finditer(text):
        if match[1] == "begin":
            if depth == 0:
                kept.append(text[last : match.start()])
                last = match.end()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                last = match.end()
    kept.append(text[last:])
    return " ".join(kept)
