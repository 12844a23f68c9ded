"""The format rule, case by case, and the reflective words."""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import pytest

from r1mega.rewards.format import check_format, check_reasoning_format
from r1mega.rewards.length import length_penalty
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
        ("<think>a</think><answer></answer>", "empty_answer"),
        ("<Think>a</Think><answer>b</answer>", "missing_think"),
        ("<think>a</think><Answer>b</Answer>", "missing_answer"),
        ("< think>a</think><answer>b</answer>", "missing_think"),
        ("<think >a</think><answer>b</answer>", "missing_think"),
        ("<think>a</ think><answer>b</answer>", "unclosed_think"),
        ('<think class="x">a</think><answer>b</answer>', "missing_think"),
        ('<think>a</think><answer id="1">b</answer>', "missing_answer"),
        ("<think/><answer>b</answer>", "missing_think"),
        ("＜think＞a＜/think＞<answer>b</answer>", "missing_think"),
        ("<th\u200bink>a</think><answer>b</answer>", "missing_think"),
        ("<think>use `<think>` here</think><answer>b</answer>", "nested"),
        ("<think>a</think><answer>```html\n<answer>\n```</answer>", "nested"),
        ("```\n<think>a</think><answer>b</answer>\n```", "leading_text"),
        ("<think>a</think><answer>b</answer>\n```", "trailing_text"),
        ("<think>a</think><answer>b</answer><|im_end|>", "trailing_text"),
        ("<think>a</think><answer>b</answer></answer>", "repeated_answer"),
        ("<think>a</think><think></think><answer>b</answer>", "repeated_think"),
        ("<think>a</think><answer>b</answer><think>c</think>", "repeated_think"),
        ("<think>a</answer><answer>b</think>", "wrong_order"),
        ("<think>a</think>\t\n <answer>b\n</answer>  ", "ok"),
        ("<think>a < b > c</think><answer>{1, 2}</answer>", "ok"),
    ],
)
def test_the_format_is_exact(text: str, verdict: str) -> None:
    assert check_format(text) == verdict


def test_a_cut_response_is_truncated_whatever_it_holds() -> None:
    assert check_format("<think>a</think><answer>5</answer>", truncated=True) == "truncated"


@pytest.mark.parametrize(
    ("text", "opened", "verdict"),
    [
        ("a\n</think>\n\nThe answer is 5.", True, "ok"),
        ("</think>5", True, "ok"),
        ("<think>\na\n</think>\n5", False, "ok"),
        ("<think>\na\n</think>\n5", True, "nested"),
        ("a</think>5", False, "missing_think"),
        ("5", False, "missing_think"),
        ("a", True, "unclosed_think"),
        ("", True, "unclosed_think"),
        ("<think>a", False, "unclosed_think"),
        ("a</think>", True, "empty_summary"),
        ("a</think> \n", True, "empty_summary"),
        ("a</think>5</think>", True, "repeated_think"),
        ("a</think>5<think>b</think>", True, "repeated_think"),
        ("x<think>a</think>5", False, "leading_text"),
        ("</think><think>5", False, "wrong_order"),
        ("a</think><answer>5</answer>", True, "ok"),
    ],
)
def test_reasoning_then_a_summary(text: str, opened: bool, verdict: str) -> None:
    assert check_reasoning_format(text, opened=opened) == verdict
    assert check_reasoning_format(text, opened=opened, truncated=True) == "truncated"


def test_the_length_penalty_grows_from_the_buffer_to_the_limit() -> None:
    assert length_penalty(100, limit=1000, buffer=200) == (0.0, "ok")
    assert length_penalty(800, limit=1000, buffer=200) == (0.0, "ok")
    assert length_penalty(900, limit=1000, buffer=200) == (-0.5, "long")
    assert length_penalty(1000, limit=1000, buffer=200) == (-1.0, "long")
    assert length_penalty(1000, limit=1000, buffer=200, truncated=True) == (-1.0, "truncated")
    with pytest.raises(ValueError, match="buffer 0"):
        length_penalty(1, limit=10, buffer=0)


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
