"""Reads documents for SFT: a question in its template, then the whole response.

Sources are those of prompts.py; the rows of `r1mega data` have question and response. A column `messages` is a
conversation: it stands before the column `response`, or ends with the assistant. The loader runs no tokenizer's own
chat template: many strip the reasoning that is to be trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from r1mega.config import ConfigError, DataConfig
from r1mega.data import bilingual, chain
from r1mega.data.chat import THINK, Question, Template, template
from r1mega.data.evaluation_texts import read_evaluation
from r1mega.data.prompts import (
    Row,
    as_text,
    columns_of,
    conversation,
    encode,
    encode_prompts,
    is_conversation,
    read_rows,
    text_of,
)
from r1mega.data.responses import parse_response

GENERATED: dict[str, Callable[..., list[tuple[str, str]]]] = {
    "generated:chain-base": chain.base_documents,
    "generated:bilingual-base": bilingual.base_documents,
}
PROMPT_COMPLETION = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),
    ("problem", "solution"),
    ("messages", "response"),
    ("question", "answer"),
    ("messages", ""),
)
"""Columns tried in this order for SFT documents; the rows of `r1mega data` have question and response."""


@dataclass(frozen=True)
class Document:
    """One SFT sequence of n tokens, end-of-sequence token included."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """[n]: 1 where this token is trained on (0 for the first token: nothing predicts it)."""


@dataclass(frozen=True)
class DocumentSet:
    train: list[Document]
    dropped: int
    """Documents longer than max_length."""


@dataclass(frozen=True)
class Exchange:
    """A row to train on as texts."""

    where: str
    question: Question
    """"" for a text that answers none."""
    response: str


def read_documents(
    data: DataConfig, tokenizer: Any, *, seed: int, loss_on: str = "response", max_length: int = 0
) -> DocumentSet:
    """Reads SFT documents: the question in its template, then the completion and the end-of-sequence token.

    Prompt and completion are tokenised apart, so that the prompt's tokens are those the engine will read.
    loss_on: "response" trains on the completion (and all of a document without a question), "all" on
    everything. Documents of more than `max_length` tokens are dropped and counted (0: no limit).
    """
    if loss_on not in ("response", "all"):
        raise ConfigError(f'sft.loss_on="{loss_on}" is neither "response" nor "all"')
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    to_text = template(data.template)
    exchanges = _exchanges(data, seed)
    _refuse_evaluation_questions(exchanges, data)
    heads = encode_prompts([to_text(e.question) if e.question else "" for e in exchanges], tokenizer)
    tails = encode([_completion(to_text, e) for e in exchanges], tokenizer, add_special_tokens=False)
    documents = []
    for head, tail in zip(heads, tails, strict=True):
        ids = (*head, *tail, eos)
        mask = [0 if loss_on == "response" else 1] * len(head) + [1] * (len(tail) + 1)
        mask[0] = 0
        if not max_length or len(ids) <= max_length:
            documents.append(Document(ids, tuple(mask)))
    if not documents:
        raise ConfigError(
            f"{data.path}: all {len(exchanges)} documents are longer than sft.max_length={max_length}"
        )
    return DocumentSet(documents, dropped=len(exchanges) - len(documents))


def _completion(to_text: Template, exchange: Exchange) -> str:
    """The response as the policy writes it after the prompt: whole, its reasoning included.

    Where the prompt opens the reasoning, tags that are not one block at the start would put reasoning and summary
    into each other's place: ConfigError.
    """
    if exchange.question and to_text.opened and THINK[1:] in exchange.response:
        verdict = parse_response(exchange.response).verdict
        if verdict != "ok":
            raise ConfigError(
                f"{exchange.where}: the response's tags are wrong ({verdict}): {exchange.response[:60]!r}; it must be "
                "<think>reasoning</think> and a summary, or have no tags; mend or remove the row"
            )
    return to_text.completion(exchange.response.lstrip() if to_text.opened else exchange.response)


def _refuse_evaluation_questions(exchanges: Sequence[Exchange], data: DataConfig) -> None:
    """ConfigError where documents overlap the evaluation set that data.eval_path names."""
    if not data.eval_path:
        return
    evaluation = read_evaluation([data.eval_path], "data.eval_path")
    overlapping = [e for e in exchanges if evaluation.found_in(as_text(e.question), e.response)]
    if overlapping:
        raise ConfigError(
            f"{data.path}: {len(overlapping)} of {len(exchanges)} documents share a 10-gram with {data.eval_path}, first "
            f"{overlapping[0].where}; remove them (`r1mega data` does, with decontaminate={data.eval_path}) or clear "
            "data.eval_path"
        )


def _exchanges(data: DataConfig, seed: int) -> list[Exchange]:
    if data.path in GENERATED:
        pairs = GENERATED[data.path](data.size, data.operations, seed=seed)
        return [Exchange(f"{data.path}:{i}", question, text) for i, (question, text) in enumerate(pairs)]
    if data.path.startswith("generated:"):
        raise ConfigError(
            f"data.path={data.path} gives no documents; the generated documents are {', '.join(GENERATED)}"
        )
    if not data.path:
        raise ConfigError("data.path is empty: name a jsonl, json or parquet file, or generated:chain-base")
    rows = read_rows(data.path)
    prompt, completion = columns_of(rows, data, PROMPT_COMPLETION)
    return [exchange(row, prompt, completion) for row in rows]


def exchange(row: Row, prompt: str = "question", completion: str = "response") -> Exchange:
    """A row's question and response. Its column `messages`, where it has one, is the question, or both."""
    if not is_conversation(row, prompt):
        question = text_of(row, prompt, "data.question_field")
        return Exchange(row.where, question, text_of(row, completion, "data.answer_field"))
    if completion in row.columns:
        talk = conversation(row, "user")
        return Exchange(row.where, talk, text_of(row, completion, "data.answer_field"))
    talk = conversation(row, "assistant")
    return Exchange(row.where, talk[:-1], talk[-1][1])
