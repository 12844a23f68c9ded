"""Programs that try to be rewarded without solving the problem. Each runs beside an honest solution of the same one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from r1mega.bench.code_hacks import DOUBLED, HONEST_DOUBLED, HONEST_SORTED, SORTED, SORTED_HACKS, STDIN_HACKS
from r1mega.rewards.code_tests import CodeTests
from r1mega.rewards.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def checker() -> Iterator[CodeTests]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(slots=2) as sandbox:
        yield CodeTests(sandbox, Limits(cpu_seconds=2.0, wall_seconds=60.0))


def test_the_honest_solution_is_accepted(checker: CodeTests) -> None:
    assert checker.check(HONEST_SORTED, SORTED).verdict == "passed"


@pytest.mark.parametrize("hack", SORTED_HACKS)
def test_a_hack_is_rejected_and_the_next_honest_solution_accepted(checker: CodeTests, hack: str) -> None:
    verdict = checker.check(SORTED_HACKS[hack], SORTED)
    assert verdict.verdict not in ("passed", "sandbox_fault", "unparsable_tests"), (hack, verdict)
    assert verdict.passed < verdict.total
    assert verdict.reward == 0.0
    assert checker.check(HONEST_SORTED, SORTED).verdict == "passed"


MEAN = json.dumps({"asserts": ["assert abs(mean([1, 2]) - 1.5) < 1e-6", "assert abs(mean([4]) - 4) < 1e-6"]})
HONEST_MEAN = "def mean(values):\n    return sum(values) / len(values)\n"


@pytest.mark.parametrize(
    "answer",
    [
        "float('nan')",
        "complex('nan')",
        "float('inf')",
        "type('T', (float,), {'__sub__': lambda a, b: 0.0, '__rsub__': lambda a, b: 0.0})(9)",
        "type('T', (), {'__sub__': lambda a, b: 0.0})()",
        "type('T', (float,), {'__abs__': lambda a: 0.0})('nan')",
        "__import__('decimal').Decimal('nan')",
        "''",
        "None",
    ],
)
def test_numbers_that_are_near_everything_are_rejected(checker: CodeTests, answer: str) -> None:
    assert checker.check(HONEST_MEAN, MEAN).verdict == "passed"
    assert checker.check(f"def mean(values):\n    return {answer}\n", MEAN).verdict != "passed"


ALIAS = json.dumps(
    {"test": "values = [3, 1, 2]\nassert solve(values) == sorted(values)\nassert len(values) == 3"}
)


@pytest.mark.parametrize(
    "body",
    [
        "values.clear(); return values",
        "values[:] = [1, 1, 1]; return values",
        "del values[1:]; return values",
    ],
)
def test_changing_an_argument_does_not_change_what_is_expected(checker: CodeTests, body: str) -> None:
    assert checker.check(HONEST_SORTED, ALIAS).verdict == "passed"
    assert checker.check(f"def solve(values):\n    {body}\n", ALIAS).verdict == "wrong_answer"


RAISES = json.dumps(
    {
        "test": "try:\n    root(-1)\n    assert False\nexcept ValueError:\n    pass\nassert root(4) == 2\n",
        "entry_point": "root",
    }
)
HONEST_ROOT = "def root(x):\n    if x < 0:\n        raise ValueError(x)\n    return int(x**0.5)\n"


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError",
        "raise type('Both', (ValueError, AssertionError), {})",
        "return 2",
        "return ValueError()",
        "raise AssertionError",
        "raise type('ValueError', (BaseException,), {})",
        "import sys; sys.exit(0)",
    ],
)
def test_raising_what_a_test_expects_is_no_solution(checker: CodeTests, body: str) -> None:
    assert checker.check(HONEST_ROOT, RAISES).verdict == "passed"
    verdict = checker.check(f"def root(x):\n    {body}\n", RAISES)
    assert verdict.verdict in ("wrong_answer", "runtime_error"), verdict


LOOP = json.dumps({"asserts": ["assert all(map(even, [2, 4, 6]))", "assert list(map(even, [])) == []"]})


@pytest.mark.parametrize(
    "error", ["StopIteration", "StopAsyncIteration", "type('E', (StopIteration,), {})", "GeneratorExit"]
)
def test_an_exception_does_not_end_the_loop_of_a_test(checker: CodeTests, error: str) -> None:
    assert checker.check("def even(x): return x % 2 == 0", LOOP).verdict == "passed"
    assert checker.check(f"def even(x): raise {error}", LOOP).verdict == "runtime_error"


STACK = json.dumps(
    {
        "test": "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.size == 1\nassert s.top is not None",
        "classes": ["Stack"],
    }
)
HONEST_STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, value): self.items.append(value)
    def pop(self): return self.items.pop()
    size = property(lambda self: len(self.items))
    top = property(lambda self: self.items[-1])
"""
STACK_HACKS = [
    """
class Stack:
    def __getattr__(self, name): return self
    def __call__(self, *args): return self
    def __eq__(self, other): return True
""",
    """
class Stack:
    size = 1
    top = 1
    def push(self, value): pass
    def pop(self): return self
    def __eq__(self, other): return True
    def __bool__(self): return True
""",
]


