"""Reads questions with reference answers.

Sources: jsonl, json (a list, or lines), either gzipped, parquet, and the generated toy task
("generated:chain", "generated:chain-base"). GSM8K's and MATH's own columns are found by themselves. A column
`messages` is a conversation that ends with the user. Documents for SFT are read by documents.py.

Held-out questions are never trained on: they are the rows of `data.eval_path`, or the last `eval_size`
rows of `data.path`, and a training row that repeats a held-out question is dropped and counted; where `data.eval_path`
names an evaluation set, a row that shares a 10-gram with one of its questions as well (decontamination.py).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, DataConfig
from r1mega.data import bilingual
from r1mega.data.chain import chain_problems
from r1mega.data.chat import BOS, Message, Question, question_of, template
from r1mega.data.decontamination import Evaluation
from r1mega.data.generated_preferences import how_to_question
from r1mega.rewards.math_answer import boxed
from r1mega.rewards.terms import ACCURACY
from r1mega.samples import Prompt

QUESTION_ANSWER = (
    ("question", "answer"),
    ("problem", "answer"),
    ("problem", "solution"),
    ("prompt", "answer"),
    ("messages", "answer"),
)
"""Columns tried in this order for questions with reference answers: GSM8K, MATH, MATH with solutions only."""

QUESTION_ALONE = (("question", ""), ("prompt", ""), ("messages", ""))
"""Also tried where no rule needs a reference answer (data.task)."""

TASK_COLUMN = "task"
"""A row's own task, before data.task."""

MESSAGES = "messages"

SCENARIOS = "generated:scenarios"
"""Chains and small talk."""
GENERATED_PROMPTS = {
    "generated:chain": lambda problems, seed: [(problem.question, problem) for problem in problems],
    "generated:bilingual": bilingual.questions,
    SCENARIOS: bilingual.questions,
}
ROWS_PER_TOKENIZER_CALL = 4096


@dataclass(frozen=True)
class PromptSet:
    train: list[Prompt]
    heldout: list[Prompt]
    """Shares no question with `train`."""
    dropped: int
    """Prompts of both sides longer than data.max_prompt_tokens."""
    duplicates: int
    """Training rows that repeat a held-out question, or overlap one of data.eval_path."""
    unanswered: int
    """Rows of both sides whose answer is null or empty: MATH's training file has a few."""

    @property
    def tasks(self) -> set[str]:
        return {prompt.task for prompt in self.train + self.heldout}


@dataclass(frozen=True)
class Row:
    where: str
    """File and line (or row), for messages."""
    index: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class QuestionAnswer:
    id: str
    question: str
    answer: str
    """Empty where the file has null or no text."""
    task: str = "math"
    messages: tuple[Message, ...] = ()
    """Of a conversation; `question` is then all of it as one text."""
    where: str = ""
    """File and line, for messages."""


