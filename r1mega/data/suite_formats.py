"""Readers of the benchmarks' public file formats: a file becomes `Question`s, a mistake in it one line with its row.

Mathematics: GSM8K, MATH, AIME (jsonl, json, parquet), MGSM (tab-separated). Multiple choice: GPQA's csv (options in an order
drawn from the question itself), MMLU's csv without a header, MMLU and MMLU-Pro as rows with a list of options. Code:
HumanEval, MBPP (of the whole file its test split, tasks 11 to 510), LiveCodeBench. IFEval. Chat: a reference answer to
agree with, or a baseline's response to compare with.
"""

# ruff: noqa: RUF001  (prompts in other languages)

from __future__ import annotations

import ast
import base64
import csv
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError
from r1mega.data.prompts import Row, final_answer, read_rows
from r1mega.rewards.choices import LABELS
from r1mega.rewards.code_spec import humaneval_tests, livecodebench_tests, mbpp_tests, parse_tests
from r1mega.rewards.instructions import check_arguments
from r1mega.rewards.logic_answer import read_reference
from r1mega.rewards.math_extraction import after_reasoning

SUFFIXES = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv")
MATH_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""R1, section 3 of the first version."""
CHOICE_INSTRUCTION = (
    "Reason step by step. "
    'The last line of your response must be "ANSWER: $LETTER", where $LETTER is one of {letters}.'
)
MGSM_INSTRUCTIONS = {
    "bn": "ধাপে ধাপে যুক্তি দাও এবং চূড়ান্ত উত্তরটি \\boxed{} এর ভিতরে লেখো।",
    "de": "Bitte denke Schritt für Schritt nach und schreibe die endgültige Antwort in \\boxed{}.",
    "en": MATH_INSTRUCTION,
    "es": "Por favor, razona paso a paso y escribe la respuesta final dentro de \\boxed{}.",
    "fr": "Raisonne étape par étape et écris la réponse finale dans \\boxed{}.",
    "ja": "段階的に考え、最終的な答えを \\boxed{} の中に書いてください。",
    "ru": "Рассуждай шаг за шагом и запиши окончательный ответ в \\boxed{}.",
    "sw": "Tafadhali fikiri hatua kwa hatua, kisha uandike jibu la mwisho ndani ya \\boxed{}.",
    "te": "దయచేసి దశలవారీగా ఆలోచించి, తుది సమాధానాన్ని \\boxed{} లో రాయండి.",
    "th": "โปรดคิดทีละขั้นตอน และเขียนคำตอบสุดท้ายไว้ใน \\boxed{}",
    "zh": "请逐步推理，并把最终答案放在 \\boxed{} 中。",
}
QUESTION_COLUMNS = ("question", "problem", "prompt", "Problem", "Question", "input")
ANSWER_COLUMNS = ("answer", "Answer", "ground_truth", "solution", "Solution", "target")
ID_COLUMNS = ("id", "ID", "task_id", "question_id", "unique_id", "key", "Record ID")
MBPP_TEST_SPLIT = range(11, 511)
MBPP_ROWS = 974
HUMANEVAL_SECONDS = 3.0
"""The published harness' time-out."""
LIVECODEBENCH_SECONDS = 6.0
MAX_TEST_CASES = 1 << 30
"""Bytes of LiveCodeBench's packed test cases, unpacked."""

_ANSWER_LINE = re.compile(r"^[ \t]*+A:[ \t]*+(?P<answer>\S[^\n]*+)$", re.MULTILINE)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_END_OF_TEXT = ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>")
_MARKED_NUMBER = re.compile(
    r"####[\s*]*+(?P<sign>-?)\s?\\?\$?\s?(?P<second>-?)(?P<digits>\d++(?:,\d++)*+(?:\.\d++)?+|\.\d++)(?!\s*/\s*\d)"
)


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    """The question with the suite's instruction: what the template takes."""
    question: str
    """Alone; its language is that of the response, its options are those of the answer."""
    answer: str
    """As the task's rule reads it: an answer, tests (code_spec.py), instructions as JSON, a baseline's response."""
    task: str
    """math | choice | logic | code | instructions | judged | compared."""
    language: str = ""
    """Empty: the language of `question`."""
    date: str = ""
    before: str = ""
    """Of code: stands before a completion (HumanEval's prompt)."""
    after: str = ""
    """Of code: is appended to the program (LiveCodeBench's classes become functions)."""
    seconds: float = 0.0
    """Of code: CPU limit; 0 for rewards.code_seconds."""


# ---------------------------------------------------------------- rows


