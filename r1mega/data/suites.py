"""Benchmarks: a table from the name of a suite to the reader of its public file format, its k and its limits.

Prompts are zero-shot (R1, supplement D.1): the question and one instruction, in the words of the paper for mathematics
and with the paper's last line for multiple choice; MGSM's instruction is in the language of the question. k is the
paper's for AIME, GPQA (64), MATH-500 (16) and LiveCodeBench (8). For the others the paper gives none; there k is 1 where
a suite has many questions and 8 where it has few. [open]
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from r1mega.config import ConfigError
from r1mega.data import bilingual, general_talk
from r1mega.data import suite_formats as formats
from r1mega.data.chain import chain_problems
from r1mega.data.suite_formats import Question

Reader = Callable[[Path], list[Question]]
CHAIN_PROBLEMS = 256
CHAIN_SEED = 20250120
"""The suite's problems are the same whatever the seed of the sampling."""


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    read: Reader
    """The questions of a file (or a folder, MGSM's)."""
    file: str = ""
    """Where it lies in the folder of data; empty for generated suites."""
    k: int = 1
    """Samples of each question."""
    template: str = ""
    """Used where the user names none; empty: the model's chat template, or none."""
    final: Callable[[str], str] = str
    """From a response to what the rule reads: formats with an answer line of their own."""
    dated: bool = False
    """Questions have dates, so that a window can be chosen."""


def named_suites(names: Iterable[str], data: str, *, operations: int = 4) -> list[tuple[Suite, Path]]:
    """(suite, its file) for each of `name`, `name=FILE`, `FILE` (any questions with answers) and `chain`.

    data: the folder of files for suites named alone. ConfigError with the nearest name for an unknown one.
    """
    found = []
    for text in names:
        name, _, file = text.partition("=")
        if not file and Path(name).suffix in formats.SUFFIXES:
            suite, file = _of_file(Path(name)), name
        else:
            suite = _known(name, operations)
        path = Path(file) if file else Path(data) / suite.file
        if suite.file and not path.exists():
            raise FileNotFoundError(
                f"suite {suite.name}: no file {path}; name it with --suite {suite.name}=FILE, or its folder with --data"
            )
        found.append((suite, path))
    twice = {suite.name for suite, _ in found if sum(other.name == suite.name for other, _ in found) > 1}
    if twice:
        raise ConfigError(f"suite {min(twice)} is named twice: its results would overwrite each other")
    return found


def read_suite(
    suite: Suite, path: Path, *, limit: int = 0, since: str = "", until: str = ""
) -> list[Question]:
    """The first `limit` questions (0: all), of suites with dates those in [since, until] (ISO dates, "" is open).

    ConfigError with the row for a missing column or answer.
    """
    questions = suite.read(path)
    ids: set[str] = set()
    for question in questions:
        if question.id in ids:
            raise ConfigError(f"{path}: a second question with id {question.id!r}; ids tell questions apart")
        ids.add(question.id)
    if suite.dated and (since or until):
        whole = len(questions)
        questions = [q for q in questions if since <= q.date and (not until or q.date <= until)]
        if not questions:
            raise ConfigError(
                f"{path}: none of {whole} questions is dated between {since or '…'} and {until or '…'}"
            )
    elif since or until:
        raise ConfigError(
            f"suite {suite.name} has no dates: --since and --until choose among livecodebench's"
        )
    return questions[: limit or None]


def _of_file(path: Path) -> Suite:
    """A suite for a file that is named alone: of a public format where its first row shows one, k being 1."""
    own = Suite(path.name.split(".")[0], str(path), formats.questions)
    row = formats.rows_of(path)[0] if path.is_file() else None
    if row is None or "task" in row.columns:
        return own
    known = next((name for name, columns in SIGNS if columns <= row.columns.keys()), "")
    if not known and "####" in str(row.columns.get("answer")):
        known = "gsm8k"
    return replace(SUITES[known], name=own.name, title=own.title, k=1) if known else own


