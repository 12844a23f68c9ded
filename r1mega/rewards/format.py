"""The format rewards: `<think> ... </think> <answer> ... </answer>` (R1-Zero), `... </think> summary` (R1).

Exactly one block of each, in this order, and nothing else: white space is allowed before, between and after
them. The thought may be empty, the answer or summary may not. The paper only says that the tags are enforced;
exactness is our choice, because a looser rule is one that a policy learns to abuse. A tag is a tag wherever it
stands, in code and quotations too; with other letters, spaces or attributes it is plain text.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"</?(?:think|answer)>")
_WANTED = ["<think>", "</think>", "<answer>", "</answer>"]


def check_format(text: str, *, truncated: bool = False) -> str:
    """Verdict on a response (without its stop token): "ok", or the first thing wrong with it.

    truncated: it was cut at the length limit.
    missing_think, missing_answer: no opening tag; unclosed_think, unclosed_answer: no closing tag.
    nested: a block opens inside another. repeated_think, repeated_answer: more than one block.
    wrong_order: tags in another order. leading_text, between_text, trailing_text: text outside the blocks.
    empty_answer: white space is all there is in the answer block.
    """
    if truncated:
        return "truncated"
    tags = list(_TAG.finditer(text))
    names = [tag[0] for tag in tags]
    if names != _WANTED:
        return _wrong_tags(names)
    if text[: tags[0].start()].strip():
        return "leading_text"
    if text[tags[1].end() : tags[2].start()].strip():
        return "between_text"
    if text[tags[3].end() :].strip():
        return "trailing_text"
    if not text[tags[2].end() : tags[3].start()].strip():
        return "empty_answer"
    return "ok"


def check_reasoning_format(text: str, *, opened: bool = True, truncated: bool = False) -> str:
    """Verdict on a response in R1's chat format, reasoning then a summary: "ok", or the first thing wrong.

    opened: the generation prompt ended in <think>, so the response may not open it again; without it the
    response must. <answer> tags mean nothing here.
    truncated, missing_think, unclosed_think, nested, repeated_think, leading_text: as in `check_format`.
    empty_summary: nothing follows </think>.
    """
    if truncated:
        return "truncated"
    if opened:
        text = "<think>" + text
    tags = [tag for tag in _TAG.finditer(text) if tag[0].endswith("think>")]
    names = [tag[0] for tag in tags]
    if names != ["<think>", "</think>"]:
        for name in ("<think>", "</think>"):
            if name not in names:
                return "missing_think" if name == "<think>" else "unclosed_think"
        return "nested" if _nested(names) else "repeated_think" if len(names) > 2 else "wrong_order"
    if text[: tags[0].start()].strip():
        return "leading_text"
    return "ok" if text[tags[1].end() :].strip() else "empty_summary"


def _wrong_tags(names: list[str]) -> str:
    for name in ("think", "answer"):
        if f"<{name}>" not in names:
            return f"missing_{name}"
        if f"</{name}>" not in names:
            return f"unclosed_{name}"
    if _nested(names):
        return "nested"
    for name in ("think", "answer"):
        if names.count(f"<{name}>") > 1 or names.count(f"</{name}>") > 1:
            return f"repeated_{name}"
    return "wrong_order"


def _nested(names: list[str]) -> bool:
    """An opening tag while a block is open."""
    depth = 0
    for name in names:
        if name.startswith("</"):
            depth = max(0, depth - 1)
        else:
            depth += 1
            if depth > 1:
                return True
    return False