def rows_of(path: Path, setting: str = "suite file") -> list[Row]:
    """All rows; of csv and tsv the columns are those of the header, or "0", "1", ... where there is none.

    `setting` names the file in messages.
    """
    if path.suffix not in (".csv", ".tsv"):
        return read_rows(str(path), setting)
    if not path.is_file():
        raise FileNotFoundError(f"{setting}={path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not readable as UTF-8 text: {error}") from error
    if path.suffix == ".tsv":
        cells = [line.split("\t") for line in text.splitlines()]
    else:
        csv.field_size_limit(1 << 24)
        cells = list(csv.reader(io.StringIO(text)))
    cells = [row for row in cells if any(cell.strip() for cell in row)]
    if not cells:
        raise ConfigError(f"{path}: the file has no rows")
    titled = {name.strip().lower() for name in cells[0]} & {"question", "problem", "prompt"}
    names = cells[0] if titled else [str(i) for i in range(len(cells[0]))]
    body = cells[1:] if titled else cells
    return [
        Row(f"{path} row {i + 1 + bool(titled)}", i, dict(zip(names, row)))  # a short row lacks columns
        for i, row in enumerate(body)
    ]


def _column(row: Row, names: Sequence[str]) -> str:
    """The first of the names that the row has."""
    for name in names:
        if name in row.columns:
            return name
    known = ", ".join(map(str, row.columns)) or "none"
    raise ConfigError(f"{row.where}: no column {' or '.join(map(repr, names[:3]))}; columns are {known}")


def text_of(row: Row, *names: str) -> str:
    """The text (or number) in the first of these columns that the row has; ConfigError for none or an empty one."""
    name = _column(row, names)
    value = row.columns[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{row.where}: column {name!r} is {value!r}, not a text; mend or remove the row")
    return value


def id_of(row: Row, path: Path) -> str:
    found = next((row.columns[name] for name in ID_COLUMNS if row.columns.get(name) not in (None, "")), None)
    return f"{path.name}:{row.index}" if found is None else str(found)


def _each(path: Path, make: Callable[[Row], Question]) -> list[Question]:
    """`make` of every row; what it raises names the row."""
    questions = []
    for row in rows_of(path):
        try:
            questions.append(make(row))
        except ConfigError as error:
            raise ConfigError(_named(str(error), row.where)) from None
        except (ValueError, KeyError, TypeError, SyntaxError, StopIteration) as error:
            words = (
                f"no column {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            )
            raise ConfigError(f"{row.where}: {words}; mend or remove the row") from error
    return questions


def _named(message: str, where: str) -> str:
    return message if message.startswith(where) else f"{where}: {message}"


# ---------------------------------------------------------------- mathematics


def gsm8k_final(text: str) -> str:
    """A solution without calculator annotations, whose last line "A: 18" (as in the published model solutions) is
    "#### 18". A text with "####" or a box keeps them."""
    text = _CALCULATOR.sub("", text).rstrip()
    for mark in _END_OF_TEXT:
        text = text.removesuffix(mark).rstrip()
    lines = list(_ANSWER_LINE.finditer(text))
    if not lines or "####" in text or "\\boxed" in text or text[lines[-1].end() :].strip():
        return text
    return f"{text[: lines[-1].start()]}\n#### {lines[-1]['answer']}"


def gsm8k_response(text: str) -> str:
    """A response as GSM8K's own rule reads it: the number right after the first "####", whatever unit or sentence follows;
    only a fraction stays whole.

    The published script (dataset.py) refuses "#### $18" and "####18"; both are read here. A response with a box, an answer
    block or without a marked number stays as it is.
    """
    text = gsm8k_final(text)
    said = after_reasoning(text)
    found = _MARKED_NUMBER.search(said)
    if found is None or "\\boxed" in said or "</answer>" in said:
        return text
    return f"#### {found['sign'] or found['second']}{found['digits']}"


def reference(row: Row) -> str:
    """The final answer in the row's answer column."""
    column = _column(row, ANSWER_COLUMNS)
    text = gsm8k_final(text_of(row, column))
    try:
        return final_answer(text, row.where, column)
    except ConfigError:
        raise ConfigError(
            f"{row.where}: no final answer in column {column!r}: {text[-60:]!r}; it must end in '#### answer', hold "
            "\\boxed{answer} or be the answer"
        ) from None


def mathematics(path: Path) -> list[Question]:
    def make(row: Row) -> Question:
        question = text_of(row, *QUESTION_COLUMNS)
        text = f"{question}\n{MATH_INSTRUCTION}"
        return Question(id_of(row, path), text, question, reference(row), "math")

    return _each(path, make)


def mgsm(path: Path) -> list[Question]:
    """One mgsm_<language>.tsv, or all of a folder."""
    if path.is_dir():
        files = sorted(path.glob("mgsm_*.tsv"))
        if not files:
            raise ConfigError(f"{path}: no mgsm_<language>.tsv in it")
        return [question for file in files for question in mgsm(file)]
    language = path.stem.rpartition("_")[2]
    if language not in MGSM_INSTRUCTIONS:
        raise ConfigError(
            f"{path}: the name must end in _<language>.tsv, the language one of {', '.join(MGSM_INSTRUCTIONS)}"
        )

    def make(row: Row) -> Question:
        question, answer = text_of(row, "0", "question"), text_of(row, "1", "answer")
        text = f"{question}\n{MGSM_INSTRUCTIONS[language]}"
        return Question(f"{path.stem}:{row.index}", text, question, answer.strip(), "math", language)

    return _each(path, make)


# ---------------------------------------------------------------- multiple choice


def multiple_choice(path: Path) -> list[Question]:
    def make(row: Row) -> Question:
        stem, options, right = _options(row)
        letters = LABELS[: len(options)]
        listed = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, options))
        question = f"{stem.strip()}\n\n{listed}"
        text = f"{question}\n\n{CHOICE_INSTRUCTION.format(letters=', '.join(letters))}"
        return Question(id_of(row, path), text, question, letters[right], "choice")

    return _each(path, make)


