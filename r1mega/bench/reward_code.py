"""The code reward: reference solutions that pass, wrong ones and hacks that do not, and what a problem costs.

HumanEval and MBPP are read where the shared data is; the rest is made here. One thread, so that a row is the cost
of one problem alone.
"""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1mega.bench.code_hacks import DOUBLED, HONEST_DOUBLED, HONEST_SORTED, SORTED, SORTED_HACKS, STDIN_HACKS
from r1mega.bench.reward_rows import Row
from r1mega.rewards.code_spec import humaneval_tests, mbpp_tests
from r1mega.rewards.code_tests import CodeTests
from r1mega.rewards.code_verdict import CodeVerdict
from r1mega.rewards.sandbox import Limits, Sandbox

REPEATS = 100
LIMITS = Limits(cpu_seconds=2.0)
EQUAL_TO_ALL = "type('Any', (), {'__eq__': lambda a, b: True, '__bool__': lambda a: True})()"
WRONG_ANSWERS = ("None", EQUAL_TO_ALL)
PROGRAMS = {
    "passed": HONEST_SORTED,
    "wrong_answer": "def solve(values): return values\n",
    "runtime_error": "def solve(values): return values[9]\n",
    "time": "def solve(values):\n    while True: pass\n",
    "memory": "def solve(values): return bytearray(1 << 32)\n",
    "output_limit": "def solve(values):\n    while True: print('x' * 100000)\n",
    "compile_error": "def solve(values) return values\n",
}
"""Verdict -> a program that must get it."""


def measure(shared: Path | None = None) -> list[Row]:
    """Rows for the table of `r1mega bench rewards`. ConfigError where the machine cannot isolate."""
    with Sandbox(slots=2) as sandbox:
        checker = CodeTests(sandbox, LIMITS)
        rows = [*_costs(checker), *_verdicts(checker), *_hacks(checker)]
        data = shared / "data" if shared else None
        checker = CodeTests(sandbox)
        if data and (data / "humaneval").is_dir():
            rows += _humaneval(checker, data)
        if data and (data / "mbpp").is_dir():
            rows += _mbpp(checker, data)
        return rows


def humaneval_rows(data: Path) -> list[dict[str, Any]]:
    """data: the folder that holds humaneval/."""
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mbpp_rows(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "mbpp" / "mbpp.jsonl").read_text("utf-8").splitlines()]


def humaneval_wrong(row: dict[str, Any], answer: str) -> str:
    """A solution of the right name that always returns `answer`."""
    return f"{row['prompt'].rstrip()}\n    return {answer}\n"


def _costs(checker: CodeTests) -> Iterable[Row]:
    kinds = {"assert problem of 4 checks": (HONEST_SORTED, SORTED), "stdin test": (HONEST_DOUBLED, DOUBLED)}
    for name, (code, tests) in kinds.items():
        per_call = 2 if tests == DOUBLED else 1
        milliseconds = sorted(_milliseconds(checker, code, tests) / per_call for _ in range(REPEATS))
        note = f"best {milliseconds[0]:.1f}, p99 {milliseconds[int(0.99 * REPEATS)]:.1f}, of {REPEATS} trivial ones"
        yield Row(f"code: {name}, median", statistics.median(milliseconds), "ms", note=note)
    if shutil.which("g++", path="/usr/bin"):
        program = "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << 2 * n; }\n"
        tests = json.dumps({**json.loads(DOUBLED), "language": "c++"})
        first = _milliseconds(checker, program, tests)
        later = min(_milliseconds(checker, program, tests) / 2 for _ in range(10))
        yield Row(
            "code: C++ stdin test, compiled before",
            later,
            "ms",
            note=f"the first with compilation {first:.0f}",
        )


def _milliseconds(checker: CodeTests, code: str, tests: str) -> float:
    began = time.perf_counter()
    found = checker.check(code, tests)
    assert found.verdict == "passed", found
    return 1000 * (time.perf_counter() - began)