class PromptStream:
    """Endless epochs over the prompts, each a fresh permutation and each prompt exactly once in it.

    The order is a function of (seed, epoch) alone, so `position` is all there is to remember.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0) -> None:
        if not prompts:
            raise ConfigError("no prompts to draw from")
        self.prompts = prompts
        self.seed = seed
        self.position = position
        """Prompts taken since the start."""
        self._epoch = -1
        self._order: list[int] = []

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; moves the position."""
        taken = []
        for _ in range(n):
            epoch, within = divmod(self.position, len(self.prompts))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
            taken.append(self.prompts[self._order[within]])
            self.position += 1
        return taken

    def at(self, position: int) -> PromptStream:
        """The same stream elsewhere."""
        return PromptStream(self.prompts, self.seed, position)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain JSON."""
        return {
            "position": self.position,
            "seed": self.seed,
            "prompts": len(self.prompts),
            "fingerprint": fingerprint(self.prompts),
        }

    def restore(self, state: dict[str, Any]) -> PromptStream:
        """The stream where `state` was taken; ConfigError when the prompts or the seed are not the same."""
        for name, value in self.state().items():
            if name != "position" and state[name] != value:
                raise ConfigError(
                    f"the checkpoint's prompt order has {name}={state[name]}, this run {value}: "
                    "the data or the seed changed; start a new run directory"
                )
        return self.at(state["position"])

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"prompt order {self.seed} {epoch}").shuffle(order)
        return order


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of the prompts' ids, texts and answers, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
    return digest.hexdigest()[:16]


def read_prompts(data: DataConfig, tokenizer: Any, *, seed: int) -> PromptSet:
    """Reads, splits, puts into the template and tokenises the questions of `data`.

    `tokenizer` is a Hugging Face tokenizer. `seed` matters to generated data only: files keep their
    order (PromptStream shuffles). With `data.eval_path`, at most `eval_size` of its rows are taken
    (0: all).
    Raises ConfigError or FileNotFoundError, each saying what, where and how to mend it.
    """
    to_text = template(data.template)
    if data.path in GENERATED_PROMPTS:
        train, heldout = _generated(data, seed)
    else:
        train, heldout = _split(data)
    rows = len(train)
    answered = [[qa for qa in side if qa.answer or qa.task not in ACCURACY] for side in (train, heldout)]
    unanswered = len(train) + len(heldout) - sum(map(len, answered))
    train, heldout = answered
    heldout_questions = {_squeezed(qa.question) for qa in heldout}
    named = Evaluation.of({data.eval_path: ([qa.question for qa in heldout], [])} if data.eval_path else {})
    kept = [
        qa
        for qa in train
        if _squeezed(qa.question) not in heldout_questions and not named.found_in(qa.question)
    ]
    train_prompts = tokenised(kept, to_text, tokenizer, data.max_prompt_tokens)
    heldout_prompts = tokenised(heldout, to_text, tokenizer, data.max_prompt_tokens)
    if not train_prompts:
        raise ConfigError(
            f"{data.path}: none of {rows} training prompts is left ({rows - len(train)} have no answer, "
            f"{len(train) - len(kept)} repeat or overlap held-out questions, {len(kept)} are longer than "
            f"data.max_prompt_tokens={data.max_prompt_tokens})"
        )
    return PromptSet(
        train=train_prompts,
        heldout=heldout_prompts,
        dropped=len(kept) + len(heldout) - len(train_prompts) - len(heldout_prompts),
        duplicates=len(train) - len(kept),
        unanswered=unanswered,
    )


def as_text(question: Question) -> str:
    return question if isinstance(question, str) else question_of(question)


def read_questions(data: DataConfig, *, seed: int) -> list[QuestionAnswer]:
    """All questions of a file, or the training problems of generated:chain, each with what its rule needs.

    ConfigError with file and line for a question of a task with a rule that has no answer.
    """
    if data.path in GENERATED_PROMPTS:
        return _generated(data, seed)[0]
    if data.path.startswith("generated:"):
        raise ConfigError(f"data.path={data.path} gives no questions; the generated ones are generated:chain")
    items = _question_answers(data.path, data, "data.path")
    for item in items:
        if not item.answer and item.task in ACCURACY:
            raise ConfigError(
                f"{item.where}: no answer, and task {item.task!r} is judged by one; fill it in or remove the row"
            )
    return items


def tokenised(
    items: Sequence[QuestionAnswer], to_text: Callable[[Question], str], tokenizer: Any, limit: int
) -> list[Prompt]:
    """The questions as prompts; those of more than `limit` tokens are left out."""
    texts = [to_text(item.messages or item.question) for item in items]
    return [
        Prompt(item.id, item.question, item.answer, item.task, text, ids, item.messages)
        for item, text, ids in zip(items, texts, encode_prompts(texts, tokenizer), strict=True)
        if len(ids) <= limit
    ]


def final_answer(text: str, where: str, column: str) -> str:
    """The reference answer in a data file's answer text.

    GSM8K: what follows the last "####"; MATH: the last \\boxed{...}; else the text itself, which a column
    named "solution" may not be. ConfigError when there is none.
    """
    if "####" in text:
        answer = text.rsplit("####", 1)[1].strip()
    elif "\\boxed" in text or "\\fbox" in text:
        answer = (boxed(text) or "").strip()
    elif column == "solution":
        answer = ""
    else:
        answer = text.strip()
    if not answer:
        raise ConfigError(
            f"{where}: no final answer in column {column!r}: {text[-60:]!r}; it must end in '#### answer', hold "
            "\\boxed{answer} or be the answer; set data.answer_field= to another column or remove the row"
        )
    return answer


def read_rows(path: str, name: str = "data.path") -> list[Row]:
    """All rows of a jsonl, json or parquet file (gzip allowed for the first two); `name` is the config field."""
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{name}={path}: no such file")
    suffixes = [s.lower() for s in file.suffixes[-2:] if s]
    if file.is_dir() or not suffixes or suffixes[-1] not in (".jsonl", ".ndjson", ".json", ".gz", ".parquet"):
        raise ConfigError(f"{name}={path}: not a .jsonl, .json, .jsonl.gz, .json.gz or .parquet file")
    rows = list(_parquet_rows(file) if suffixes[-1] == ".parquet" else _json_rows(file))
    if not rows:
        raise ConfigError(f"{name}={path}: the file has no rows")
    return rows


def _json_rows(file: Path) -> Iterator[Row]:
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix.lower() == ".gz" else raw).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable as UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
        for index, item in enumerate(items):
            yield _row(f"{file} row {index + 1}", index, item)
        return
    index = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{file}:{number}: not JSON: {error.msg} at column {error.colno}"
                ) from error
            yield _row(f"{file}:{number}", index, item)
            index += 1


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{file}: not a parquet file: {error}") from error
    for index, item in enumerate(table.to_pylist()):
        yield _row(f"{file} row {index + 1}", index, item)


def _row(where: str, index: int, item: Any) -> Row:
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: {type(item).__name__} instead of an object with named columns")
    return Row(where, index, item)


def columns_of(rows: list[Row], data: DataConfig, known: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The two column names: those the config names, else the first known pair that the first row has."""
    columns = rows[0].columns
    if data.question_field and data.answer_field:
        return data.question_field, data.answer_field
    for question, answer in known:
        question, answer = data.question_field or question, data.answer_field or answer
        if question in columns and (answer in columns or not answer):
            return question, answer
    tried = ", ".join(f"{question}+{answer}" for question, answer in known)
    raise ConfigError(
        f"{rows[0].where}: columns are {', '.join(map(str, columns)) or 'none'}; known pairs are {tried}; "
        "set data.question_field= and data.answer_field="
    )


