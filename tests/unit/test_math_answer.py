"""Math answers: what is found in a response, what is equal to what, and what a hostile answer can do (nothing)."""

# ruff: noqa: RUF001  (look-alike characters are what is tested)

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from r1mega.rewards.math_answer import MAX_ANSWER, boxed, extract_answer, normalised, quantity, quick_compare
from r1mega.rewards.workers import WorkerPool

SHARED = Path(os.environ.get("R1MEGA_SHARED", Path(__file__).resolve().parents[3] / "shared"))

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


HOSTILE = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "10^{10^{10}}",
    "1000000!",
    "((10!)!)!",
    "(" * 2000 + "5" + ")" * 2000,
    "(" * 2000,
    "{" * 2000,
    r"\frac" * 700,
    r"\frac{1}{" * 300 + "2" + "}" * 300,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    r"\left(" * 300,
    "5" * 3999,
    "1+" * 1900 + "1",
    "x^" * 1000 + "x",
    "__import__('os').system('touch PWNED')",
    "$__import__('os').system('touch PWNED')$",
    r"\boxed{__import__('pathlib').Path('PWNED').touch()}",
    "exec(open('/etc/passwd').read())",
    r"\operatorname{__import__}(\text{os})",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: 5",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{1000000000}",
    r"\int_0^{\infty} e^{-x^{x^x}} dx",
    r"\sum_{k=1}^{\infty}\frac{1}{k^{k}}",
    r"\lim_{x\to 0} \sin(\sin(\sin(\sin(x))))^{1/x}",
    r"\prod_{n=1}^{10^9} n",
    "(x+1)^{100000}",
    "(x+y+z+1)^{300}-(x+y+z+1)^{300}",
    r"\log(\log(\log(\log(0))))",
    r"\frac{0}{0}",
    r"\infty - \infty",
    "nan",
    "%s %d {0} {}",
    "\x00\x01\x02",
    "\ud800",
    "🎉" * 1000,
    "\\" * 3000,
    "$" * 3000,
    "a,b," * 900,
]


def test_hostile_answers_neither_hang_nor_run_nor_spoil_the_next() -> None:
    before = set(os.listdir("/"))  # the workers' directory
    futures = []
    with WorkerPool(2, cpu_seconds=0.4, memory_mib=1024) as pool:
        for text in HOSTILE:
            futures += [pool.submit("math", "5", text), pool.submit("math", r"\sqrt{8}", r"2\sqrt{2}")]
        verdicts = [future.result(timeout=240) for future in futures]
    assert set(verdicts[1::2]) == {"equal"}
    assert not set(verdicts[::2]) & {"equal", "fault"}, Counter(verdicts[::2])
    assert set(verdicts[::2]) <= {"unequal", "unparsable", "timeout", "too_long", "memory"}
    assert "timeout" in verdicts
    assert set(os.listdir("/")) == before
    assert not Path("PWNED").exists()


def test_a_million_characters_are_read_once_and_refused() -> None:
    for text in (
        "<answer>" + "9" * 10**6 + "</answer>",
        "<answer>" * 125_000,
        r"\boxed{" * 140_000,
        "#" * 10**6,
    ):
        answer = extract_answer(text)
        assert answer is None or quick_compare("5", answer) == "too_long"


@pytest.mark.skipif(not (SHARED / "data/math_pairs").exists(), reason=f"no shared data at {SHARED}")
def test_labelled_pairs_are_judged_as_labelled(pool: WorkerPool) -> None:
    rows = [json.loads(line) for line in (SHARED / "data/math_pairs/open.jsonl").read_text().splitlines()]

    def text(row: dict, key: str) -> str:
        return row[key] if row["raw"] else rf"\boxed{{{row[key]}}}"

    futures = [pool.submit("math", text(row, "gold"), text(row, "pred")) for row in rows]
    verdicts = [future.result(timeout=240) for future in futures]
    right = [(verdict == "equal") == row["equal"] for verdict, row in zip(verdicts, rows, strict=True)]
    false_accepts = [
        (row["gold"], row["pred"])
        for verdict, row in zip(verdicts, rows, strict=True)
        if verdict == "equal" and not row["equal"] and not row.get("doubt")
    ]
    assert sum(right) / len(rows) >= 0.985
    assert len(false_accepts) <= 1, false_accepts
