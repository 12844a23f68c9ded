"""Rejection sampling: of the responses that a checkpoint samples, the right and readable ones are kept (R1 v2, B.3.3).

Dropped are responses that a rule or the judge calls wrong, bad tags, and a reasoning with mixed languages, long
paragraphs or code blocks; then duplicates, and what overlaps an evaluation set. General data joins by task: with a
chain of thought where its task is to have one, without for simple queries such as "hello". What the paper leaves
open and is chosen here: loops and repetition are dropped too, and what counts as simple (SIMPLE_WORDS).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from r1mega.data.chat import Template, as_messages, rounds
from r1mega.data.decontamination import Evaluation
from r1mega.data.documents import Exchange, exchange
from r1mega.data.duplicates import Duplicates
from r1mega.data.prompts import Row, as_text
from r1mega.data.recipes import HUMAN, GenerateData
from r1mega.data.responses import Response, parse_response
from r1mega.rewards.language import detect
from r1mega.rewards.readability import unreadable
from r1mega.rewards.repetition import words
from r1mega.samples import Prompt

SIMPLE_WORDS = 3
"""A query of at most so many words and without a digit ("hello", "how are you?") gets no chain of thought."""


def wrong(sample: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    """Why a scored sample is not right: truncated, or term:verdict; "" for a right one. Terms of weight 0 are measured
    only."""
    if sample.get("finish_reason") == "length":
        return "truncated"
    for term, weight in weights.items():
        if weight > 0 and sample["terms"][term] < 1.0:
            return f"{term}:{sample['verdicts'][term]}"
    return ""


def without_form(weights: Mapping[str, float]) -> dict[str, float]:
    """The terms for a text in another form than the template's: rewritten, or asked for by a prompt text."""
    return {term: weight for term, weight in weights.items() if term not in ("format", "reasoning_format")}


def unfit(response: Response, question: str, filters: Iterable[str]) -> str:
    """The first of the filters that drops a response for its form; "" for none."""
    if "format" in filters and not response.ok:
        return f"format:{response.verdict}"
    reasons = unreadable(response.reasoning, detect(question))
    return next((reason for reason in reasons if reason in filters), "")


@dataclass
class Selection:
    """Judges rows one after another; remembers what it has seen, and counts what it drops."""

    config: GenerateData
    evaluation: Evaluation
    dropped: Counter[str]

    def __post_init__(self) -> None:
        self._duplicates = Duplicates()
        self._kept: Counter[tuple[str, str]] = Counter()

    def keeps(self, question: str, response: str, source: str = "") -> bool:
        """Whether the row is new, overlaps no evaluation set, and is not one too many of its question and source.

        Of what people wrote (source HUMAN) there are never too many.
        """
        if self.evaluation.found_in(question, response):
            return self._drop("contaminated")
        limit = 0 if source == HUMAN else self.config.per_prompt
        if limit and self._kept[source, question] >= limit:
            return self._drop("per_prompt")
        if reason := self._duplicates.found(f"{question}\n{response}"):
            return self._drop(reason)
        self._kept[source, question] += 1
        return True

    def _drop(self, reason: str) -> bool:
        self.dropped[reason] += 1
        return False


def clean_prompts(prompts: Iterable[Prompt], evaluation: Evaluation, dropped: Counter[str]) -> list[Prompt]:
    """The prompts whose question is in no evaluation set and not a repetition: sampling the others would be in vain."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for prompt in prompts:
        key = (" ".join(prompt.question.split()), prompt.task)
        if evaluation.found_in(prompt.question):
            dropped["prompts: contaminated"] += 1
        elif key in seen:
            dropped["prompts: duplicate"] += 1
        else:
            seen.add(key)
            kept.append(prompt)
    return kept


def select(
    samples: Iterable[Mapping[str, Any]],
    prompts: Mapping[str, Prompt],
    weights: Mapping[str, Mapping[str, float]],
    template: Template,
    selection: Selection,
    lineage: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Rows of training data from scored samples. `weights`: task -> its terms; `lineage`: what all rows share."""
    config, dropped = selection.config, selection.dropped
    for sample in samples:
        prompt = prompts[sample["prompt"]]
        response = parse_response(
            sample["text"], opened=template.opened, truncated=sample["finish_reason"] == "length"
        )
        reason = wrong(sample, weights[prompt.task]) or unfit(response, prompt.question, config.filters)
        if reason:
            dropped[reason] += 1
        elif selection.keeps(prompt.question, sample["text"]):
            yield row_of(prompt, sample, template.whole(sample["text"]), config, lineage)


