"""Code rewards: what is taken for the program, what a specification may say, what passes and what does not."""

# ruff: noqa: E501  (one case a line)

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.config import ConfigError
from r1mega.rewards.code_answer import extract_code
from r1mega.rewards.code_asserts import instrument
from r1mega.rewards.code_spec import AssertTests, StdinTests, free_names, livecodebench_tests, parse_tests
from r1mega.rewards.code_tests import CodeTests, same_output
from r1mega.rewards.jailed.plain_data import MAX_DEPTH, MAX_ITEMS, PlainDataError, decode, encode
from r1mega.rewards.sandbox import Limits, RunResult, Sandbox, Session

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=60.0)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(slots=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def checker(sandbox: Sandbox) -> CodeTests:
    return CodeTests(sandbox, LIMITS)


def asserts(*lines: str, **fields: Any) -> str:
    return json.dumps({"asserts": lines, **fields})


# ---------------------------------------------------------------- extraction

FENCE = "```"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nx = 0\n```</think>Here:\n```py\nx = 1\n```\n", "x = 1\n"),
        ("<think>t</think><answer>\n```\nx = 1\n```\n</answer>", "x = 1\n"),
        ("```python\nx = 0\n```\n<answer>\n```Python3\nx = 1\n```\n</answer>", "x = 1\n"),
        ("```python\nx = 0\n```\nbetter:\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\noutput:\n```\n1\n```\nrun:\n```bash\npython x.py\n```", "x = 1\n"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ('```python title="a"\nx = 1\n```', "x = 1\n"),
        ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
        ("<think>```python\nx = 0\n```", None),
        ("<think>```python\nx = 0\n```</think>no code", None),
        ("```python\nx = 1\n```\n<answer>42</answer>", None),
        ("```python\nx = 1", None),
        ("```bash\nls\n```", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_fenced_block_of_the_final_part(response: str, code: str | None) -> None:
    assert extract_code(response, "python") == code


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("~~~" + " " * 500_000 + "`", None),
        (" " * 1_000_000, None),
        ("```" + "\t" * 500_000 + "`\n" + FENCE, None),
        ("`" * 1_000_000 + "x`", None),
        ("~" * 999_998 + "`", None),
        ("```\n" + " " * 500_000 + "x\n```" + " " * 490_000 + "x", None),
        ("```x\n" * 200_000, None),
        ("```\n" * 200_001 + "1\n" + FENCE, "1\n"),
        ("~~~x\n```x\n" * 100_000, None),
        ("````\n" + "```\n" * 250_000, None),
        ("".join("`" * count + "x\n~~~\n" for count in range(1400, 2, -1)), None),
        ("".join("`" * count + "\n1\n" + "`" * count + "\n" for count in range(3, 900)), "1\n"),
        ("<answer>" * 100_000, None),
    ],
    ids=range(13),
)
def test_a_long_hostile_response_is_read_in_one_pass(response: str, code: str | None) -> None:
    with cpu_limit(10.0):
        assert extract_code(response) == code


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """For what could take hours: TimeoutError after so much CPU time of this process; regular expressions heed it."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_cpp_program_is_found_by_its_language() -> None:
    response = "```python\nx = 1\n```\n```cpp\nint main() {}\n```\n```\noutput\n```"
    assert extract_code(response, "c++") == "int main() {}\n"


# ---------------------------------------------------------------- specifications


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "not JSON"),
        ("[1]", "a JSON object is needed"),
        ("{}", "none of stdin, asserts, test, inputs"),
        ('{"stdin": ["1"], "stdout": []}', "stdout must be a list of texts"),
        ('{"stdin": ["1", "2"], "stdout": ["1"]}', "2 stdin and 1 stdout"),
        ('{"stdin": [1], "stdout": ["1"]}', "stdin must be a list of texts"),
        ('{"stdin": ["1"], "stdout": ["1"], "language": "cobol"}', "'cobol'"),
        ('{"stdin": ["1"], "stdout": ["1"], "tolerance": -1}', "tolerance -1"),
        ('{"stdin": ["1"], "stdout": ["1"], "stdouts": []}', "'stdouts' is not known"),
        ('{"asserts": "assert f(1)"}', "asserts must be a list"),
        ('{"asserts": ["assert f(1"]}', "no Python"),
        ('{"asserts": ["assert 1 == 1"]}', "name an entry_point"),
        ('{"asserts": ["assert f(1)"], "entry_point": "f()"}', "no name"),
        ('{"asserts": ["assert f(1)"], "language": "c++"}', "stdin and stdout tests only"),
        ('{"test": 3}', "test must be text"),
        ('{"inputs": [[1]], "outputs": [], "fn_name": "f"}', "1 inputs and 0 outputs"),
        ('{"inputs": ["1 2"], "outputs": [1], "fn_name": "f"}', "JSON lines"),
        ('{"stdin": ["a\\ud800"], "stdout": ["1"]}', "no UTF-8"),
        ('{"stdin": ["1"], "stdout": ["\\udfff"]}', "no UTF-8"),
        ('{"asserts": ["assert f(1)"], "setup": "x = \'\\ud800\'"}', "no Python"),
        ('{"asserts": ["assert f(1)"], "preamble": "x = ("}', "preamble is no Python"),
        ('{"inputs": [[1]], "outputs": [1], "fn_name": "f", "preamble": "x = ("}', "preamble is no Python"),
        ('{"asserts": ["assert f(1)"], "entry_point": 3}', "no name"),
        ('{"test": "assert f(1)\\nnonlocal x"}', "cannot be compiled"),
    ],
)
def test_a_mistake_in_a_specification_is_named(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match="tests of a program") as error:
        parse_tests(spec)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["test", "setup", "preamble"])
def test_tests_longer_than_a_jail_is_sent_are_refused(key: str) -> None:
    fields = {"test": "assert f(1) == 1", key: f"x = '{'é' * 1_500_000}'\nassert f(1) == 1"}
    with pytest.raises(ConfigError, match="bytes of code"):
        parse_tests(json.dumps(fields))


def test_entry_points_are_the_names_that_nobody_defines() -> None:
    source = "import os\nk = 2\ndef helper(a):\n    return outer(a, k)\nassert helper(g(len(h.x)))\nx = [y for y in z]"
    assert free_names(source) == ["g", "h", "outer", "z"]
    parsed = parse_tests(asserts("assert math.isclose(f(1), 2)"))
    assert isinstance(parsed, AssertTests)
    assert parsed.entry_points == ("f",)
    assert parsed.setup.startswith("import math")


def test_apps_and_livecodebench_rows_become_tests() -> None:
    assert parse_tests('{"inputs": ["1\\n"], "outputs": ["2\\n"]}') == StdinTests("python", (("1\n", "2\n"),))
    cases = [{"input": "[1, 2]\n3", "output": "[2, 1]", "testtype": "functional"}]
    parsed = parse_tests(livecodebench_tests(cases, "turn"))
    assert isinstance(parsed, AssertTests)
    assert parsed.entry_points == ("turn",)
    assert "*[[1, 2], 3]" in parsed.test


# ---------------------------------------------------------------- plain data

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**50), max_value=10**50)
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.binary())
    ),
    max_leaves=20,
)


def same_types(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_types, left, right))
    if isinstance(left, dict):
        return all(map(same_types, left.values(), right.values()))
    return True


@settings(max_examples=100, deadline=None)
@given(PLAIN)
def test_plain_data_arrives_as_it_was_sent(value: Any) -> None:
    received = decode(encode(value))
    assert received == value
    assert same_types(received, value)


def test_nan_infinities_signed_zero_and_lone_surrogates_arrive() -> None:
    received = decode(encode([math.nan, math.inf, -math.inf, -0.0, "\ud800", 10**5000]))
    assert math.isnan(received[0])
    assert received[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, received[3]) == -1
    assert received[4:] == ["\ud800", 10**5000]


def test_subclasses_arrive_as_their_base() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    kinds = [int, float, str, bytes, list, tuple, dict, set, frozenset]
    for kind in kinds:
        value = type("Sub", (Odd, kind), {"__iter__": lambda self: iter([1]), "__len__": lambda self: 7})()
        received = decode(encode(value))
        assert type(received) is kind
        assert received == kind()
    point = collections.namedtuple("Point", "x y")(1, 2)
    received = decode(encode([point, collections.Counter("aab"), collections.deque([1], 5)]))
    assert received == [(1, 2), {"a": 2, "b": 1}, collections.deque([1])]
    assert [type(value) for value in received] == [tuple, dict, collections.deque]


def test_iterators_ranges_and_views_keep_their_sense() -> None:
    table = {"a": 1, "b": 2}
    keys, values, items, numbers, squares = decode(
        encode([table.keys(), table.values(), table.items(), range(9, 1, -2), (n * n for n in range(3))])
    )
    assert (keys, list(values), items, numbers) == (table.keys(), [1, 2], table.items(), range(9, 1, -2))
    assert squares != [0, 1, 4]
    assert list(squares) == [0, 1, 4]


def test_what_is_not_plain_or_too_much_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: list[Any] = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    endless = iter(int, 1)
    for value in (
        object(),
        print,
        Odd,
        lambda: 0,
        json,
        loop,
        deep,
        endless,
        [0] * (MAX_ITEMS + 1),
        "x" * (9 << 20),
    ):
        with pytest.raises(PlainDataError):
            encode(value)


class Odd:
    """Not plain."""


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b'{"a":1}', b"NaN", b"[NaN]", b"[]", b'["eval","1"]', b'["list",["set",["list"]]]', b'["dict",1]',
        b'["int","zz"]', b'["int",1]', b'["fraction","1","0"]', b'["handle",0]', b'["handle",true]', b'["range","1"]',
        b'["datetime","x"]', b'["type","object"]', b"[" * 100_000, b'["list",' * 5000 + b"1" + b"]" * 5000, b"\xff",
        b'["float","__import__"]', b'[["list"]]', b'["bytes",5]', b"1" * 5000, b'["decimal",["list"]]',
    ],
)  # fmt: skip
def test_malformed_data_is_refused(data: bytes) -> None:
    with pytest.raises(PlainDataError):
        decode(data)


# ---------------------------------------------------------------- sites


def test_every_check_has_a_site_and_its_kind() -> None:
    test = """