def text_of(row: Row, column: str, setting: str) -> str:
    """A column's text; `setting` names it. ConfigError with file and line where there is none."""
    if column not in row.columns:
        raise ConfigError(
            f"{row.where}: no column {column!r}; columns are {', '.join(map(str, row.columns))}; set {setting}="
        )
    value = row.columns[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{row.where}: column {column!r} is {value!r}, not a text; mend or remove the row")
    return value


def _question_answers(path: str, data: DataConfig, name: str) -> list[QuestionAnswer]:
    rows = read_rows(path, name)
    known = QUESTION_ANSWER if data.task in ACCURACY else (*QUESTION_ANSWER, *QUESTION_ALONE)
    question, answer = columns_of(rows, data, known)

    def item(row: Row) -> QuestionAnswer:
        task = str(row.columns.get(TASK_COLUMN) or data.task)
        messages = tuple(conversation(row, "user")) if is_conversation(row, question) else ()
        text = question_of(messages) if messages else text_of(row, question, "data.question_field")
        reference = _reference(row, answer, task)
        return QuestionAnswer(f"{Path(path).name}:{row.index}", text, reference, task, messages, row.where)

    return [item(row) for row in rows]


def _reference(row: Row, column: str, task: str) -> str:
    """The reference answer as the task's rule reads it: a final answer for math, else the column as it is."""
    value = row.columns.get(column)
    if value in (None, "") and (column in row.columns or task not in ACCURACY):
        return ""
    if task == "math":
        return final_answer(text_of(row, column, "data.answer_field"), row.where, column)
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict | list)
        else text_of(row, column, "data.answer_field")
    )