def row_of(
    prompt: Prompt, sample: Mapping[str, Any], response: str, config: GenerateData, lineage: Mapping[str, Any]
) -> dict[str, Any]:
    return training_row(
        f"{prompt.id}#{sample['index']}",
        prompt.messages or prompt.question,
        response,
        answer=prompt.answer or None,
        task=prompt.task,
        tokens=sample["tokens"],
        lineage={
            **lineage,
            "prompt": f"{prompt.id} of {config.data.path}",
            "sampling": {**lineage["sampling"], "index": sample["index"]},
            "filters": [*dict.fromkeys([*sample["terms"], *config.filters]), "duplicate", "contaminated"],
            "judge": judged_by(config, sample),
        },
    )


def judged_by(config: GenerateData, sample: Mapping[str, Any]) -> str | None:
    """Which judge had a say in a sample's score, for the lineage."""
    return f"{config.judge.model} at {config.judge.url}" if "judge" in sample["terms"] else None


def training_row(
    id: str,
    question: Any,
    response: str,
    *,
    answer: str | None,
    task: str,
    tokens: int,
    lineage: dict[str, Any],
    language: str = "",
) -> dict[str, Any]:
    """A row as stage "sft" reads it; `messages` is there where the question is a conversation."""
    text = as_text(question)
    row: dict[str, Any] = {"id": id, "question": text}
    if not isinstance(question, str) and len(question) > 1:
        row["messages"] = [{"role": role, "content": content} for role, content in as_messages(question)]
    return row | {
        "response": response,
        "answer": answer,
        "task": task,
        "language": language or detect(text),
        "tokens": tokens,
        "lineage": lineage | {"round": rounds(question)},
    }


# ---------------------------------------------------------------- general data


@dataclass(frozen=True)
class General:
    """A general row: what is asked, what is answered, and the chain of thought it comes with."""

    id: str
    exchange: Exchange
    reasoning: str
    summary: str
    task: str
    language: str
    lineage: dict[str, Any]

    @property
    def question(self) -> str:
        return as_text(self.exchange.question)

    def wants_reasoning(self, reasoned: Iterable[str]) -> bool:
        """Whether a chain of thought is to be written for it."""
        return not self.reasoning and self.task in reasoned and not is_simple(self.question)


def read_general(rows: Iterable[Row]) -> list[General]:
    """Rows with question (or messages) and response; reasoning in the tags of the response or a column of its own."""
    found = []
    for row in rows:
        asked = exchange(row, "prompt" if "prompt" in row.columns else "question")
        parts = parse_response(asked.response)
        tagged = parts.verdict != "missing_think"
        found.append(
            General(
                id=str(row.columns.get("id") or f"general:{row.index}"),
                exchange=asked,
                reasoning=parts.reasoning if tagged else str(row.columns.get("reasoning") or "").strip(),
                summary=parts.summary if tagged else asked.response.strip(),
                task=str(row.columns.get("task") or "general"),
                language=str(row.columns.get("language") or ""),
                lineage=dict(row.columns.get("lineage") or {"model": None, "prompt": row.where}),
            )
        )
    return found


def is_simple(question: str) -> bool:
    """A query that asks for no thought: "hello"."""
    return len(words(question)) <= SIMPLE_WORDS and not any(c.isdigit() for c in question)


def general_rows(
    rows: Iterable[General],
    written: Mapping[str, str],
    template: Template,
    selection: Selection,
    rewriter: str | None,
    count_tokens: Callable[[str], int],
) -> Iterator[dict[str, Any]]:
    """Rows of training data; `written`: id -> the chain of thought that `rewriter` wrote for it."""
    for row in rows:
        reasoning = "" if is_simple(row.question) else row.reasoning or written.get(row.id, "")
        response = template.response(reasoning, row.summary) if reasoning else row.summary
        if selection.keeps(row.question, response):
            yield training_row(
                row.id,
                row.exchange.question,
                response,
                answer=None,
                task=row.task,
                language=row.language,
                tokens=count_tokens(response),
                lineage={
                    "sampling": None, "judge": None, **row.lineage, "source": "general",
                    "filters": ["duplicate", "contaminated"],
                    "rewriter": rewriter if row.id in written and reasoning else None,
                },
            )  # fmt: skip