assert a
for i in range(3):
    assert b
if c:
    assert d
try:
    f()
    assert False, "no error"
except ValueError:
    assert e
def test_one():
    assert g
class T(TestCase):
    def test_two(self):
        self.assertEqual(1, 1)
        with self.assertRaises(ValueError):
            h()
"""
    kinds = [site.kind for site in instrument(test).sites]
    assert kinds == ["always", "always", "sometimes", "never", "sometimes", "always", "always", "always"]


# ---------------------------------------------------------------- standard input and output

DOUBLE = json.dumps({"stdin": ["1\n", "21\n", "5\n"], "stdout": ["2\n", "42\n", "10\n"]})


@pytest.mark.parametrize(
    ("code", "verdict", "passed"),
    [
        ("print(2 * int(input()))", "passed", 3),
        ("print(2 * int(input()), ' \\n\\n')", "passed", 3),
        ("print(2)", "wrong_answer", 1),
        ("print(2.0 * int(input()))", "wrong_answer", 0),
        ("pass", "wrong_answer", 0),
        ("raise ValueError('SyntaxError')", "runtime_error", 0),
        ("print(2 * int(input())); exit(1)", "runtime_error", 0),
        ("print(2 * int(input())", "compile_error", 0),
        ("while True: pass", "time", 0),
        ("x = bytearray(4 << 30)", "memory", 0),
        ("x = []\nwhile True: x.append(bytes(1 << 20) + b'1')", "memory", 0),
        ("while True: print('x' * 100000)", "output_limit", 0),
    ],
)
def test_verdicts_of_stdin_tests(checker: CodeTests, code: str, verdict: str, passed: int) -> None:
    found = checker.check(code, DOUBLE)
    assert (found.verdict, found.passed, found.total) == (verdict, passed, 3), found
    assert found.reward == float(verdict == "passed")


def test_a_program_that_sleeps_is_out_of_time(sandbox: Sandbox) -> None:
    impatient = CodeTests(sandbox, replace(LIMITS, wall_seconds=1.0))
    assert impatient.check("import time; time.sleep(600)", DOUBLE).verdict == "time"
    assert (
        impatient.check("import time\ndef f(): time.sleep(600)", asserts("assert f() is None")).verdict
        == "time"
    )


def test_all_tests_can_be_run_for_the_share(sandbox: Sandbox) -> None:
    found = CodeTests(sandbox, LIMITS, run_all=True).check("print(10 if input() == '5' else 42)", DOUBLE)
    assert (found.verdict, found.passed, found.share) == ("wrong_answer", 2, 2 / 3)


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "same"),
    [
        ("1 2\n3", "1 2  \n3\n\n", None, True),
        ("1  2", "1 2", None, False),
        (" 1", "1", None, False),
        ("\n1", "1", None, False),
        ("0.3333", "0.33333333", 1e-3, True),
        ("0.34", "0.33333333", 1e-3, False),
        ("1000001", "1000000", 1e-5, True),
        ("nan", "1", 1e-3, False),
        ("nan", "nan", 1e-3, True),
        ("inf", "1", 1e-3, False),
        ("5", "inf", 1e-6, False),
        ("1", "1e999", 1e-6, False),
        ("-inf", "inf", 1e-6, False),
        ("inf", "inf", 1e-6, True),
        ("", "", 1e-6, True),
        ("1", "", 1e-6, False),
        ("1 2 3", "1 2.0", 1e-6, False),
        ("yes 1.0", "yes 1", 1e-3, True),
        ("1", "1 1", 1e-3, False),
    ],
)
def test_output_is_compared_by_lines_or_by_near_numbers(
    printed: str, expected: str, tolerance: float | None, same: bool
) -> None:
    assert same_output(printed, expected, tolerance) is same


CPP = "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << %s << std::endl; }\n"


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (CPP % "2 * n", "passed"),
        (CPP % "3 * n", "wrong_answer"),
        (CPP % "2 *", "compile_error"),
        ("int main() { return 3; }", "runtime_error"),
        ("int main() { for (volatile int i = 0;; ) i = i + 1; }", "time"),
    ],
)
def test_cpp_programs_are_tested(checker: CodeTests, code: str, verdict: str) -> None:
    if shutil.which("g++", path="/usr/bin") is None:
        pytest.skip("g++ is not installed")
    spec = json.dumps({**json.loads(DOUBLE), "language": "c++"})
    assert checker.check(code, spec).verdict == verdict


# ---------------------------------------------------------------- asserts


@pytest.mark.parametrize(
    ("code", "spec", "verdict"),
    [
        ("def f(x): return x + 1", asserts("assert f(1) == 2", "assert f(-1) == 0"), "passed"),
        ("def f(x): return x", asserts("assert f(1) == 2"), "wrong_answer"),
        ("def f(x): return str(x + 1)", asserts("assert f(1) == 2"), "wrong_answer"),
        ("def f(x): return [x]", asserts("assert f(1) == (1,)"), "wrong_answer"),
        ("def f(x): return None", asserts("assert abs(f(1) - 2) < 1"), "wrong_answer"),
        ("def g(x): return x", asserts("assert f(1) == 2"), "runtime_error"),
        ("def f(x): return 1 / 0", asserts("assert f(1) == 2"), "runtime_error"),
        ("def f(x): return f(x)", asserts("assert f(1) == 2"), "runtime_error"),
        ("def f(x: return 1", asserts("assert f(1) == 2"), "compile_error"),
        ("def f(x): return '\ud800'", asserts("assert f(1) == 2"), "compile_error"),
        ("def f(x):\n    while True: pass", asserts("assert f(1) == 2"), "time"),
        ("while True: pass", asserts("assert f(1) == 2"), "time"),
        ("def f(x): return bytearray(4 << 30)", asserts("assert f(1) == 2"), "memory"),
        ("def f(x):\n    while True: print('x' * 99999)", asserts("assert f(1) == 2"), "output_limit"),
        ("def f(x): return x", asserts("assert f(object()) == 2"), "unparsable_tests"),
        ("def f(x): return x", json.dumps({"test": "y = f(1)"}), "unparsable_tests"),
        ("def f(x): return x", asserts("assert f(1) == nowhere", entry_point="f"), "unparsable_tests"),
        ("def f(x): return x", asserts("assert f(1) == 1", setup="import no_such_module"), "unparsable_tests"),
        ("def f(x): return x", asserts("assert f(1) == 1", "raise SystemExit"), "wrong_answer"),
        ("def f(a, *b, c=3, **d): return a, b, c, d", asserts("assert f(1, 2, c=4, e=5) == (1, (2,), 4, {'e': 5})"), "passed"),
        ("if __name__ == '__main__':\n    1 / 0\ndef f(): return __name__", asserts("assert f() != '__main__'"), "passed"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(): return A(1).x", asserts("assert f() == 1"), "passed"),
        ("class Solution:\n    def f(self, x): return x + 1", asserts("assert f(1) == 2"), "passed"),
        ("def f(x): return x * y", asserts("assert f(1) == 2", preamble="y = 2"), "passed"),
    ],
)  # fmt: skip
def test_verdicts_of_assert_tests(checker: CodeTests, code: str, spec: str, verdict: str) -> None:
    found = checker.check(code, spec)
    assert found.verdict == verdict, found


@pytest.mark.parametrize(
    ("good", "bad", "test"),
    [
        ("values.sort()", "values.reverse()", "a = [2, 1, 3]\nf(a)\nassert a == [1, 2, 3]"),
        ("values['k'] = 1", "values['k'] = 2", "a = {}\nf(a)\nassert a == {'k': 1}"),
        ("values.add(1)", "values.add(2)", "a = set()\nf(a)\nassert a == {1}"),
        ("yield from values", "yield 1", "assert list(f([2, 1])) == [2, 1]"),
        ("raise KeyError('k')", "raise IndexError", "try:\n    f(1)\n    assert False\nexcept KeyError as e:\n    assert e.args == ('k',)"),
        ("class E(ValueError): pass\n    raise E('no')", "pass", "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    raise AssertionError"),
        ("return values + 1", "return 0", "def test_one():\n    assert f(1) == 2\ndef test_two():\n    assert f(2) == 3"),
        ("return values + 1", "return 0", "from solution import f as g\ndef test_one():\n    assert g(1) == 2"),
        ("return 7 // values", "return 0", "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 3)\n        with self.assertRaises(ZeroDivisionError):\n            f(0)"),
        ("return values * 2", "return 2", "def check(candidate):\n    for i in range(20):\n        assert candidate(i) == i + i"),
        ("return [values]", "return []", "for x in f(3):\n    assert x == 3"),
    ],
)  # fmt: skip
def test_forms_of_tests(checker: CodeTests, good: str, bad: str, test: str) -> None:
    spec = json.dumps({"test": test, "entry_point": "f"})
    found = checker.check(f"def f(values):\n    {good}\n", spec)
    assert found.verdict == "passed", found
    found = checker.check(f"def f(values):\n    {bad}\n", spec)
    assert found.verdict in ("wrong_answer", "runtime_error"), found


def test_an_assert_that_never_ran_is_not_passed(checker: CodeTests) -> None:
    found = checker.check(
        "def f(x): return []", json.dumps({"test": "assert f(1) == []\nfor x in f(3):\n    assert x == 3"})
    )
    assert (found.verdict, found.passed, found.total) == ("wrong_answer", 1, 2)
    assert "never ran" in found.detail


def test_the_share_of_asserts_is_counted(sandbox: Sandbox) -> None:
    spec = asserts("assert f(1) == 1", "assert f(2) == 3", "assert f(3) == 3", "assert f(4) == 1 / 0")
    every = CodeTests(sandbox, LIMITS, run_all=True).check("def f(x): return x", spec)
    assert (every.verdict, every.passed, every.total) == ("wrong_answer", 2, 4)
    first = CodeTests(sandbox, LIMITS).check("def f(x): return x", spec)
    assert (first.verdict, first.passed, first.total) == ("wrong_answer", 1, 4)
    assert "f(2) == 3" in first.detail


def test_objects_of_named_classes_are_constructed_changed_and_passed_on(checker: CodeTests) -> None:
    code = """
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def doubled(self): return Node(self.value * 2)
def total(node):
    return node.value + total(node.next) if node else 0
