"""What came of testing a program."""

from __future__ import annotations

from dataclasses import dataclass

VERDICTS = (
    "passed",
    "wrong_answer",
    "runtime_error",  # raised, ended early, or answered what is not plain data
    "time",  # over its CPU seconds, or the generous wall limit
    "memory",
    "output_limit",
    "sandbox_fault",  # twice: the machine's, nothing is known of the program
    "no_code",
    "compile_error",
    "unparsable_tests",  # the tests' fault, nothing is known of the program
)


@dataclass(frozen=True)
class CodeVerdict:
    verdict: str
    """One of VERDICTS: of the first test that was not passed."""
    passed: int
    total: int
    """Tests, or asserts; a test that never ran is not passed."""
    detail: str = ""
    """Which test and why, for logs; it may quote expected values, so it is never shown to a model."""

    @property
    def reward(self) -> float:
        """1 when every test passed (R1 uses unit tests as a rule: all or nothing), else 0."""
        return float(self.verdict == "passed")

    @property
    def share(self) -> float:
        """Passed of all tests, in 0..1."""
        return self.passed / self.total if self.total else 0.0
