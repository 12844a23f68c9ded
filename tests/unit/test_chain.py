"""The toy task: right arithmetic, disjoint splits, one seed for everything, a base that knows little."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from r1mega.data.chain import (
    BaseMix,
    ChainProblem,
    apply,
    base_documents,
    chain_problems,
    num_problems,
    problem_at,
    worked,
)

TAGGED = re.compile(r"<think>(.*)</think><answer>(\d)</answer>")


def test_a_chain_is_evaluated_left_to_right_modulo_ten() -> None:
    problem = ChainProblem(3, (("+", 4), ("*", 2), ("-", 9)))
    assert problem.question == "3 + 4 * 2 - 9"
    assert problem.answer == "5"
    assert apply(2, "-", 7) == 5  # -5 mod 10


def test_worked_steps_without_noise_lead_to_the_answer() -> None:
    rng = random.Random()
    for problem in chain_problems(200, 4, seed=rng.randrange(1000), heldout=False):
        steps, answer = worked(problem, rng, noise=0.0)
        assert answer == problem.answer
        assert len(steps) == 1 + 4 * len(problem.steps)
        for i in range(len(problem.steps)):
            left, right = steps[4 * i : 4 * i + 5].split("=")
            assert eval(left) % 10 == int(right)


def test_every_index_is_a_different_problem() -> None:
    assert len({problem_at(i, 1).question for i in range(num_problems(1))}) == num_problems(1) == 300


def test_problems_are_distinct_and_repeat_with_their_seed() -> None:
    first = chain_problems(3000, 4, seed=7, heldout=False)
    assert len(set(first)) == 3000
    assert first == chain_problems(3000, 4, seed=7, heldout=False)
    assert first[:100] == chain_problems(100, 4, seed=7, heldout=False)
    assert first != chain_problems(3000, 4, seed=8, heldout=False)


@pytest.mark.parametrize("operations", [1, 2, 4])
def test_no_seed_puts_a_problem_on_both_sides(operations: int) -> None:
    count = 10 if operations == 1 else 300
    heldout = {p.question for p in chain_problems(count, operations, seed=1, heldout=True)}
    train = {p.question for p in chain_problems(200, operations, seed=2, heldout=False)}
    base = {question for question, _ in base_documents(2000, operations, seed=3)}
    assert not heldout & (train | base)
    assert all(p.held_out for p in chain_problems(count, operations, seed=5, heldout=True))


def test_asking_for_more_problems_than_there_are_says_what_to_change() -> None:
    with pytest.raises(
        ValueError, match=r"training problems of 1 operations, 400 asked; raise data.operations"
    ):
        chain_problems(400, 1, seed=1, heldout=False)
    with pytest.raises(ValueError, match=r"data.operations=0"):
        chain_problems(1, 0, seed=1, heldout=False)


def test_the_base_mix_shows_every_block_in_its_share() -> None:
    mix = BaseMix()
    documents = base_documents(20000, 4, seed=random.randrange(1000), mix=mix)
    kinds = Counter(_kind(question, text) for question, text in documents)
    worked_share = 1 - mix.facts - mix.words - mix.copies - mix.untagged - mix.direct
    expected = {
        "no question": mix.facts + mix.words + mix.copies,
        "untagged": mix.untagged,
        "direct": mix.direct,
        "worked, tagged": worked_share * (1 - mix.worked_untagged),
        "worked, untagged": worked_share * mix.worked_untagged,
    }
    for kind, share in expected.items():
        assert abs(kinds[kind] / len(documents) - share) < 0.02, (kind, kinds)


def test_direct_answers_in_the_base_are_right_about_half_of_the_time() -> None:
    right = total = 0
    for question, text in base_documents(20000, 4, seed=random.randrange(1000)):
        match = TAGGED.fullmatch(text)
        if question and match and not match[1]:
            total += 1
            right += match[2] == _answer(question)
    # half are right by intent, and a tenth of the others by accident
    assert 0.5 < right / total < 0.6


def test_base_documents_repeat_with_their_seed() -> None:
    assert base_documents(500, 4, seed=3) == base_documents(500, 4, seed=3)
    assert base_documents(500, 4, seed=3) != base_documents(500, 4, seed=4)


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        BaseMix(facts=0.9)


def _kind(question: str, text: str) -> str:
    if not question:
        return "no question"
    match = TAGGED.fullmatch(text)
    if match:
        return "worked, tagged" if match[1] else "direct"
    return "worked, untagged" if "=" in text else "untagged"


def _answer(question: str) -> str:
    start, *rest = question.split()
    value = int(start)
    for operator, digit in zip(rest[::2], rest[1::2], strict=True):
        value = eval(f"{value}{operator}{digit}") % 10
    return str(value)
