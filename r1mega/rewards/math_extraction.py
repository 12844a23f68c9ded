r"""Where the final answer of a response stands: <answer>, \boxed{}, "####", and on request the last number.

Text inside the reasoning is never an answer. Departure from the paper: it says only "in a specified format
(e.g., within a box)"; the order of the rules is ours.
"""

from __future__ import annotations

import re

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;~]|\\[()\[\],;: ]|\\q?quad(?![a-zA-Z])|\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-z])(?:and|or)(?![a-z]))*"
)
"""Several boxes with nothing else between them are one answer in several boxes."""
MAX_BOXES = 16
_LAST_NUMBER = re.compile(r"-?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?%?|-?\.\d+")


def extract_answer(response: str, *, last_number: bool = False) -> str | None:
    r"""The final answer a response commits to; None when there is none.

    Only what follows the last </think> counts, or all of a response without reasoning. Of that the last <answer>
    block is taken; without one, the last \boxed{} (or several joined by "and"); without one, the line after the last
    "####"; without one and with `last_number`, the last number.
    """
    summary = after_reasoning(response)
    block = answer_block(summary)
    if block is not None:
        return block.strip() or None
    content = boxed_answer(summary)
    if content is not None:
        return content.strip() or None
    if "####" in summary:
        rest = summary.rsplit("####", 1)[1].strip()
        return rest.split("\n", 1)[0].strip() or None
    if last_number:
        return last_number_of(summary)
    return None


def after_reasoning(response: str) -> str:
    """What follows the last </think>, up to a <think> that opens again."""
    return response.rsplit("</think>", 1)[-1].split("<think>", 1)[0]


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
    return [text[start:end] for _, start, end in _boxes(text)]


def boxed_answer(text: str) -> str | None:
    r"""The last box, and the boxes before it that are joined to it: "\boxed{1} and \boxed{2}" is "1, 2"."""
    boxes = _boxes(text)
    if not boxes:
        return None
    contents = [text[boxes[-1][1] : boxes[-1][2]]]
    for earlier, later in zip(boxes[-2::-1], boxes[:0:-1]):
        if len(contents) == MAX_BOXES or not _BETWEEN_BOXES.fullmatch(text[earlier[2] + 1 : later[0]]):
            break
        content = text[earlier[1] : earlier[2]]
        if content not in contents:
            contents.insert(0, content)
    return ", ".join(contents)


def last_number_of(text: str) -> str | None:
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1].strip() if numbers else None


def closing_brace(text: str, start: int) -> int:
    """Position of the brace that closes the one before `start`; -1 without one. Escaped braces do not count."""
    depth = 1
    for match in _BRACE_OR_ESCAPE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start of the command, start of the content, its end) of every outermost complete box."""
    boxes, position = [], 0
    while match := BOXED.search(text, position):
        end = closing_brace(text, match.end())
        if end < 0:
            break
        boxes.append((match.start(), match.end(), end))
        position = end + 1
    return boxes
