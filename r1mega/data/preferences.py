"""Reads what reward models learn from: preference pairs, and responses labelled safe or unsafe.

Columns of a pair: prompt (text or messages), chosen, rejected (texts, or messages whose last is the assistant's);
hh-rlhf's transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") need no prompt. Columns of a labelled response:
prompt, response, safe (true or false). Other columns (votes, sources) are left alone. A file of pairs is never
taken for labels by itself: tools/label_pairs.py writes one as the other.

The model reads the question in its template, the part of the response that it may see, and the end-of-sequence
token, where the score is read (R1 section 3.1 does not say where; transformers reads it there too).

Held-out examples are the rows of `data.eval_path`, or the last `eval_size` rows of `data.path`; training rows with
a held-out prompt are dropped. Whatever is dropped is counted under its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, DataConfig, RewardModelConfig
from r1mega.data.chat import question_of, template
from r1mega.data.generated_preferences import labelled_rows, pair_rows
from r1mega.data.prompts import Row, encode, encode_prompts, read_rows

GENERATED = "generated:preferences"
THINK, THINK_END = "<think>", "</think>"
TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Comparison:
    """One row as texts."""

    id: str
    question: str
    responses: tuple[str, ...]
    """A pair: chosen, rejected. A labelled response: itself."""
    label: float
    """1 safe, 0 unsafe; 1 for a pair."""


@dataclass(frozen=True)
class Example:
    """One row as the model reads it."""

    id: str
    sequences: tuple[tuple[int, ...], ...]
    """Token ids of the texts, end-of-sequence included: chosen and rejected, or the one response."""
    label: float


@dataclass(frozen=True)
class PreferenceSet:
    train: list[Example]
    heldout: list[Example]
    dropped: Counter[str]
    """Rows of both sides that are not used, by reason."""


class Unusable(Exception):
    """A row that cannot be learnt from; the message is the reason under which it is counted."""


def read_preferences(
    data: DataConfig, kind: RewardModelConfig, tokenizer: Any, *, seed: int, max_length: int
) -> PreferenceSet:
    """Reads, splits and tokenises. Raises ConfigError or FileNotFoundError, saying what, where and how to mend it."""
    encode = Encoder(tokenizer, data.template, kind.reads)
    dropped: Counter[str] = Counter()
    train_rows, heldout_rows = _split(data, kind, seed)
    heldout = _comparisons(heldout_rows, kind, dropped)
    train = _comparisons(train_rows, kind, dropped)
    questions = {_squeezed(item.question) for item in heldout}
    unseen = [item for item in train if _squeezed(item.question) not in questions]
    dropped["with a held-out prompt"] += len(train) - len(unseen)
    result = PreferenceSet(
        _examples(unseen, encode, max_length, dropped),
        _examples(heldout, encode, max_length, dropped),
        +dropped,
    )
    for name, examples in (("training", result.train), ("held-out", result.heldout)):
        if not examples:
            raise ConfigError(
                f"{data.path}: no {name} example is left of {len(train_rows) + len(heldout_rows)} rows "
                f"({describe(result.dropped)}): see data.eval_size and sft.max_length={max_length}"
            )
    return result


def describe(dropped: Counter[str]) -> str:
    """ "3 without a summary, 1 identical dropped"."""
    return (
        ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common()) + " dropped"
        if dropped
        else "none dropped"
    )


# ---------------------------------------------------------------- what the model reads


def part_read(response: str, reads: str) -> str | None:
    """The part of a response that a reward model may see; None where there is none.

    The response is whole: with the <think> that its prompt may have opened. reads "response": all of it. "summary":
    what follows the last </think>, or the whole response where it holds no thinking; an unclosed <think> leaves no
    summary. Both without outer white space; nothing but that is None.
    """
    if reads == "response":
        return response.strip() or None
    summary = response.rpartition(THINK_END)[2]
    return None if THINK in summary else summary.strip() or None


class Encoder:
    """Question and whole response -> the token ids that a reward model scores, in training and in RL alike.

    The prompt's tokens are the policy's (encode_prompts). A <think> that the template has opened is not repeated.
    """

    def __init__(self, tokenizer: Any, template_name: str, reads: str):
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, where a score is read; set eos_token"
            )
        self.tokenizer, self.to_text, self.reads = tokenizer, template(template_name), reads

    def __call__(self, question: str, response: str) -> tuple[int, ...] | None:
        """None where the response has nothing that the model may read."""
        part = part_read(response, self.reads)
        if part is None:
            return None
        if self.reads == "response":
            part = self.to_text.completion(part)
        (head,) = encode_prompts([self.to_text(question.strip())], self.tokenizer)
        (tail,) = encode([part], self.tokenizer, add_special_tokens=False)
        return (*head, *tail, self.tokenizer.eos_token_id)


def _examples(
    comparisons: Sequence[Comparison], encode: Encoder, max_length: int, dropped: Counter[str]
) -> list[Example]:
    examples = []
    for item in comparisons:
        sequences = tuple(encode(item.question, response) for response in item.responses)
        whole = tuple(ids for ids in sequences if ids is not None)
        if len(whole) < len(sequences):
            dropped["without a text to read"] += 1
        elif max(map(len, whole)) > max_length:
            dropped["longer than sft.max_length"] += 1
        elif len(set(whole)) < len(whole):
            dropped["with identical responses"] += 1
        else:
            examples.append(Example(item.id, whole, item.label))
    return examples


# ---------------------------------------------------------------- rows


def _split(data: DataConfig, kind: RewardModelConfig, seed: int) -> tuple[list[Row], list[Row]]:
    if data.path == GENERATED:
        make = pair_rows if kind.objective == "pairwise" else labelled_rows
        return (
            _generated(make(data.size, seed=seed, heldout=False)),
            _generated(make(data.eval_size, seed=seed, heldout=True)),
        )
    if data.path.startswith("generated:"):
        raise ConfigError(f"data.path={data.path} gives no preferences; the generated ones are {GENERATED}")
    rows = read_rows(data.path)
    if data.eval_path:
        return rows, read_rows(data.eval_path, "data.eval_path")[: data.eval_size or None]
    if not 0 < data.eval_size < len(rows):
        raise ConfigError(
            f"{data.path}: data.eval_size={data.eval_size} of {len(rows)} rows leaves nothing to train on or nothing "
            "to measure; choose a number between, or set data.eval_path="
        )
    return rows[: -data.eval_size], rows[-data.eval_size :]


def _generated(rows: list[dict[str, Any]]) -> list[Row]:
    return [Row(f"{GENERATED}:{index}", index, columns) for index, columns in enumerate(rows)]


def _comparisons(rows: Sequence[Row], kind: RewardModelConfig, dropped: Counter[str]) -> list[Comparison]:
    read: Callable[[Row], Comparison] = read_pair if kind.objective == "pairwise" else read_labelled
    comparisons = []
    for row in rows:
        try:
            comparisons.append(read(row))
        except Unusable as reason:
            dropped[str(reason)] += 1
    return comparisons


def read_pair(row: Row) -> Comparison:
    """Raises Unusable for a row to count and leave out, ConfigError for one that is no pair at all."""
    if missing := {"chosen", "rejected"} - set(row.columns):
        raise ConfigError(
            f"{row.where}: no column {min(missing)!r}; columns are {', '.join(map(str, row.columns)) or 'none'}; "
            "a pair has prompt, chosen and rejected; reward_model.objective=pointwise reads prompt, response, safe"
        )
    sides = [_conversation(row, name) for name in ("chosen", "rejected")]
    if sides[0][0] != sides[1][0]:
        raise Unusable("with two different prompts")
    if not all(response.strip() for _, response in sides):
        raise Unusable("with an empty response")
    return Comparison(_id(row), sides[0][0], (sides[0][1], sides[1][1]), 1.0)


def read_labelled(row: Row) -> Comparison:
    """Raises Unusable for a row to count and leave out, ConfigError for one that has no label."""
    label = row.columns.get("safe")
    if not isinstance(label, bool):
        raise ConfigError(
            f"{row.where}: column 'safe' is {label!r}, not true or false; a labelled response has prompt, response "
            "and safe; tools/label_pairs.py makes such rows of pairs"
        )
    question, response = _conversation(row, "response")
    if not response.strip():
        raise Unusable("with an empty response")
    return Comparison(_id(row), question, (response,), float(label))


def _conversation(row: Row, column: str) -> tuple[str, str]:
    """(question, response) of one side of a row."""
    value = row.columns.get(column)
    if isinstance(value, str) and "prompt" in row.columns:
        return question_of(_messages(row, "prompt")), value
    if isinstance(value, str) and TURN.match(value):
        parts = TURN.split(value)[1:]
        messages = [(ROLES[role], text) for role, text in zip(parts[::2], parts[1::2], strict=True)]
    elif isinstance(value, list):
        messages = (_messages(row, "prompt") if "prompt" in row.columns else []) + _messages(row, column)
    else:
        raise ConfigError(
            f"{row.where}: column {column!r} is {str(value)[:40]!r} and there is no column 'prompt'; it must be a text "
            "beside a prompt, a list of messages, or a transcript of Human and Assistant"
        )
    if len(messages) < 2 or messages[-1][0] != "assistant":
        raise Unusable("that do not end with the assistant")
    return question_of(messages[:-1]), messages[-1][1]


def _messages(row: Row, column: str) -> list[tuple[str, str]]:
    """(role, text) of each message; a plain text is one of the user's."""
    value = row.columns[column]
    if isinstance(value, str):
        return [("user", value)]
    try:
        return [(str(message["role"]), str(message["content"])) for message in value]
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{row.where}: column {column!r} is neither a text nor a list of messages with role and content"
        ) from error


def _id(row: Row) -> str:
    return str(row.columns.get("id") or f"{Path(row.where).name}")


def _squeezed(text: str) -> str:
    return " ".join(text.split())
