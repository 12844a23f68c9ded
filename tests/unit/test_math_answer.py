"""Math answers: what is found in a response, and what is equal to what."""

# ruff: noqa: RUF001  (look-alike characters are what is tested)

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

import pytest

from r1mega.rewards.math_answer import MAX_ANSWER, boxed, extract_answer, normalised, quantity, quick_compare
from r1mega.rewards.workers import WorkerPool

EQUAL = [
    ("1/3", r"\frac13"),
    (r"\dfrac{1}{3}", "2/6"),
    (r"\frac{1}{2}", "0.5"),
    (r"50\%", "0.5"),
    ("50", r"50\%"),
    (r"28\%", "28 percent"),
    ("$1,234.50", "1234.5"),
    ("1251", "1{,}251"),
    ("1030", r"1\!,030"),
    ("90000", "90 000"),
    ("35 cm", r"35\text{ cm}"),
    ("5 kilometers", "5 km"),
    ("7 hours", "7"),
    ("18 dollars", "$18"),
    ("3 1/5", "16/5"),
    (r"2\frac{1}{2}", "2.5"),
    ("1½", "3/2"),
    ("-5", "−5"),
    ("３", "3"),
    ("1.5e3", "1500"),
    ("1.5 × 10³", "1500"),
    (r"36^\circ", "36°"),
    (r"36^{\circ}", "36"),
    ("18.00", "18"),
    (".5", "0.5"),
    ("17", "+17"),
    ("x = 3", "3"),
    (r"\text{(B)}", "b"),
    (r"\text{Tuesday}", "tuesday"),
    ("[1,2]", "[1, 2]"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("1,2,3", "3, 2, 1"),
    (r"(\frac12, 3)", "(0.5,3)"),
    ("12:30", "12:30"),
    ("12", r"$\boxed{12}$"),
    ("6", "$6$."),
    (r"11,\! 111,\! 100", "11111100"),
    ("14{,}916", "14 {, }916"),
    ("14 right triangles", "14"),
    (r"34\text{ sq. units}", "34"),
    ("7 hours", "420 minutes"),
    (r"\$0.50", "50 cents"),
    ("5 million", "5000000"),
    ("A, B, E", "E, A and B"),
    (r"\text{A,B}", r"\text{A, B}"),
    ("1\u202f000", "1000"),
    ("2:30 pm", "2:30 p.m."),
    ("The answer is 12.", "12"),
    ("**12**", "12"),
    (r"\approx 8.24", "8.24"),
    ("(p,q)=(3,2)", "(3,2)"),
    ("a=1, b=2", "1, 2"),
]
EQUAL_BY_SYMPY = [
    (r"\sqrt{8}", "2√2"),
    (r"\frac{\pi}{2}", "π/2"),
    ("x²", "x^2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("[0, 1)", r"0 \le x < 1"),
    (r"(-\infty, 3)", "x<3"),
    (r"(2, \infty)", "(2,∞)"),
    (r"\sqrt{-4}", "2i"),
    (r"e^{i\pi}", "-1"),
    (r"0.\overline{3}", r"\frac13"),
    ("5!", "120"),
    ("100000", "10^5"),
    (r"5\text{ or }7", "5, 7"),
    ("y=2x", "2x"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\pm 3", "3, -3"),
    (r"6\pi\text{ cm}^2", r"6\pi"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}"),
    ("x^2/4+y^2/3=1", "3x^2+4y^2=12"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3"),
    (r"\sqrt[3]{-8}", "-2"),
    ("204_5", "204_{5}"),
    (r"\begin{pmatrix}1/2&0\\0&1\end{pmatrix}", r"\begin{pmatrix}0.5&0\\0&1\end{pmatrix}"),
    ("p - q", "-q + p"),
    (r"\frac\pi 2", r"\pi/2"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}"),
]
UNEQUAL = [
    ("1/3", "0.3333"),
    ("1/3", "0.333333333333"),
    ("(1,2)", "[1,2]"),
    ("[1,2)", "(1,2]"),
    ("(1,2)", "(2,1)"),
    ("12:00", "1:00"),
    ("12:30", "12.5"),
    ("5 km", "5 m"),
    ("12", "1 2"),
    ("100", "1 00"),
    ("0", "-0.0000001"),
    ("1,2", "1,2,3"),
    ("A", "B"),
    (r"50\%", "5"),
    ("10", "100"),
    ("2107", "-2107"),
    (r"\frac{33}{100}", r"\frac{100}{33}"),
    ("5", "5,5"),
    ("(4,112)", "[4,112]"),
    (r"\{1,2\}", "(1,2)"),
    ("20 miles", "20 square feet"),
    (r"20\%", r"20^\circ"),
    (r"\$180", "180 miles"),
    ("5.4 cents", r"\$5.4"),
    ("2:30 am", "2:30 pm"),
    ("1:2", "1/2"),
    (r"\text{odd}", r"\text{even}"),
    ("A, B", "A, B, C"),
    ("5", "5 or 7"),
    ("1.5e3", "1.5e4"),
]
UNEQUAL_BY_SYMPY = [
    (r"\sqrt{2}", "1.414214"),
    (r"\pi", "22/7"),
    (r"\pi", "3.14159265"),
    (r"(\sqrt2,1]", r"[\sqrt2,1)"),
    ("x+1", "x-1"),
    ("7", "7 or 8"),
    ("5", "5x"),
    ("(0,1)", r"0 \le x \le 1"),
    ("Evelyn", "Debra"),
    ("x=3", "x=4"),
    ("3", "3, 4"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    (r"\sqrt{x^2}", "x"),
    (r"(\sqrt{2},\sqrt{3})", r"(\sqrt{3},\sqrt{2})"),
    (r"(5,\infty)", r"(\infty,5)"),
    ("x^2+y^2=1", "x^2+y^2=2"),
    ("y=2x+3", "y=2x-3"),
    ("204_5", "204_6"),
    ("5", "5xy"),
    (r"2\pi", r"2\pi^2"),
    ("xy", "x+y"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"\sqrt{2}", "1.41421356237309504880168872420969807856967187537694"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, cpu_seconds=1.0, memory_mib=1024) as pool:
        yield pool


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>1</think><answer> 42 </answer>", "42"),
        ("<think>1</think><answer>41</answer> no: <answer>42</answer>", "42"),
        (r"<think>1</think><answer>so \boxed{4}</answer>", r"so \boxed{4}"),
        (r"<think>\boxed{1}</think> It is \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{1}, then \boxed{\text{\}}2}", r"\text{\}}2"),
        ("so it is\n#### 1,002", "1,002"),
        (r"so \boxed{-2} \quad \text{and} \quad \boxed{1}.", "-2, 1"),
        (r"\boxed{5} after some words \boxed{7}", "7"),
        (r"\boxed{5}. \boxed{5}", "5"),
        ("#### 5\nThat is all", "5"),
        ("<think><answer>41</answer></think> \\boxed{42}", "42"),
        ("<think><answer>41</answer> #### 41 \\boxed{41}</think> I do not know", None),
        ("<think>a</think><answer>1</answer><think>b</think><answer>2</answer>", "2"),
        ("<think><answer>42</answer>", None),
        ("<think>it is 42", None),
        (r"<think>\boxed{42}", None),
        (r"<think>\boxed{42}</think>", None),
        ("<answer>42", None),
        ("<answer>  </answer>", None),
        ("42", None),
        (r"\boxed{42", None),
        ("</answer>42<answer>", None),
        ("", None),
    ],
)
def test_the_answer_is_what_the_response_commits_to(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("first 3, then 1,234.5 apples.", "1,234.5"),
        ("it is -7", "-7"),
        ("half: 1/2", "1/2"),
        ("about 15%", "15%"),
        ("<think>5</think> none", None),
        (r"\boxed{4} and not 5", "4"),
        ("no number", None),
    ],
)
def test_the_last_number_counts_only_when_asked_for(response: str, number: str | None) -> None:
    assert extract_answer(response, last_number=True) == number
    if "boxed" not in response:
        assert extract_answer(response) is None


def test_nested_boxes_give_the_outermost_content() -> None:
    assert boxed(r"\boxed{a \boxed{b} c}") == r"a \boxed{b} c"
    assert boxed(r"\fbox {x}") == "x"


# ---------------------------------------------------------------- exact stages


@pytest.mark.parametrize(("gold", "pred"), EQUAL)
def test_equal_answers_are_known_without_sympy(gold: str, pred: str) -> None:
    assert quick_compare(gold, pred) == "equal"
    assert quick_compare(pred, gold) == "equal"


@pytest.mark.parametrize(("gold", "pred"), UNEQUAL)
def test_unequal_answers_are_known_without_sympy(gold: str, pred: str) -> None:
    assert quick_compare(gold, pred) == "unequal"
    assert quick_compare(pred, gold) == "unequal"


def test_every_spelling_of_a_random_fraction_is_the_same_number() -> None:
    rng = random.Random()
    for _ in range(300):
        top, bottom = rng.randint(-9999, 9999), rng.randint(1, 9999)
        value = Fraction(top, bottom)
        sign = "-" if top < 0 else ""
        whole, rest = divmod(abs(top), bottom)
        factor = rng.randint(2, 9)
        spellings = [
            f"{top}/{bottom}",
            rf"\frac{{{top * factor}}}{{{bottom * factor}}}",
            rf"${sign}\dfrac{{{abs(top)}}}{{{bottom}}}$.",
            rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}",
        ]
        for spelling in spellings:
            found = quantity(normalised(spelling))
            assert found is not None, spelling
            assert found.value == value, spelling


def test_a_rounded_decimal_is_never_the_fraction() -> None:
    rng = random.Random()
    for _ in range(200):
        top, bottom = rng.randint(1, 999), rng.choice([3, 7, 9, 11, 13, 17, 21])
        if top % bottom:
            digits = rng.randint(1, 15)
            assert quick_compare(f"{top}/{bottom}", f"{top / bottom:.{digits}f}") == "unequal"


def test_a_long_answer_is_named_and_not_compared() -> None:
    assert quick_compare("5", "5" + " " * MAX_ANSWER) == "too_long"
    assert quick_compare("5", "") == "unparsable"


# ---------------------------------------------------------------- sympy, in workers


def test_sympy_finds_what_text_cannot(pool: WorkerPool) -> None:
    pairs = [(*pair, "equal") for pair in EQUAL_BY_SYMPY] + [(*pair, "unequal") for pair in UNEQUAL_BY_SYMPY]
    futures = [(gold, pred, verdict, pool.submit("math", gold, pred)) for gold, pred, verdict in pairs]
    wrong = [
        (gold, pred, future.result()) for gold, pred, verdict, future in futures if future.result() != verdict
    ]
    assert not wrong