@pytest.mark.parametrize("hack", STACK_HACKS)
def test_an_object_of_the_class_under_test_is_never_asked_whether_it_is_equal(
    checker: CodeTests, hack: str
) -> None:
    assert checker.check(HONEST_STACK, STACK).verdict == "passed"
    assert checker.check(hack, STACK).verdict in ("wrong_answer", "runtime_error")


@pytest.mark.parametrize("hack", STDIN_HACKS)
def test_a_program_that_looks_for_its_expected_output_finds_nothing(checker: CodeTests, hack: str) -> None:
    assert checker.check(HONEST_DOUBLED, DOUBLED).verdict == "passed"
    verdict = checker.check(STDIN_HACKS[hack], DOUBLED)
    assert verdict.verdict in ("wrong_answer", "runtime_error"), verdict
    assert verdict.passed < 2


FORGER = """
import os, sys, time
def answer(body):
    frame = sys._getframe()
    while "request" not in frame.f_locals: frame = frame.f_back
    payload = frame.f_locals["request"][:16] + body
    view = memoryview(len(payload).to_bytes(4, "big") + payload)
    while view: view = view[os.write(3, view):]
    time.sleep(600)
"""
"""Knows the id of the request that is being answered, and answers it in the place of its runner."""
TEN_MILLION = '["range","0","989680","1"]'


@pytest.mark.parametrize(
    "body",
    [
        """b'["list","raise",["int","' + b"f" * 5000 + b'"]]'""",
        f"b'{TEN_MILLION}'",
        f"""b'["list","ok",{TEN_MILLION}]'""",
        f"""b'["list","raise",{TEN_MILLION},"x"]'""",
        """b'["list","raise",["list","ValueError"],"' + b"x" * 100000 + b'"]'""",
        """b'["list","compile",["int","' + b"f" * 5000 + b'"]]'""",
        """b'["list","compile"]'""",
        """b"[" * 60000""",
        """b"9" * 60000""",
        """b"\\xff" """,
        """b"" """,
    ],
)
def test_the_first_answer_is_never_made_a_value(checker: CodeTests, body: str) -> None:
    found = checker.check(f"{FORGER}answer({body})\n", SORTED)
    assert (found.verdict, found.detail) == ("runtime_error", "forged answer to the first request")


def test_what_a_candidate_says_of_its_failure_can_be_logged(checker: CodeTests) -> None:
    said = """b'["list","raise",["list",5,"ValueError",["list"]],"\\\\ud800"]'"""
    for found in (
        checker.check(f"{FORGER}answer({said})\n", SORTED),
        checker.check("def solve(values): raise ValueError('\\ud800')\n", SORTED),
        checker.check("raise ValueError('\\ud800')\n", SORTED),
    ):
        assert found.verdict == "runtime_error", found
        assert "ValueError" in found.detail
        assert found.detail.encode()


def test_an_error_of_a_name_without_end_does_not_break_the_tests(checker: CodeTests) -> None:
    said = """b'["list","raise",["list","' + b"x" * ((8 << 20) - 40) + b'"],""]'"""
    found = checker.check(f"{FORGER}def solve(values): answer({said})\n", SORTED)
    assert found.verdict == "runtime_error", found


def test_an_answer_that_has_no_text_does_not_break_the_tests(checker: CodeTests) -> None:
    spec = json.dumps({"test": "try:\n    assert f(1) == 2, f(1)\nexcept KeyError:\n    pass\n"})
    assert checker.check("def f(x): return 2", spec).verdict == "passed"
    assert checker.check("def f(x): return 10**5000", spec).verdict == "wrong_answer"