def _split(data: DataConfig) -> tuple[list[QuestionAnswer], list[QuestionAnswer]]:
    if data.path.startswith("generated:"):
        raise ConfigError(
            f"data.path={data.path} gives no prompts; the generated prompts are generated:chain"
        )
    if not data.path:
        raise ConfigError("data.path is empty: name a jsonl, json or parquet file, or generated:chain")
    if data.eval_size < 0:
        raise ConfigError(f"data.eval_size={data.eval_size} is negative")
    train = _question_answers(data.path, data, "data.path")
    if data.eval_path:
        heldout = _question_answers(data.eval_path, data, "data.eval_path")
        return train, heldout[: data.eval_size or None]
    if data.eval_size >= len(train):
        raise ConfigError(
            f"{data.path}: data.eval_size={data.eval_size} leaves nothing of {len(train)} rows to train on; "
            "lower it or set data.eval_path="
        )
    border = len(train) - data.eval_size
    return train[:border], train[border:]


def _generated(data: DataConfig, seed: int) -> tuple[list[QuestionAnswer], list[QuestionAnswer]]:
    sides = []
    for count, heldout in ((data.size, False), (data.eval_size, True)):
        talk = count // 3 if data.path == SCENARIOS else 0
        problems = chain_problems(count - talk, data.operations, seed=seed, heldout=heldout)
        told = GENERATED_PROMPTS[data.path](problems, seed)
        side = [QuestionAnswer(f"chain:{p.question}", text, p.answer) for text, p in told]
        rng = random.Random(f"talk {seed} {heldout}")
        for number in range(talk):  # a general prompt is either helpfulness or safety data (R1, 3.2.2)
            text, task = how_to_question(rng, heldout=heldout), ("helpful", "safety")[number % 2]
            side.append(QuestionAnswer(f"talk:{task}:{number}", text, "", task))
        if talk:
            rng.shuffle(side)
        sides.append(side)
    return sides[0], sides[1]


def is_conversation(row: Row, column: str) -> bool:
    """The row is a conversation: its column `messages` is more than `question`, which repeats it as one text."""
    return column in (MESSAGES, "question") and bool(row.columns.get(MESSAGES))


def conversation(row: Row, last: str = "") -> list[Message]:
    """The column `messages`: system first, then user and assistant in turn; it ends with `last`. ConfigError if not."""
    value = row.columns[MESSAGES]
    try:
        messages = [(str(message["role"]), message["content"]) for message in value]
    except (TypeError, KeyError):
        messages = []
    spoken = [role for role, _ in messages if role != "system"]
    turns = ["user", "assistant"] * len(spoken)
    if not spoken or spoken != turns[: len(spoken)] or not all(isinstance(text, str) for _, text in messages):
        raise ConfigError(
            f"{row.where}: column {MESSAGES!r} is no conversation: a list of messages with role and content, the "
            "user's first, then user and assistant in turn"
        )
    if last and spoken[-1] != last:
        raise ConfigError(
            f"{row.where}: the conversation ends with the {spoken[-1]}, it must end with the {last}"
        )
    return messages


def encode_prompts(texts: list[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Prompts' tokens. A template's own beginning-of-sequence token is the tokenizer's, not a second one beside it."""
    if not any(text.startswith(BOS) for text in texts):
        return encode(texts, tokenizer, add_special_tokens=True)
    if tokenizer.bos_token == BOS:
        return encode(texts, tokenizer, add_special_tokens=False)
    return encode([text.removeprefix(BOS) for text in texts], tokenizer, add_special_tokens=True)


def encode(texts: list[str], tokenizer: Any, *, add_special_tokens: bool) -> list[tuple[int, ...]]:
    """Token ids of many texts."""
    encoded: list[tuple[int, ...]] = []
    for first in range(0, len(texts), ROWS_PER_TOKENIZER_CALL):
        block = texts[first : first + ROWS_PER_TOKENIZER_CALL]
        ids = tokenizer(block, add_special_tokens=add_special_tokens, return_attention_mask=False)[
            "input_ids"
        ]
        encoded += [tuple(row) for row in ids]
    return encoded


def _squeezed(question: str) -> str:
    return " ".join(question.split())