"""
    lines = [
        "assert total(a) == 3",
        "assert a.next.value == 2",
        "assert a.doubled().value == 2",
        "assert b.next is None",
    ]
    spec = asserts(*lines, setup="a = Node(1)\nb = Node(2)\na.next = b", classes=["Node"])
    assert checker.check(code, spec).verdict == "passed"
    assert checker.check(code.replace("* 2", "* 3"), spec).verdict == "wrong_answer"


def test_large_data_passes_in_both_directions(checker: CodeTests) -> None:
    spec = asserts("assert f(list(range(200000))) == list(range(200000, 0, -1))")
    assert checker.check("def f(v): return [x + 1 for x in reversed(v)]", spec).verdict == "passed"


def test_functional_cases_compare_as_json_does(checker: CodeTests) -> None:
    spec = json.dumps({"inputs": [[[1, 2], 3], [[], 0]], "outputs": [[[1, 2, 3]], [[0]]], "fn_name": "f"})
    assert checker.check("def f(a, b): return tuple(a) + (b,)", spec).verdict == "passed"
    assert checker.check("def f(a, b): return a", spec).verdict == "wrong_answer"


TABS = "\t" * 3_900_000


@pytest.mark.parametrize(
    ("code", "spec", "verdict"),
    [
        ("def f(x): return x", asserts(f"assert f('{TABS}') == 1"), "unparsable_tests"),
        ("def f(x): return x", asserts(f"assert f({'+'.join('1' * 600)}) == 600"), "unparsable_tests"),
        (f"def f(x): return '{'é' * 2_000_000}'", asserts("assert f(1) == 1"), "compile_error"),
        ("def f(x): return x", json.dumps({"stdin": ["\ud800"], "stdout": ["1"]}), "unparsable_tests"),
    ],
    ids=range(4),
)
def test_what_does_not_fit_into_a_message_has_its_verdict(
    checker: CodeTests, code: str, spec: str, verdict: str
) -> None:
    assert checker.check(code, spec).verdict == verdict


# ---------------------------------------------------------------- around it


def test_a_response_without_a_program_has_its_verdict(checker: CodeTests) -> None:
    assert checker.check_response("I do not know", DOUBLE).verdict == "no_code"
    assert (
        checker.check_response("<think>a</think>```python\nprint(int(input()) * 2)\n```", DOUBLE).reward
        == 1.0
    )
    assert checker.check_response("```python\n1\n```", "nonsense").verdict == "unparsable_tests"


def test_checks_from_an_event_loop_and_from_threads_run_side_by_side(checker: CodeTests) -> None:
    spec = asserts("assert f(3) == 9")
    codes = [f"def f(x): return x * {factor}" for factor in (3, 4)] * 10
    wanted = ["passed", "wrong_answer"] * 10

    async def together() -> list[str]:
        return [
            found.verdict
            for found in await asyncio.gather(*(checker.check_async(code, spec) for code in codes))
        ]

    assert asyncio.run(together()) == wanted
    with ThreadPoolExecutor(8) as threads:
        assert [
            found.verdict for found in threads.map(lambda code: checker.check(code, spec), codes)
        ] == wanted


def test_two_checkers_on_one_sandbox_do_not_wait_for_each_other() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(slots=2) as shared, ThreadPoolExecutor(8) as threads:
        checkers = [CodeTests(shared, LIMITS) for _ in range(4)]
        spec = asserts("assert f(3) == 3")
        checks = [
            threads.submit(checkers[number % 4].check, "def f(x): return x", spec) for number in range(48)
        ]
        _, unfinished = wait(checks, timeout=120)
        if unfinished:
            shared.close()  # ends those that wait, so that the threads can be joined
        assert not unfinished
        assert {check.result().verdict for check in checks} == {"passed"}


def test_closing_cancels_the_checks_that_have_not_begun() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")

    async def closed_meanwhile() -> list[Any]:
        with Sandbox(slots=2) as own:
            checker = CodeTests(own, Limits(wall_seconds=30.0))
            warm = checker.check("def f(x): return x", asserts("assert f(1) == 1"))  # starts both
            assert warm.verdict == "passed"
            checks = [
                asyncio.ensure_future(checker.check_async("import time; time.sleep(600)", DOUBLE))
                for _ in range(6)
            ]
            await asyncio.sleep(0)  # so that they stand in the queue
            closing = threading.Thread(target=checker.close)
            closing.start()
            waiting = await asyncio.gather(*checks[2:], return_exceptions=True)
            own.close()
            await asyncio.gather(*checks, return_exceptions=True)
            await asyncio.to_thread(closing.join)
            return waiting

    assert [type(found) for found in asyncio.run(closed_meanwhile())] == [asyncio.CancelledError] * 4


class StubbornSandbox(Sandbox):
    """On which killing the tester fails, after it was killed."""

    def open_pair(self, *sources: Any, **options: Any) -> tuple[Session, Session]:
        candidate, tester = super().open_pair(*sources, **options)
        killed = tester.kill

        def kill() -> None:
            killed()
            raise OSError("no such process")

        tester.kill = kill  # type: ignore[method-assign]
        return candidate, tester


def test_a_candidate_is_killed_even_where_killing_its_tester_fails() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with StubbornSandbox(slots=2) as stubborn:
        checker = CodeTests(stubborn, LIMITS)
        with pytest.raises(OSError, match="no such process"):
            checker.check("def f(x): return x", asserts("assert f(1) == 1"))
        both = (
            stubborn.open("pass"),
            stubborn.open("pass"),
        )  # would wait for ever for a slot that was not given back
        for session in both:
            session.kill()


def test_a_single_slot_is_refused() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(slots=1) as single, pytest.raises(ConfigError, match="two jails"):
        CodeTests(single)


class FailingSandbox(Sandbox):
    """A machine on which the first runs fail: the jail's server is killed from outside."""

    def __init__(self, *, slots: int, failures: int) -> None:
        self.failures = 0
        self.killed: set[int] = set()
        super().__init__(slots=slots)
        self.failures = failures

    def run(self, *args: Any, **options: Any) -> RunResult:
        result = super().run(*args, **options)
        if self.failures:
            self.failures -= 1
            return replace(result, outcome="fault", exit_code=None)
        return result

    def open_pair(self, *args: Any, **options: Any) -> tuple[Session, Session]:
        pair = super().open_pair(*args, **options)
        if self.failures:
            self.failures -= 1
            for pid in set(self.server_pids()) - self.killed:
                self.killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        return pair