def _options(row: Row) -> tuple[str, list[str], int]:
    """(question, options, index of the right one)."""
    columns = row.columns
    if "Correct Answer" in columns:
        stem = text_of(row, "Question")
        names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
        options = [text_of(row, name).strip() for name in names]
        order = list(range(4))
        random.Random(f"options of {stem}").shuffle(order)
        return stem, [options[i] for i in order], order.index(0)
    if "0" in columns:  # MMLU's csv: question, four options, letter
        options = [text_of(row, str(i)) for i in range(1, 5)]
        return text_of(row, "0"), options, _right(row, text_of(row, "5"), 4)
    name = _column(row, ("options", "choices"))
    given = columns[name]
    if isinstance(given, Mapping):  # {"text": [...], "label": [...]}
        given = given["text"]
    if not isinstance(given, Sequence) or isinstance(given, str) or not 2 <= len(given) <= len(LABELS):
        raise ConfigError(f"{row.where}: column {name!r} is no list of 2 to {len(LABELS)} options")
    stem = text_of(row, "question", "prompt")
    return stem, [str(option) for option in given], _right(row, columns.get("answer"), len(given))


def _right(row: Row, answer: Any, count: int) -> int:
    """Index of the right option, from a letter or an index."""
    text = str(answer).strip()
    index = (
        LABELS.find(text.upper())
        if len(text) == 1 and text.isalpha()
        else int(text)
        if text.isdigit()
        else -1
    )
    if not 0 <= index < count:
        raise ConfigError(
            f"{row.where}: answer {answer!r} is none of {count} options (a letter, or an index from 0)"
        )
    return index


# ---------------------------------------------------------------- code


def humaneval(path: Path) -> list[Question]:
    def make(row: Row) -> Question:
        columns = row.columns
        prompt = text_of(row, "prompt")
        names = {name: text_of(row, name) for name in ("test", "entry_point")}
        tests = humaneval_tests({**columns, **names, "prompt": _whole(prompt)})
        parse_tests(tests)
        text = (
            "Complete this Python function. Reply with the whole program, imports included, in one ```python block.\n\n"
            f"```python\n{prompt.rstrip()}\n```"
        )
        return Question(
            text_of(row, "task_id"), text, prompt, tests, "code", before=prompt, seconds=HUMANEVAL_SECONDS
        )

    return _each(path, make)


