"""The code reward: a program passes its tests or it does not (R1, section 2.2.2: a compiler and predefined test cases).

Expected outputs never enter the jail of the program. Tests of standard input and output run the program once per
test and compare here; assert tests run in a second jail (code_calls.py). The paper gives no more than the
sentence above; all-or-nothing as the value and what is compared are ours.

A fault of the machine is tried again once and then has its own verdict; it is never a wrong answer.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from r1mega.config import ConfigError
from r1mega.rewards.code_answer import extract_code
from r1mega.rewards.code_asserts import instrument
from r1mega.rewards.code_calls import OUTCOMES, Pair, jailed_program, run_asserts
from r1mega.rewards.code_spec import AssertTests, StdinTests, parse_tests
from r1mega.rewards.code_verdict import CodeVerdict
from r1mega.rewards.sandbox import Limits, RunResult, Sandbox

ATTEMPTS = 2
"""Runs of one test whose jail fails."""
SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
DETAIL_CHARACTERS = 300


class CodeTests:
    """Tests programs in the jails of a sandbox, which remains the caller's. For use from any thread or event loop.

    limits: of each run of a program, that is of one test of standard input or all asserts together.
    run_all: go on after the first test that was not passed, so that the share means something.
    ConfigError where the sandbox has a single slot: assert tests need two jails at once.
    """

    def __init__(self, sandbox: Sandbox, limits: Limits | None = None, *, run_all: bool = False) -> None:
        slots = sandbox.slots
        if slots < 2:
            raise ConfigError(f"rewards.jails={slots}: assert tests need two jails at once; set 2 or more")
        self.sandbox = sandbox
        self.limits = limits or Limits()
        self.run_all = run_all
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="code-tests")

    def check_response(self, response: str, tests: str) -> CodeVerdict:
        """`check` of the program in a response (code_answer.py); "no_code" without one."""
        try:
            parsed = parse_tests(tests)
        except ConfigError as error:
            return CodeVerdict("unparsable_tests", 0, 0, str(error))
        code = extract_code(response, parsed.language)
        return self.check(code, tests)

    def check(self, code: str | None, tests: str) -> CodeVerdict:
        """code: the program; None: "no_code". tests: JSON text (code_spec.py)."""
        try:
            parsed = parse_tests(tests)
            total = _count(parsed)
        except ConfigError as error:
            return CodeVerdict("unparsable_tests", 0, 0, str(error))
        if code is None:
            return CodeVerdict("no_code", 0, total)
        if "\0" in code or not _is_utf8(code):
            return CodeVerdict("compile_error", 0, total, "the program is no UTF-8 text without NUL")
        if isinstance(parsed, StdinTests):
            return self._check_stdin(code, parsed)
        return self._check_asserts(code, parsed)

    async def check_async(self, code: str | None, tests: str) -> CodeVerdict:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.check, code, tests)

    async def check_response_async(self, response: str, tests: str) -> CodeVerdict:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self.check_response, response, tests
        )

    def close(self) -> None:
        """Cancels the checks that have not begun and waits for those under way; the sandbox stays open.

        Those end at once where the sandbox was closed before.
        """
        self._threads.shutdown(cancel_futures=True)

    # ------------------------------------------------------------ standard input and output

    def _check_stdin(self, code: str, tests: StdinTests) -> CodeVerdict:
        passed, first = 0, CodeVerdict("passed", 0, 0)
        for number, (stdin, expected) in enumerate(tests.cases):
            verdict, detail = self._run_case(code, tests, stdin, expected)
            passed += verdict == "passed"
            if verdict != "passed" and first.verdict == "passed":
                first = CodeVerdict(verdict, 0, 0, f"test {number}: {detail}")
            if verdict == "compile_error" or (verdict != "passed" and not self.run_all):
                break
        return replace(first, passed=passed, total=len(tests.cases))

    def _run_case(self, code: str, tests: StdinTests, stdin: str, expected: str) -> tuple[str, str]:
        """Verdict on one test and why."""
        for _ in range(ATTEMPTS):
            result = self.sandbox.run(code, stdin.encode(), limits=self.limits, language=tests.language)
            if result.outcome != "fault":
                break
        if result.outcome != "exited":
            return OUTCOMES[result.outcome], _last_words(result)
        if result.exit_code != 0:
            return _error_verdict(result, tests.language), _last_words(result)
        printed = result.stdout.decode("utf-8", "replace")
        if same_output(printed, expected, tests.tolerance):
            return "passed", ""
        return "wrong_answer", f"printed {printed[:DETAIL_CHARACTERS]!r}"

    # ------------------------------------------------------------ asserts

    def _check_asserts(self, code: str, tests: AssertTests) -> CodeVerdict:
        for _ in range(ATTEMPTS):
            programs = jailed_program("candidate"), jailed_program("tester")
            candidate, tester = self.sandbox.open_pair(*programs, limits=self.limits)
            with candidate, tester:
                verdict = run_asserts(Pair(candidate, tester), code, tests, first_only=not self.run_all)
            if verdict.verdict != "sandbox_fault":
                break
        return verdict


def _count(tests: StdinTests | AssertTests) -> int:
    """How many tests there are. ConfigError where there is none."""
    if isinstance(tests, StdinTests):
        return len(tests.cases)
    try:
        sites = instrument(tests.test).sites
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"tests of a program: no report can be put beside each check ({error})") from None
    if not sites:
        raise ConfigError("tests of a program: they contain no assert")
    return len(sites)


def _is_utf8(code: str) -> bool:
    try:
        code.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last_words(result: RunResult) -> str:
    words = result.stderr.decode("utf-8", "replace").strip()
    return f"{result.outcome}, exit code {result.exit_code} {words[-DETAIL_CHARACTERS:]}".strip()


def _error_verdict(result: RunResult, language: str) -> str:
    """Of a program that exited with an error: whether it ever began is only told by its words."""
    words = result.stderr.decode("utf-8", "replace").strip()
    if language == "c++":
        return "compile_error" if "main.cpp:" in words and "error:" in words else "runtime_error"
    last = words.rpartition("\n")[2]
    return "compile_error" if last.startswith(SYNTAX_ERRORS) else "runtime_error"


def same_output(printed: str, expected: str, tolerance: float | None = None) -> bool:
    """Equal lines but for white space at their ends and empty lines at the end.

    With a tolerance, tokens: equal as text, or as finite numbers within it (absolutely, or relatively to the expected).
    """
    printed, expected = printed.rstrip(), expected.rstrip()
    if printed.count("\n") == expected.count("\n") and _lines(printed) == _lines(expected):
        return True
    if tolerance is None:
        return False
    wanted = expected.split()
    tokens = printed.split(maxsplit=len(wanted))
    return len(tokens) == len(wanted) and all(map(_close, tokens, wanted, [tolerance] * len(wanted)))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.split("\n")]


def _close(token: str, wanted: str, tolerance: float) -> bool:
    if token == wanted:
        return True
    try:
        value, target = float(token), float(wanted)
    except ValueError:
        return False
    finite = math.isfinite(value) and math.isfinite(target)
    return finite and abs(value - target) <= tolerance * max(1.0, abs(target))
