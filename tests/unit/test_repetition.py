"""Texts that repeat themselves, and texts that only look so."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.rewards.repetition import MAX_PERIOD, ngram_share, periodic_tail, repetition

VARIED = " ".join(
    f"Step {i}: we add {i * 7} to the sum and get {i * i + 3} as result number {i}." for i in range(30)
)


@pytest.mark.parametrize(
    "text", ["", "a", "Yes.", VARIED, "1, 2, 3, 4, 5, 6, 7, 8", "." * 40, VARIED + "." * 60]
)
def test_a_varied_text_is_fine(text: str) -> None:
    value, verdict = repetition(text)
    assert verdict == "ok"
    assert 0.0 <= value < 0.3


@pytest.mark.parametrize(
    "loop", ["Wait, let me check again. ", "abc ", "x", "我们再看一遍。", "So the answer is 5.\n\n", "ha"]
)
def test_a_looping_tail_is_found_wherever_it_is_cut(loop: str) -> None:
    text = VARIED + loop * 400
    for cut in range(min(len(loop), 5)):
        tail = periodic_tail(text[: len(text) - cut])
        assert tail.period == len(loop)
        assert tail.length >= len(loop) * 395
        assert repetition(text[: len(text) - cut])[1] == "looping_tail"


def test_the_period_is_the_smallest_that_covers_most() -> None:
    tail = periodic_tail("Wait!!! " * 100)
    assert (tail.period, tail.share) == (8, 1.0)
    assert periodic_tail("a" * 4990 + ("b" + "a" * 4990) * 4).period == 4991


def test_two_copies_are_no_loop() -> None:
    assert periodic_tail(VARIED + VARIED).length == 0
    assert repetition(VARIED + " " + VARIED)[1] == "repeated_ngrams"


def test_longer_periods_are_left_to_the_ngrams() -> None:
    rng = random.Random(5)
    block = " ".join(str(rng.random()) for _ in range(MAX_PERIOD // 10))
    assert len(block) > MAX_PERIOD
    assert periodic_tail(block * 5).length == 0
    assert repetition((block + " ") * 5)[1] == "repeated_ngrams"


def test_the_ngram_share_counts_what_stood_before() -> None:
    assert ngram_share("a b c d e f", n=2) == 0.0
    assert ngram_share("a b a b a b", n=2) == pytest.approx(3 / 5)
    assert ngram_share("A, b! a B", n=2) == pytest.approx(1 / 3)
    assert ngram_share("我们我们", n=2) == pytest.approx(1 / 3)
    assert ngram_share("a b", n=10) == 0.0
    with pytest.raises(ValueError, match="n-grams of 0"):
        ngram_share("a", n=0)


def test_one_word_over_and_over_is_caught() -> None:
    assert repetition("the " * 100)[1] == "looping_tail"
    assert repetition("the " * 300 + VARIED)[1] == "repeated_ngrams"


@pytest.mark.parametrize("piece", ["a", "ab ", "我", "x" * 999 + "y", " ", "\ud800"])
def test_a_million_characters_are_measured(piece: str) -> None:
    value, _ = repetition(piece * (10**6 // len(piece)))
    assert 0.0 <= value <= 1.0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.text(alphabet="ab \n我.", min_size=1, max_size=12), st.integers(0, 60))
def test_values_are_shares_and_tails_are_periodic(head: str, loop: str, copies: int) -> None:
    text = head + loop * copies
    value, _ = repetition(text)
    assert 0.0 <= value <= 1.0
    tail, text = periodic_tail(text), text.rstrip()
    end = text[len(text) - tail.length :]
    assert tail.length == 0 or (end[tail.period :] == end[: -tail.period] and tail.length >= 3 * tail.period)
