"""Reads files of existing generations: whose they are, and what they said of themselves.

A row names its question by an id (id, task_id, question_id, key) or by the question's own text (question, problem, prompt)
and holds one text (response, completion, solution, output, ...) or a list of them. Known public forms:
- HumanEval's samples {"task_id", "completion"} and results (with "result", "passed");
- GSM8K's model solutions {"question", "ground_truth", "6b_finetuning": {"solution", "is_correct"}, ...}: each such column is
  a model of its own, a *variant*;
- LiveCodeBench's {"question_id", "code_list", "graded_list"};
- what `r1mega eval` writes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError
from r1mega.data.prompts import Row, read_rows
from r1mega.data.suite_formats import ID_COLUMNS, QUESTION_COLUMNS, Question, reference
from r1mega.rewards.prose import whole_response

TEXT_COLUMNS = (
    "response", "completion", "solution", "generation", "output", "model_output", "generated_text", "prediction", "text",
)  # fmt: skip
LIST_COLUMNS = (
    "responses", "completions", "solutions", "generations", "outputs", "texts", "samples", "code_list", "output_list",
)  # fmt: skip
COMPLETIONS = ("completion", "completions", "code_list")
"""Columns that continue the question's code as they stand; other texts are chat responses, whose last block of code counts."""
VERDICT_COLUMNS = ("passed", "is_correct", "correct", "graded_list", "result")
VERDICTS = {
    True: ("true", "passed", "correct", "yes", "1", "1.0"),
    False: ("false", "failed", "incorrect", "wrong", "timed out", "no", "0", "0.0"),
}
"""How files write them; "failed: ZeroDivisionError" is HumanEval's "failed"."""
CUT = ("length", "truncated")


@dataclass(frozen=True)
class Generation:
    where: str
    names: tuple[str, ...]
    """What the row calls its question: ids first, then texts."""
    variant: str
    """Which of several models in one file; empty where it has one."""
    text: str
    """Whole: with the <think> in which the row's own prompt may end."""
    is_completion: bool
    finish_reason: str
    """"stop" unless the row says otherwise."""
    published: bool | None
    """The verdict in the file; None without one."""


def read_generations(path: Path) -> list[Generation]:
    """Every text of the file, in its order. ConfigError with the row of one that has none, or no question."""
    return [generation for row in read_rows(str(path), "generations") for generation in _of_row(row)]


def questions_inside(path: Path) -> list[Question]:
    """The questions of a file that brings its own (GSM8K's model solutions: question, ground_truth); [] of others."""
    rows = read_rows(str(path), "generations")
    if not all({"question", "ground_truth"} <= set(row.columns) for row in rows):
        return []
    found: dict[str, Question] = {}
    for row in rows:
        text = str(row.columns["question"])
        if text not in found:
            found[text] = Question(f"{path.name}:{row.index}", text, text, reference(row), "math")
    return list(found.values())


def by_question(
    generations: Sequence[Generation], questions: Sequence[Question], path: Path
) -> dict[str, dict[str, list[Generation]]]:
    """variant -> question id -> its generations in the order of the file.

    ConfigError where a row names no question of the suite, or a variant leaves one out.
    """
    known = {question.id: question.id for question in questions}
    for column in ("question", "text"):  # a text that two questions share names neither
        texts = [squeezed(getattr(question, column)) for question in questions]
        unique = Counter(texts)
        known |= {t: q.id for t, q in zip(texts, questions) if unique[t] == 1 and t not in known}
    found: dict[str, dict[str, list[Generation]]] = defaultdict(lambda: defaultdict(list))
    for generation in generations:
        ids = [known[name] for name in generation.names if name in known]
        if not ids:
            name = generation.names[0]
            raise ConfigError(
                f"{generation.where}: {name[:60]!r} is no question of the suite ({len(questions)} questions, the first is "
                f"{questions[0].id!r}); remove the row or name the suite's right file"
            )
        found[generation.variant][ids[0]].append(generation)
    for variant, texts_of in found.items():
        missing = [question.id for question in questions if question.id not in texts_of]
        if missing:
            whose = f" of {variant}" if variant else ""
            raise ConfigError(
                f"{path}: no generation{whose} for {len(missing)} of {len(questions)} questions, the first is "
                f"{missing[0]!r}; add them, or give a suite file with the others only"
            )
    return {variant: dict(texts_of) for variant, texts_of in found.items()}


def squeezed(text: str) -> str:
    return " ".join(text.split())


def _of_row(row: Row) -> list[Generation]:
    columns = row.columns
    names = tuple(
        str(columns[name]).strip() if name in ID_COLUMNS else squeezed(str(columns[name]))
        for name in (*ID_COLUMNS, *QUESTION_COLUMNS)
        if columns.get(name) not in (None, "") and not isinstance(columns[name], dict | list)
    )
    if not names:
        raise ConfigError(
            f"{row.where}: the row names no question; columns are {', '.join(map(str, columns))}, one of "
            f"{', '.join((*ID_COLUMNS[:5], *QUESTION_COLUMNS[:3]))} is needed"
        )
    models = {name: value for name, value in columns.items() if isinstance(value, dict) and _has_text(value)}
    if models:
        return [one for name, value in models.items() for one in _texts(row, names, str(name), value)]
    if not _has_text(columns):
        raise ConfigError(
            f"{row.where}: no text; columns are {', '.join(map(str, columns))}, one of {', '.join(TEXT_COLUMNS)} (or a list "
            f"in {', '.join(LIST_COLUMNS[:3])}, ...) is needed"
        )
    return _texts(row, names, "", columns)


def _has_text(columns: Mapping[str, Any]) -> bool:
    return any(name in columns for name in (*TEXT_COLUMNS, *LIST_COLUMNS))


def _texts(row: Row, names: tuple[str, ...], variant: str, columns: Mapping[str, Any]) -> list[Generation]:
    column = next(name for name in (*TEXT_COLUMNS, *LIST_COLUMNS) if name in columns)
    value = columns[column]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{row.where}: column {column!r} holds {str(value)[:40]!r}, not a text or a list of texts"
        )
    named = next((name for name in VERDICT_COLUMNS if columns.get(name) is not None), "")
    if named == "result" and not str(columns[named]).startswith(("passed", "failed", "timed out")):
        named = ""  # somebody's other result
    verdicts = columns.get(named)
    verdicts = verdicts if isinstance(verdicts, list) else [verdicts] * len(texts)
    if len(verdicts) != len(texts):
        raise ConfigError(f"{row.where}: {len(verdicts)} verdicts for {len(texts)} texts")
    prompt = str(columns.get("prompt") or "")
    cut = columns.get("finish_reason") in CUT or columns.get("truncated") is True
    return [
        Generation(
            row.where, names, variant, whole_response(prompt, text), column in COMPLETIONS, "length" if cut else "stop",
            None if verdict is None else _verdict(row, named, verdict),
        )
        for text, verdict in zip(texts, verdicts)
    ]  # fmt: skip


def _verdict(row: Row, column: str, value: Any) -> bool:
    word = str(value).partition(":")[0].strip().lower()
    for verdict, words in VERDICTS.items():
        if word in words:
            return verdict
    raise ConfigError(
        f"{row.where}: column {column!r} holds {str(value)[:40]!r}, which is neither right nor wrong"
    )