@pytest.mark.parametrize(
    ("code", "spec", "failures", "verdict"),
    [
        ("print(2 * int(input()))", DOUBLE, 1, "passed"),
        ("print(2 * int(input()))", DOUBLE, 2, "sandbox_fault"),
        ("def f(x): return x", asserts("assert f(1) == 1"), 1, "passed"),
        ("def f(x): return x", asserts("assert f(1) == 1"), 2, "sandbox_fault"),
    ],
)
def test_a_fault_of_the_machine_is_tried_again_once_and_then_named(
    code: str, spec: str, failures: int, verdict: str
) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with FailingSandbox(slots=2, failures=failures) as failing:
        checker = CodeTests(failing, LIMITS)
        assert checker.check(code, spec).verdict == verdict
        assert checker.check(code, spec).verdict == "passed"


def test_values_of_every_kind_reach_the_candidate_and_come_back(checker: CodeTests) -> None:
    values = [None, True, 2**70, 1.5, 1j, "é\n", b"\x00", (1, [2]), {1: {2}}, Decimal("1.10"), Fraction(1, 3)]
    values += [datetime.date(2024, 2, 29), frozenset({1}), range(3)]
    setup = "import datetime\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    lines = [
        f"assert f({value!r}) == {value!r} and type(f({value!r})) is type({value!r})" for value in values
    ]
    assert (
        checker.check("def f(x): return x", asserts(*lines, setup=setup, entry_point="f")).verdict == "passed"
    )
