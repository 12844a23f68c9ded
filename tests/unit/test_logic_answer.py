"""Logic puzzles: truth values, sets, orders, assignments; partial guesses earn nothing."""

from __future__ import annotations

import pytest

from r1mega.rewards.logic_answer import compare_logic, read_reference

KNIGHTS = "Alice: knight; Bob: knave"
HOUSES = "house 1: red, cat; house 2: blue, dog"
GRID = '{"house 1": {"color": "red", "pet": "cat"}, "house 2": {"color": "blue", "pet": "dog"}}'
TABLE = "| House | Color | Pet |\n|---|:-:|---|\n| 1 | Red | Cat |\n| 2 | Blue | Dog |"
TURNED = "|  | House 1 | House 2 |\n|---|---|---|\n| Color | Red | Blue |\n| Pet | cat | dog |"


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("true", "True.", "equal"),
        ("true", "\\boxed{\\text{True}}", "equal"),
        ("True", "The statement is true", "equal"),
        ("true", "yes", "equal"),
        ("false", "true", "unequal"),
        ("unknown", "It cannot be determined.", "equal"),
        ("unknown", "uncertain", "equal"),
        ("true", "true or false", "unequal"),
        ("true", "not true", "unparsable"),
        ("true", "maybe", "unparsable"),
        ("true", "", "unparsable"),
    ],
)
def test_truth_values(reference: str, answer: str, verdict: str) -> None:
    assert compare_logic(reference, answer) == verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Ann, Bob", "equal"),
        ("{Bob, Ann}", "equal"),
        ("\\boxed{\\{Bob, Ann\\}}", "equal"),
        ("Ann and Bob", "equal"),
        ("- Bob\n- Ann", "equal"),
        ("1. Bob\n2. Ann", "equal"),
        ('["bob", "ann"]', "equal"),
        ("Answer: Bob and Ann.", "equal"),
        ("Ann", "unequal"),
        ("Ann, Bob, Carl", "unequal"),
        ("Ann or Bob", "unequal"),
        ("none", "unequal"),
    ],
)
def test_sets_are_free_of_order(answer: str, verdict: str) -> None:
    assert compare_logic("{Ann, Bob}", answer) == verdict
    assert compare_logic('{"set": ["Ann", "Bob"]}', answer) == verdict


def test_the_empty_set_is_none() -> None:
    assert compare_logic("{}", "none") == "equal"
    assert compare_logic("{}", "Ann") == "unequal"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A > B > C", "equal"),
        ("C < B < A", "equal"),
        ("A → B → C", "equal"),
        ("$A \\succ B \\succ C$", "equal"),
        ("A, B, C", "equal"),
        ("1. A\n2. B\n3. C", "equal"),
        ("2. B\n1. A\n3. C", "equal"),
        ("1st: A, 2nd: B, 3rd: C", "equal"),
        ("first A, then B, finally C", "equal"),
        ("First A, then B, and then C.", "equal"),
        ('["A", "B", "C"]', "equal"),
        ("A > C > B", "unequal"),
        ("C > B > A", "unequal"),
        ("A > B", "unequal"),
        ("A > B < C", "unequal"),
        ("A > B > C or A > C > B", "unequal"),
        ("1. A\n1. B\n3. C", "unequal"),
        ("A", "unparsable"),
    ],
)
def test_orders(answer: str, verdict: str) -> None:
    assert compare_logic("A > B > C", answer) == verdict
    assert compare_logic('{"order": ["A", "B", "C"]}', answer) == verdict


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        (KNIGHTS, "Alice is a knight and Bob is a knave.", "equal"),
        (KNIGHTS, "So, Bob is a knave, and Alice is a knight.", "equal"),
        (KNIGHTS, "Bob: knave\nAlice: knight", "equal"),
        (KNIGHTS, "- **Alice**: Knight\n- **Bob**: Knave", "equal"),
        (KNIGHTS, "Alice = truth-teller, Bob = liar", "equal"),
        (KNIGHTS, '{"Alice": "knight", "Bob": "knave"}', "equal"),
        (KNIGHTS, '```json\n{"Bob": "knave", "Alice": "knight"}\n```', "equal"),
        (KNIGHTS, "Alice is a knave and Bob is a knave", "unequal"),
        (KNIGHTS, "Alice is a knight", "unequal"),
        (KNIGHTS, "Alice is a knight, Bob is a knave, and Carl is a knave", "unequal"),
        (KNIGHTS, "Alice is a knight or a knave; Bob is a knave", "unequal"),
        (KNIGHTS, "Alice: knight; Alice: knave; Bob: knave", "unequal"),
        (KNIGHTS, "Alice: not knave; Bob: knave", "unequal"),
        (KNIGHTS, "I cannot say", "unparsable"),
        ("A: knight; B: knight; C: knave", "A and B are knights, and C is a knave", "equal"),
        ("A: knight; B: knight", "Both are knights", "equal"),
        ("A: knight; B: knave", "Both are knights", "unequal"),
    ],
)
def test_knights_and_knaves(reference: str, answer: str, verdict: str) -> None:
    assert compare_logic(reference, answer) == verdict


@pytest.mark.parametrize("reference", [HOUSES, GRID])
@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (HOUSES, "equal"),
        (GRID, "equal"),
        (TABLE, "equal"),
        (TURNED, "equal"),
        ("The solution:\n" + TABLE, "equal"),
        ("House 2: blue, dog\nHouse 1: red, cat", "equal"),
        ("house 1: color: red, pet: cat; house 2: pet: dog, color: blue", "equal"),
        (
            '{"color": {"house 1": "red", "house 2": "blue"}, "pet": {"house 1": "cat", "house 2": "dog"}}',
            "equal",
        ),
        (
            '[{"house": 1, "color": "red", "pet": "cat"}, {"house": 2, "color": "blue", "pet": "dog"}]',
            "equal",
        ),
        (
            TABLE.replace("Cat", "Dog").replace("| Dog |\n| 2 | Blue | Dog", "| Dog |\n| 2 | Blue | Cat"),
            "unequal",
        ),
        ("house 1: red; house 2: blue", "unequal"),
        ("house 1: red, cat", "unequal"),
        ("house 1: red, cat, dog; house 2: blue, dog, cat", "unequal"),
        (TABLE + "\n| 3 | green | fox |", "unequal"),
        ("house 1: red, cat; house 2: blue, dog; house 1: green, cat", "unequal"),
        ("red and blue", "unparsable"),
    ],
)
def test_grids(reference: str, answer: str, verdict: str) -> None:
    assert compare_logic(reference, answer) == verdict


def test_named_attributes_must_match() -> None:
    assert compare_logic('{"h 1": {"x": "1", "y": "2"}}', "h 1: x=2, y=1") == "unequal"


def test_a_reference_of_no_form_is_refused() -> None:
    for reference in ("", "just words", "[1"):
        with pytest.raises(ValueError, match="logic reference"):
            read_reference(reference)


@pytest.mark.parametrize(
    "piece", ["a", "a: ", "| a ", "{", "[", "a is ", ", ", ";", ">", "1. a\n", " and ", "\ud800"]
)
@pytest.mark.parametrize("reference", ["true", "{a, b}", "A > B", KNIGHTS])
def test_hostile_answers_get_a_verdict(reference: str, piece: str) -> None:
    for size in (3900, 10**6):
        assert compare_logic(reference, piece * (size // len(piece))) in ("unequal", "unparsable")
