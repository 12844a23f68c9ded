"""Multiple choice: every way to say C, and every way not to commit."""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import pytest

from r1mega.rewards.choices import compare_choice, read_options

OPTIONS = {"A": "Paris", "B": "London", "C": "$\\frac{1}{2}$", "D": "All of the above"}


@pytest.mark.parametrize(
    "answer",
    [
        "C",
        "c",
        "(C)",
        "C.",
        "C)",
        "[C]",
        "**C**",
        "**(C)**",
        "`C`",
        "$C$",
        "\\boxed{C}",
        "\\text{C}",
        "Ｃ",
        "（C）",
    ]
    + [
        "$\\boxed{\\text{C}}$",
        "\\boxed{\\textbf{(C)}}",
        "\\[\\boxed{\\mathrm{C}}\\]",
        "Option C",
        "choice (C)",
    ]
    + [
        "ANSWER: C",
        "ANSWER: **C**",
        "**ANSWER: C**",
        "**Answer:** C",
        "Answer: (C) Berlin",
        "answer is C",
        "答案：C",
        "选C",
    ]
    + [
        "The answer is C.",
        "The correct answer is (C).",
        "C is correct",
        "I choose C",
        "C. Berlin",
        "Berlin (C)",
        "C: Berlin",
    ]
    + [
        "A is wrong and B is wrong, too.\n\nANSWER: C",
        "Not A, so we are left with one.\n\n**C**",
        "My final answer is C!",
    ]
    + ["<think>A or B?</think>\nANSWER: C", "Therefore, the final answer is $\\boxed{C}$."],
)
def test_one_letter_is_read_however_it_is_dressed(answer: str) -> None:
    assert compare_choice("C", answer) == "equal"
    assert compare_choice("(C)", answer) == "equal"
    assert compare_choice("B", answer) == "unequal"


@pytest.mark.parametrize(
    "answer",
    [
        "A or C",
        "C or D",
        "C?",
        "either C or D",
        "A/C",
        "C/D",
        "not C",
        "A, C",
        "A and C",
        "AC",
        "ABCD",
        "A B C D",
    ]
    + [
        "C. or maybe B",
        "C, D",
        "both A and C",
        "ANSWER: A or C",
        "\\boxed{A, C}",
        "C 或 D",
        "(C) or (D)",
        "probably C",
    ],
)
def test_hedging_and_several_letters_are_wrong(answer: str) -> None:
    assert compare_choice("C", answer) == "unequal"


@pytest.mark.parametrize(
    "answer", ["", " ", "I do not know", "Cats are animals", "The capital of France", "42", "Z"]
)
def test_prose_that_commits_to_nothing_is_unparsable(answer: str) -> None:
    assert compare_choice("C", answer) == "unparsable"


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("A, C", "A and C", "equal"),
        ("AC", "C, A", "equal"),
        ("A,C", "(A), (C)", "equal"),
        ("A and C", "\\boxed{AC}", "equal"),
        ("A,C", "Both A and C are correct", "equal"),
        ("A,C", "A、C", "equal"),
        ("A,C", "A", "unequal"),
        ("A,C", "A, B, C", "unequal"),
        ("A,C", "A or C", "unequal"),
    ],
)
def test_several_letters_must_all_be_there(reference: str, answer: str, verdict: str) -> None:
    assert compare_choice(reference, answer) == verdict


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("A", "Paris", "equal"),
        ("A", "paris.", "equal"),
        ("A", "The answer is Paris.", "equal"),
        ("A", "A. Paris", "equal"),
        ("A", "Paris (A)", "equal"),
        ("A", "A. London", "unequal"),
        ("A", "London", "unequal"),
        ("C", "1/2", "equal"),
        ("C", "0.5", "equal"),
        ("Paris", "A", "equal"),
        ("Paris", "(B)", "unequal"),
        ("D", "D) All of the above", "equal"),
        ("A", "E", "unparsable"),
        ("A", "Paris or London", "unparsable"),
        ("A", "The city of love", "unparsable"),
    ],
)
def test_an_options_own_text_names_it(reference: str, answer: str, verdict: str) -> None:
    assert compare_choice(reference, answer, OPTIONS) == verdict


def test_a_reference_in_words_is_met_word_for_word_without_options() -> None:
    assert compare_choice("New York", "ANSWER: **New York**.") == "equal"
    assert compare_choice("New York", "York") == "unequal"


def test_options_are_read_from_a_question() -> None:
    assert read_options("What?\nA. one\nB. two\nC. three") == {"A": "one", "B": "two", "C": "three"}
    assert read_options("Which? (A) x (B) y, (C) z") == {"A": "x", "B": "y", "C": "z"}
    assert read_options("Plan A. is good.") == {}
    assert read_options("A) x\nC) y") == {}


@pytest.mark.parametrize(
    "piece", ["A", "(", "A ", "\\text{", "\\boxed{", "answer: ", ", ", "$", "\ud800", "A or "]
)
def test_a_million_hostile_characters_get_a_verdict(piece: str) -> None:
    text = piece * (10**6 // len(piece))
    assert compare_choice("C", text, OPTIONS) in ("unequal", "unparsable")