def _known(name: str, operations: int) -> Suite:
    squeezed = {_squeezed(known): suite for known, suite in SUITES.items()}
    key = _squeezed(name.removeprefix("generated:"))
    if key in GENERATED:
        return replace(squeezed[key], read=lambda _: GENERATED[key](operations))
    if key in squeezed:
        return squeezed[key]
    near = difflib.get_close_matches(key, squeezed, n=1, cutoff=0.5)
    hint = f"did you mean {squeezed[near[0]].name}?" if near else f"known are {', '.join(SUITES)}."
    raise ConfigError(
        f"unknown suite {name!r}; {hint} A file of questions is a suite, too: --suite FILE.jsonl"
    )


def _squeezed(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def chain_questions(operations: int) -> list[Question]:
    """Held-out problems of the toy task."""
    problems = chain_problems(CHAIN_PROBLEMS, operations, seed=CHAIN_SEED, heldout=True)
    return [Question(f"chain:{p.question}", p.question, p.question, p.answer, "math") for p in problems]


def bilingual_questions(operations: int) -> list[Question]:
    """Held-out problems of the toy world, in both languages."""
    problems = chain_problems(CHAIN_PROBLEMS, operations, seed=CHAIN_SEED, heldout=True)
    told = bilingual.questions(problems, CHAIN_SEED)
    return [Question(f"chain:{p.question}", text, text, p.answer, "math") for text, p in told]


def talk_questions(_: object = None) -> list[Question]:
    """Held-out how-to questions of the toy world; an answer is good or not by rule."""
    return [
        Question(f"talk:{text}", text, text, json.dumps(rules), "instructions")
        for text, rules in general_talk.checked_questions()
    ]


GENERATED: dict[str, Callable[[int], list[Question]]] = {
    "chain": chain_questions,
    "bilingual": bilingual_questions,
    "smalltalk": talk_questions,
}


def _mgsm(language: str) -> Suite:
    return Suite(f"mgsm_{language}", f"MGSM {language}", formats.mgsm, f"mgsm/mgsm_{language}.tsv")


_TABLE = (
    Suite("aime2024", "AIME 2024", formats.mathematics, "math/aime2024.jsonl", k=64),
    Suite("math500", "MATH-500", formats.mathematics, "math/math500.jsonl", k=16),
    Suite("gsm8k", "GSM8K", formats.mathematics, "gsm8k/test.jsonl", final=formats.gsm8k_response),
    Suite("mgsm", "MGSM", formats.mgsm, "mgsm", final=formats.gsm8k_response),
    *(_mgsm(language) for language in formats.MGSM_INSTRUCTIONS),
    Suite("gpqa", "GPQA", formats.multiple_choice, "gpqa/gpqa_diamond.csv", k=64),
    Suite("mmlu", "MMLU", formats.multiple_choice, "mmlu/test.jsonl"),
    Suite("mmlu_pro", "MMLU-Pro", formats.multiple_choice, "mmlu_pro/test.jsonl"),
    Suite("humaneval", "HumanEval", formats.humaneval, "humaneval/HumanEval.jsonl.gz", k=8),
    Suite("mbpp", "MBPP", formats.mbpp, "mbpp/mbpp.jsonl"),
    Suite(
        "livecodebench", "LiveCodeBench", formats.livecodebench, "livecodebench/test.jsonl", k=8, dated=True
    ),
    Suite("ifeval", "IFEval", formats.instructions, "ifeval/input_data.jsonl"),
    Suite("chat", "Chat, judged", formats.chat, "chat/questions.jsonl"),
    Suite("chain", "chain (toy)", lambda _: chain_questions(4), template="tiny_zero"),
    Suite("bilingual", "chain in two languages (toy)", lambda _: bilingual_questions(4), template="r1"),
    Suite("small_talk", "Small talk (toy)", talk_questions, template="r1"),
)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _TABLE}
SIGNS = (
    ("humaneval", {"prompt", "test", "entry_point"}),
    ("mbpp", {"test_list"}),
    ("livecodebench", {"question_content"}),
    ("ifeval", {"instruction_id_list"}),
    ("gpqa", {"Correct Answer"}),
    ("mmlu", {"choices"}),
    ("mmlu_pro", {"options"}),
    ("gsm8k", {"question", "ground_truth"}),
)
"""Columns by which a file's format is known."""
