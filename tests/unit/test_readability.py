"""Reasons to drop a chain of thought."""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import pytest

from r1mega.rewards.readability import readability, unreadable

GOOD = (
    "First we add the two numbers.\n\nThat gives 7, so the answer is $7$.\n\nLet me check: 3 + 4 is 7 indeed."
)
LONG = " ".join(f"Then we look at number {i} and see that it is not prime." for i in range(60))


@pytest.mark.parametrize(
    ("chain", "language", "reasons"),
    [
        (GOOD, "", []),
        (GOOD, "en", []),
        (GOOD, "zh", ["wrong_language"]),
        ("首先我们把两个数相加。\n\n结果是 7。", "zh", []),
        ("", "en", ["no_words"]),
        ("$3 + 4 = 7$", "en", ["no_words"]),
        (GOOD + "\n\n首先我们把两个数相加，结果是七，所以答案就是七。", "", ["mixed_language"]),
        (GOOD + "\n\nZuerst addieren wir die beiden Zahlen und erhalten sieben.", "en", ["mixed_language"]),
        (GOOD + "\n```python\nprint(3 + 4)\n```\n", "en", ["code_block"]),
        (GOOD + "\n~~~\nx\n~~~", "en", ["code_block"]),
        (GOOD + " The value `x` is 7.", "en", []),
        (LONG, "en", ["long_paragraph"]),
        (LONG.replace(". ", ".\n"), "en", []),
        (GOOD + "\n" + "Wait, let me check again. " * 30, "en", ["looping_tail"]),
    ],
)
def test_every_reason_is_named(chain: str, language: str, reasons: list[str]) -> None:
    assert unreadable(chain, language) == reasons
    assert readability(chain, language) == ((0.0, reasons[0]) if reasons else (1.0, "readable"))


def test_all_reasons_are_listed_in_order() -> None:
    chain = GOOD + "\n```\nx\n```\n" + LONG + "\n" + "我们再看一遍这个问题。" * 60
    assert unreadable(chain) == ["mixed_language", "code_block", "long_paragraph", "looping_tail"]


def test_an_unknown_language_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="klingon"):
        unreadable(GOOD, "klingon")


def test_a_wall_of_chinese_is_a_long_paragraph() -> None:
    wall = "".join(f"我们来看第{chr(0x4E00 + i)}个数，它不是质数，所以继续。" for i in range(60))
    assert unreadable(wall, "zh")[0] == "long_paragraph"
    assert "long_paragraph" not in unreadable(wall.replace("。", "。\n"), "zh")
