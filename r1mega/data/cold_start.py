"""The cold start's long chains of thought, from four labelled sources (R1 v1, section 2.3.1; v2, B.3.2).

few_shot   a model is shown worked examples with long reasoning
direct     a model is asked to reflect and verify in its answer
r1_zero    R1-Zero samples in its own template, at temperature 1.0
human      people wrote or edited the response (also what a review edits, data/review.py)

A sample must be right, well formed and readable; then it is rewritten (data/rewriting.py), must still be right and
readable, and is reviewed. What is well formed for R1-Zero's template (answer tags) is not for a prompt text, so the
format rewards count in source r1_zero alone; few_shot and direct need closed reasoning and a summary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, ModelConfig
from r1mega.data.chat import Template, prompt_text, template
from r1mega.data.documents import exchange
from r1mega.data.prompts import Row
from r1mega.data.recipes import HUMAN, ColdStart
from r1mega.data.rejection_sampling import judged_by, training_row, unfit, without_form, wrong
from r1mega.data.responses import Response, parse_response
from r1mega.data.shards import Rows
from r1mega.samples import Prompt

DIRECT = """\
Answer the question below. Think first, at length and in detail: work step by step, reflect on what you have done, \
verify each result, and where something is wrong, say so and correct it. Write your thoughts between <think> and \
</think>, and after them a summary with the final answer inside \\boxed{}.

Question: {question}

<think>
"""
"""[open]: the paper does not print its prompt."""


@dataclass(frozen=True)
class Source:
    """One way to come by samples."""

    name: str
    model: ModelConfig
    template: Template
    prompt: str
    """Name of the prompt text, for the lineage."""
    stop: str = ""
    """Where a base model goes on with the next example, its text is cut."""

    @property
    def is_prompted(self) -> bool:
        """Asked by a prompt text, not in a template that it was trained in."""
        return self.name in ("few_shot", "direct")

    def cut(self, text: str) -> tuple[str, bool]:
        """(the text up to the next example, whether there was one)."""
        head, found, _ = text.partition(self.stop) if self.stop else (text, "", "")
        return head, bool(found)


@dataclass(frozen=True)
class Candidate:
    """A sample that is right and readable."""

    id: str
    source: Source
    prompt: Prompt
    response: Response
    sample: Mapping[str, Any]


def sampled_sources(config: ColdStart) -> list[Source]:
    """The sources that a model writes, in the order of the config."""
    prompted = config.prompted if config.prompted.path else config.model
    known = {
        "few_shot": lambda: _prompted(
            "few_shot", prompted, _text(config.few_shot, "few_shot"), config.few_shot
        ),
        "direct": lambda: _prompted(
            "direct",
            prompted,
            _text(config.direct, "direct") if config.direct else DIRECT,
            config.direct or "data/cold_start.py DIRECT",
        ),
        "r1_zero": lambda: Source(
            "r1_zero", config.model, template(config.data.template), f"template {config.data.template}"
        ),
    }
    return [known[name]() for name in config.sources if name != HUMAN]


def _prompted(name: str, model: ModelConfig, text: str, prompt: str) -> Source:
    """A source that shows a prompt text; its stop is what begins the line of a question, if an example has it as well."""
    shown = prompt_text(text, f"{name}={prompt}")
    before = text.partition("{question}")[0]
    line = before.rpartition("\n")[2]
    shots = f"\n{before.removesuffix(line)}"
    return Source(name, model, shown, prompt, f"\n{line}" if line.strip() and f"\n{line}" in shots else "")


def _text(path: str, setting: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{setting}={path}: no such file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting}={path}: not readable as UTF-8 text: {error}") from error


def candidates(
    samples: Iterable[Mapping[str, Any]],
    prompts: Mapping[str, Prompt],
    source: Source,
    config: ColdStart,
    weights: Mapping[str, Mapping[str, float]],
    dropped: Counter[str],
) -> Iterator[Candidate]:
    """Of a source's scored samples, those that are right and readable; at most per_prompt of each prompt."""
    kept: Counter[str] = Counter()
    filters = config.filters
    if source.is_prompted:
        weights = {task: without_form(terms) for task, terms in weights.items()}
        filters = ("format", *filters)
    for sample in samples:
        prompt = prompts[sample["prompt"]]
        cut = sample["finish_reason"] == "length"
        response = parse_response(sample["text"], opened=source.template.opened, truncated=cut)
        reason = wrong(sample, weights[prompt.task]) or unfit(response, prompt.question, filters)
        if not reason and not response.reasoning:
            reason = "no_reasoning"
        if not reason and config.per_prompt and kept[prompt.id] >= config.per_prompt:
            reason = "per_prompt"
        if reason:
            dropped[reason] += 1
            continue
        kept[prompt.id] += 1
        yield Candidate(f"{source.name}/{prompt.id}#{sample['index']}", source, prompt, response, sample)


def rewritten_row(
    candidate: Candidate, response: Response, config: ColdStart, lineage: Mapping[str, Any], count_tokens: Any
) -> dict[str, Any]:
    """The row of a rewritten candidate; `lineage`: what the rows of its source share."""
    text = template(config.template).response(response.reasoning, response.summary)
    filters = list(dict.fromkeys([*candidate.sample["terms"], *config.filters]))
    return training_row(
        candidate.id,
        candidate.prompt.messages or candidate.prompt.question,
        text,
        answer=candidate.prompt.answer or None,
        task=candidate.prompt.task,
        tokens=count_tokens(text),
        lineage={
            **lineage,
            "prompt": f"{candidate.prompt.id} of {config.data.path}, {candidate.source.prompt}",
            "sampling": {**lineage["sampling"], "index": candidate.sample["index"]},
            "filters": [*filters, *(f"rewritten {name}" for name in filters), "duplicate", "contaminated"],
            "judge": judged_by(config, candidate.sample),
        },
    )


def human_rows(rows: Iterable[Row], config: ColdStart, count_tokens: Any) -> Iterator[dict[str, Any]]:
    """What people wrote, as rows. ConfigError with file and line where the tags or the answer are wrong."""
    for row in rows:
        asked = exchange(row)
        if (verdict := parse_response(asked.response).verdict) != "ok":
            raise ConfigError(
                f"{row.where}: the response's tags are wrong ({verdict}); it is <think>reasoning</think> and a summary"
            )
        parts = parse_response(asked.response)
        response = template(config.template).response(parts.reasoning, parts.summary)
        answer = row.columns.get("answer")
        yield training_row(
            f"human/{row.columns.get('id') or row.index}",
            asked.question,
            response,
            answer=None if answer is None else str(answer),
            task=str(row.columns.get("task") or config.data.task),
            tokens=count_tokens(response),
            lineage={"source": HUMAN, "model": None, "prompt": row.where, "sampling": None, "filters": [],
                     "judge": None, "rewriter": None},
        )  # fmt: skip


def shared(human: Rows, sampled: Iterable[Rows], size: int, dropped: Counter[str]) -> Rows:
    """At most `size` rows (0: all): people's first; of the rest each sampled source gets as many as any other, from its
    first prompts on, and what one cannot fill goes to the others. The sources stay in their order."""
    sampled = list(sampled)
    turns = [row for turn in zip_longest(*sampled) for row in turn if row is not None]
    room = max(0, size - len(human)) if size else len(turns)
    kept = {row["id"] for row in turns[:room]}
    rows = human[: size or None] + [row for rows in sampled for row in rows if row["id"] in kept]
    if left := len(human) + len(turns) - len(rows):
        dropped["size"] += left
    return rows
