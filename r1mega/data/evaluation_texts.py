"""The questions and solutions of evaluation files, which no training text may repeat (decontamination.py).

Every file that a suite of `r1mega eval` reads can be named: jsonl, json, parquet, csv and tsv in the public formats of
suite_formats.py. Read are whatever columns hold a question or a worked solution, so that a file without answers, or with
tests that are not wanted here, serves as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1mega.config import ConfigError
from r1mega.data.chat import question_of
from r1mega.data.decontamination import Evaluation
from r1mega.data.prompts import MESSAGES, Row, conversation
from r1mega.data.suite_formats import ANSWER_COLUMNS, QUESTION_COLUMNS, rows_of

ASKED = (*QUESTION_COLUMNS, "question_content", "text", "instruction", "0")
"""LiveCodeBench's, MBPP's, a chat's, and the first column of a table without a header (MMLU, MGSM)."""
SOLVED = (
    *ANSWER_COLUMNS,
    "canonical_solution",
    "code",
    "response",
    "reference",
    "Correct Answer",
    "Explanation",
)


def read_evaluation(paths: Sequence[str], setting: str) -> Evaluation:
    """Every question and every solution of these files; `setting` names them in messages.

    FileNotFoundError, or ConfigError with the row that holds no text of a question.
    """
    return Evaluation.of({path: _texts(path, setting) for path in paths})


def _texts(path: str, setting: str) -> tuple[list[str], list[str]]:
    questions, solutions = [], []
    for row in rows_of(Path(path), setting):
        found = _in(row, ASKED)
        if row.columns.get(MESSAGES):
            found.append(question_of(conversation(row)))
        if not found:
            raise ConfigError(
                f"{row.where}: no text in any of the columns {', '.join(map(repr, ASKED))}, {MESSAGES!r}; columns "
                f"are {', '.join(map(str, row.columns)) or 'none'}"
            )
        questions += found
        solutions += _in(row, SOLVED)
    return questions, solutions


def _in(row: Row, names: Sequence[str]) -> list[str]:
    values = (row.columns.get(name) for name in names)
    return [value for value in values if isinstance(value, str) and value.strip()]
