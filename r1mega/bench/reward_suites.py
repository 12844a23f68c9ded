"""What only tests can show, in the same table: how many attacks, hostile inputs and tables hold on this machine.

Runs the test files of a checkout; without one (an installed package) there is nothing to run and nothing is claimed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from r1mega.bench.reward_rows import Row

TESTS = Path(__file__).parents[2] / "tests" / "unit"
COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped)")


@dataclass(frozen=True)
class Suite:
    name: str
    file: str
    goal: str


SUITES = (
    Suite("attack programs contained", "test_sandbox_attacks.py", ">= 40"),
    Suite("hostile maths answers survived", "test_math_hostile.py", ">= 60"),
    Suite("reward hacks rejected, honest accepted", "test_code_hacks.py", ">= 14"),
    Suite("format cases", "test_rewards_format.py", ""),
    Suite("choice and logic cases", "test_choices.py test_logic_answer.py", ""),
    Suite("5,000 scorings under random kills", "test_scoring_under_fire.py", "1"),
)


def measure(_shared: Path | None = None) -> list[Row]:
    """One row a suite: tests that passed, and how many there are."""
    return [_row(suite) for suite in SUITES] if TESTS.is_dir() else []


def _row(suite: Suite) -> Row:
    files = [str(TESTS / name) for name in suite.file.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = {
        kind: int(number)
        for number, kind in COUNTS.findall(result.stdout.rpartition("\n\n")[2] or result.stdout)
    }
    total = sum(counts.values())
    skipped = f", {counts['skipped']} skipped" if "skipped" in counts else ""
    return Row(suite.name, counts.get("passed", 0), f"of {total}", suite.goal, f"{suite.file}{skipped}")
