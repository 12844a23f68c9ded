"""The format rule, case by case, and the reflective words."""

from __future__ import annotations

import pytest

from r1mega.rewards.format import check_format
from r1mega.rewards.reflection import REFLECTIVE_WORDS, reflective_words


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<think>a</think><answer>b</answer>", "ok"),
        (" \n<think> a\n\nb </think>\n <answer> b </answer>\n", "ok"),
        ("<think></think><answer>5</answer>", "ok"),
        ("<think>1 < 2 and <b> and <thinking></think><answer>\\boxed{5}</answer>", "ok"),
        ("", "missing_think"),
        ("5", "missing_think"),
        ("<answer>5</answer>", "missing_think"),
        ("a</think><answer>5</answer>", "missing_think"),
        ("<THINK>a</THINK><answer>5</answer>", "missing_think"),
        ("<think>a", "unclosed_think"),
        ("<think>a<answer>5</answer>", "unclosed_think"),
        ("<think>a</think>5", "missing_answer"),
        ("<think>a</think>5</answer>", "missing_answer"),
        ("<think>a</think><answer>5", "unclosed_answer"),
        ("<think>a<answer>5</answer></think>", "nested"),
        ("<think>a<think>b</think></think><answer>5</answer>", "nested"),
        ("<think>a</think><answer><think>b</think>5</answer>", "nested"),
        ("<think>a</think><think>b</think><answer>5</answer>", "repeated_think"),
        ("<think>a</think></think><answer>5</answer>", "repeated_think"),
        ("<think>a</think><answer>5</answer><answer>6</answer>", "repeated_answer"),
        ("<answer>5</answer><think>a</think>", "wrong_order"),
        ("</think><think>a<answer>5</answer>", "nested"),
        ("So: <think>a</think><answer>5</answer>", "leading_text"),
        ("<think>a</think> so <answer>5</answer>", "between_text"),
        ("<think>a</think><answer>5</answer> done", "trailing_text"),
        ("<think>a</think><answer> \n</answer>", "empty_answer"),
    ],
)
def test_the_format_is_exact(text: str, verdict: str) -> None:
    assert check_format(text) == verdict


def test_a_cut_response_is_truncated_whatever_it_holds() -> None:
    assert check_format("<think>a</think><answer>5</answer>", truncated=True) == "truncated"


def test_a_million_tags_get_a_verdict() -> None:
    assert check_format("<think>" * 100_000) == "unclosed_think"
    assert check_format("<" * 10**6) == "missing_think"


def test_reflective_words_are_whole_words_in_any_case() -> None:
    counts = reflective_words("Wait, WAIT: but await the butter; let me check. However... checked, wrong!")
    assert counts == dict.fromkeys(REFLECTIVE_WORDS, 0) | {
        "wait": 2,
        "but": 1,
        "check": 1,
        "however": 1,
        "wrong": 1,
    }
    assert len(REFLECTIVE_WORDS) == 10