def _verdicts(checker: CodeTests) -> Iterable[Row]:
    for wanted, code in PROGRAMS.items():
        began = time.perf_counter()
        found = checker.check(code, SORTED)
        seconds = time.perf_counter() - began
        note = f"{seconds:.2f} s, limit {LIMITS.cpu_seconds} CPU seconds"
        if found.verdict != wanted:
            note = f"was {found.verdict}: {found.detail}"
        yield Row(f"code: verdict {wanted}", float(found.verdict == wanted), "of 1", "1", note)


def _hacks(checker: CodeTests) -> Iterable[Row]:
    hacks = [(code, SORTED) for code in SORTED_HACKS.values()] + [
        (code, DOUBLED) for code in STDIN_HACKS.values()
    ]
    rejected = sum(
        checker.check(code, tests).verdict not in ("passed", "sandbox_fault") for code, tests in hacks
    )
    honest = all(
        checker.check(code, tests).verdict == "passed"
        for code, tests in ((HONEST_SORTED, SORTED), (HONEST_DOUBLED, DOUBLED))
    )
    note = "honest solutions accepted" if honest else "AN HONEST SOLUTION WAS REJECTED"
    yield Row("code: reward hacks rejected", rejected, f"of {len(hacks)}", f"{len(hacks)}", note)
    fooled = sum(_fools_one_process(checker, code) for code in SORTED_HACKS.values())
    yield Row(
        "code: the same hacks, rejected by program and asserts in one process",
        len(SORTED_HACKS) - fooled,
        f"of {len(SORTED_HACKS)}",
        note="what many graders do: exit code 0 is success",
    )


def _fools_one_process(checker: CodeTests, code: str) -> bool:
    program = "\n".join([code, *json.loads(SORTED)["asserts"]])
    result = checker.sandbox.run(program, limits=LIMITS)
    return result.outcome == "exited" and result.exit_code == 0


def _humaneval(checker: CodeTests, data: Path) -> Iterable[Row]:
    rows = humaneval_rows(data)
    found = {
        row["task_id"]: (row["prompt"] + row["canonical_solution"], humaneval_tests(row)) for row in rows
    }
    yield _references("HumanEval", checker, found, str(len(rows)))
    wrong = [(humaneval_wrong(row, answer), humaneval_tests(row)) for row in rows for answer in WRONG_ANSWERS]
    verdicts = Counter(checker.check(code, tests).verdict for code, tests in wrong)
    rejected = verdicts["wrong_answer"] + verdicts["runtime_error"]
    yield Row(
        "code: wrong HumanEval solutions rejected",
        rejected,
        f"of {len(wrong)}",
        str(len(wrong)),
        _table(verdicts),
    )


def _mbpp(checker: CodeTests, data: Path) -> Iterable[Row]:
    rows = mbpp_rows(data)
    found = {f"{row['task_id']}": (row["code"], mbpp_tests(row)) for row in rows}
    yield _references("MBPP", checker, found, ">= 98 %")


def _references(name: str, checker: CodeTests, problems: dict[str, tuple[str, str]], goal: str) -> Row:
    began = time.perf_counter()
    found = {problem: checker.check(*pair) for problem, pair in problems.items()}
    milliseconds = 1000 * (time.perf_counter() - began) / len(found)
    passed = sum(verdict.verdict == "passed" for verdict in found.values())
    note = f"{milliseconds:.0f} ms each; {_failed(found)}"
    return Row(f"code: {name} reference solutions passed", passed, f"of {len(found)}", goal, note)


def _failed(found: dict[str, CodeVerdict]) -> str:
    failed = [
        f"{problem} {verdict.verdict}" for problem, verdict in found.items() if verdict.verdict != "passed"
    ]
    return ", ".join(failed[:10]) or "none failed"


def _table(verdicts: Counter[str]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