def _whole(prompt: str) -> str:
    """A prompt that ends at its signature, with a body, so that it can be parsed."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"
    return prompt


def mbpp(path: Path) -> list[Question]:
    """MBPP and its sanitized version (columns prompt, test_imports)."""

    def make(row: Row) -> Question:
        columns = row.columns
        asserts = columns.get("test_list")
        if not isinstance(asserts, list) or not asserts:
            raise ConfigError(f"{row.where}: column 'test_list' is no list of asserts")
        setup = columns.get("test_setup_code") or "\n".join(columns.get("test_imports") or [])
        task = text_of(row, "text", "prompt")
        tests = mbpp_tests({"test_list": asserts, "test_setup_code": setup, "code": text_of(row, "code")})
        parse_tests(tests)
        shown = "\n".join(asserts)
        text = f"{task}\nYour code must pass these tests:\n{shown}\nReply with the whole program in one ```python block."
        return Question(text_of(row, "task_id"), text, task, tests, "code")

    questions = _each(path, make)
    if len(questions) == MBPP_ROWS:
        return [q for q in questions if q.id.isdigit() and int(q.id) in MBPP_TEST_SPLIT]
    return questions


def livecodebench(path: Path) -> list[Question]:
    def make(row: Row) -> Question:
        cases = _cases(row, "public_test_cases") + _cases(row, "private_test_cases")
        if not cases:
            raise ConfigError(f"{row.where}: no test cases")
        metadata = row.columns.get("metadata") or "{}"
        function = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name") or ""
        tests = livecodebench_tests(cases, function)
        parse_tests(tests)
        content, starter = text_of(row, "question_content"), row.columns.get("starter_code") or ""
        how = (
            f"Complete this code:\n```python\n{starter}\n```"
            if starter
            else "The program reads standard input and writes standard output."
        )
        after = f"\n\n\ndef {function}(*values):\n    return Solution().{function}(*values)\n"
        return Question(
            id_of(row, path), f"{content}\n\n{how}\nReply with the whole Python program in one ```python block.",
            content, tests, "code", date=str(row.columns.get("contest_date") or "")[:10],
            after=after if function and "class Solution" in starter else "",
            seconds=LIVECODEBENCH_SECONDS * (len(cases) if function else 1),
        )  # fmt: skip

    return _each(path, make)


class _TextOnly(pickle.Unpickler):
    """LiveCodeBench packs its private tests as a pickled text; nothing else may come out of it."""

    def find_class(self, module: str, name: str) -> Any:
        raise ConfigError(f"packed test cases that name {module}.{name}: only text is read")


def _cases(row: Row, column: str) -> list[Mapping[str, str]]:
    """JSON text of {"input", "output", "testtype"}, or that text pickled, compressed and in base 64."""
    value = row.columns.get(column)
    if value in (None, ""):
        return []
    if isinstance(value, str) and not value.lstrip().startswith("["):
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(value), MAX_TEST_CASES)
        value = _TextOnly(io.BytesIO(packed)).load()
    cases = json.loads(value) if isinstance(value, str) else value
    if not isinstance(cases, list) or not all(
        isinstance(c, dict) and {"input", "output"} <= set(c) for c in cases
    ):
        raise ConfigError(f"{row.where}: column {column!r} is no list of test cases with input and output")
    return cases


# ---------------------------------------------------------------- instructions, chat, anything


def instructions(path: Path) -> list[Question]:
    """IFEval: columns prompt, instruction_id_list and kwargs (a list as long; null arguments are none)."""

    def make(row: Row) -> Question:
        prompt, ids = text_of(row, "prompt"), row.columns.get("instruction_id_list")
        given = row.columns.get("kwargs")
        if not isinstance(ids, list) or not isinstance(given, list) or len(ids) != len(given) or not ids:
            raise ConfigError(f"{row.where}: instruction_id_list and kwargs must be lists of one length")
        arguments = [{name: value for name, value in one.items() if value is not None} for one in given]
        for name, one in zip(ids, arguments):
            check_arguments(name, one)
        answer = json.dumps(list(zip(ids, arguments)), ensure_ascii=False)
        return Question(id_of(row, path), prompt, prompt, answer, "instructions")

    return _each(path, make)


def chat(path: Path) -> list[Question]:
    """A prompt with a reference answer (columns reference, answer) or a baseline's response (output, baseline)."""

    def make(row: Row) -> Question:
        columns = row.columns
        prompt = text_of(row, "instruction", "prompt", "question")
        for task, names in (("judged", ("reference", "answer")), ("compared", ("output", "baseline"))):
            if any(name in columns for name in names):
                return Question(id_of(row, path), prompt, prompt, text_of(row, *names), task)
        raise ConfigError(
            f"{row.where}: neither a reference answer (column answer) nor a baseline's response (output)"
        )

    return _each(path, make)


def questions(path: Path) -> list[Question]:
    """Any rows with a question and an answer, as training reads them: column `task` (math by default) picks the rule."""

    def make(row: Row) -> Question:
        question = text_of(row, *QUESTION_COLUMNS)
        task = str(row.columns.get("task") or "math")
        made = Question(
            id_of(row, path), question, question, "", task, language=str(row.columns.get("language") or "")
        )
        if task == "math":
            return replace(made, answer=reference(row))
        column = _column(row, ANSWER_COLUMNS)
        value = row.columns[column]
        answer = (
            json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else text_of(row, column)
        )
        if task == "code":
            parse_tests(answer)
        elif task == "logic":
            read_reference(answer)
        elif task != "choice":
            made = replace(made, task="judged")  # no rule knows: a judge compares with the reference
        return replace(made, answer=answer)

    return _each(path, make)
