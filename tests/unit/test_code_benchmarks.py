"""Reference solutions of HumanEval and MBPP pass their tests; solutions that are wrong do not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1mega.bench.reward_code import WRONG_ANSWERS, humaneval_rows, humaneval_wrong, mbpp_rows
from r1mega.rewards.code_spec import humaneval_tests, mbpp_tests
from r1mega.rewards.code_tests import CodeTests
from r1mega.rewards.code_verdict import CodeVerdict
from r1mega.rewards.sandbox import Limits, Sandbox

DATA = Path(os.environ.get("R1MEGA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
MBPP_SHARE = 0.98


@pytest.fixture(scope="module")
def checker() -> Iterator[CodeTests]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    if not (DATA / "humaneval").is_dir() or not (DATA / "mbpp").is_dir():
        pytest.skip(f"no HumanEval and MBPP in {DATA}")
    with Sandbox(slots=4) as sandbox:
        yield CodeTests(sandbox, Limits(cpu_seconds=20.0))


def verdicts(checker: CodeTests, problems: list[tuple[str, str]]) -> list[CodeVerdict]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda problem: checker.check(*problem), problems))


def test_every_humaneval_reference_solution_passes(checker: CodeTests) -> None:
    rows = humaneval_rows(DATA)
    found = verdicts(
        checker, [(row["prompt"] + row["canonical_solution"], humaneval_tests(row)) for row in rows]
    )
    failed = [(row["task_id"], verdict) for row, verdict in zip(rows, found) if verdict.verdict != "passed"]
    assert not failed
    assert len(found) == 164


@pytest.mark.parametrize("answer", WRONG_ANSWERS)
def test_no_humaneval_problem_is_solved_by_a_constant(checker: CodeTests, answer: str) -> None:
    rows = humaneval_rows(DATA)
    found = verdicts(checker, [(humaneval_wrong(row, answer), humaneval_tests(row)) for row in rows])
    odd = [
        (row["task_id"], verdict)
        for row, verdict in zip(rows, found)
        if verdict.verdict not in ("wrong_answer", "runtime_error")
    ]
    assert not odd


def test_mbpp_reference_solutions_pass(checker: CodeTests) -> None:
    rows = mbpp_rows(DATA)
    found = verdicts(checker, [(row["code"], mbpp_tests(row)) for row in rows])
    failed = [(row["task_id"], verdict) for row, verdict in zip(rows, found) if verdict.verdict != "passed"]
    assert len(failed) <= (1 - MBPP_SHARE) * len(rows), failed
