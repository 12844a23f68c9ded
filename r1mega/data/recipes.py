"""Settings of the two stages that make training data: the cold start and rejection sampling (R1 v2 B.3.2, B.3.3).

They share the sections of a RunConfig that concern sampling and scoring, so that both read alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from r1mega import checks
from r1mega.config import (
    ConfigError,
    DataConfig,
    GRPOConfig,
    JudgeConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from r1mega.data.chat import template

HUMAN = "human"
SOURCES = ("few_shot", "direct", "r1_zero", HUMAN)
"""Where cold-start rows come from (R1 v1, section 2.3.1)."""
REWRITING = ("endpoint", "rules", "none")
REVIEWS = ("files", "none")
FILTERS = (
    "format", "no_words", "wrong_language", "mixed_language", "code_block", "long_paragraph", "looping_tail",
    "repeated_ngrams",
)  # fmt: skip
"""What a response can be dropped for besides being wrong: bad tags, and the reasons of rewards/readability.py."""


@dataclass(frozen=True)
class GenerateData:
    """What both stages share."""

    command: ClassVar[str] = "data"
    artefacts: ClassVar[tuple[str, ...]] = (
        "data.jsonl", "manifest.json", "results.json", "lineage.json", "samples/*", "scored/*", "rewritten/*",
        "review/*",
    )  # fmt: skip

    dir: str = ""
    """Folder of the stage; empty means runs/<config file's folder>/<its name>."""
    seed: int = 1
    platform: str = "auto"
    samples: int = 4
    """Responses sampled for each prompt."""
    per_prompt: int = 0
    """Responses kept of each prompt at most, in the order they were sampled in; 0 keeps all. In the cold start each
    source that a model writes has so many of its own, and what people wrote is not counted."""
    size: int = 0
    """Rows at most, of the first prompts; 0 is no limit. In the cold start people's rows come first, and the sources
    that models write share the rest equally; what one cannot fill goes to the others (cold_start.shared)."""
    shard_size: int = 256
    """Prompts in one shard: what a killed run may have to sample again."""
    filters: tuple[str, ...] = tuple(name for name in FILTERS if name != "no_words")
    """Names of FILTERS."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files: rows that share a 10-gram with one are dropped."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What samples; R1-Zero for the cold start, the first RL's checkpoint for rejection sampling."""
    data: DataConfig = field(default_factory=DataConfig)
    """Questions with answers, and the template they are sampled in."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=lambda: RewardConfig(weights={"accuracy": 1.0}))
    """A sample is right where each of its task's terms of weight above 0 is 1: name yes-or-no terms."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Compares prediction and reference where no rule can; it serves tasks without a row in rewards.task_weights."""
    rewriter: JudgeConfig = field(default_factory=JudgeConfig)
    """The instruct model that writes: an OpenAI-compatible endpoint."""

    def run_config(self, model: ModelConfig | None = None) -> RunConfig:
        """The same settings as the engines and checks take them."""
        longest = self.data.max_prompt_tokens + max(tokens for _, tokens in self.rollout.max_tokens)
        return RunConfig(
            stage="sft",
            dir=self.dir,
            seed=self.seed,
            platform=self.platform,
            model=model or self.model,
            data=self.data,
            rollout=self.rollout,
            rewards=self.rewards,
            judge=self.judge,
            grpo=GRPOConfig(group_size=self.samples),
            sft=SFTConfig(max_length=longest),
            parallel=ParallelConfig(tokens_per_chunk=longest),
        )

    def check(self) -> None:
        """Raise ConfigError with the first complaint."""
        for complaint in self._complaints():
            raise ConfigError(complaint)
        checks.check(self.run_config())
        template(self.data.template)

    def _complaints(self) -> Iterator[str]:
        for name in ("samples", "shard_size"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: it must be 1 or more"
        for name in ("per_prompt", "size"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)}: it must be 0 or more"
        yield from _unknown("filters", self.filters, FILTERS)
        for row in (self.rewards.weights, *self.rewards.task_weights.values()):
            if unfit := {"length", "helpful", "safety"} & row.keys():
                yield f"rewards: the term {min(unfit)!r} is no yes or no; take accuracy, judge, format or readability"


@dataclass(frozen=True)
class ColdStart(GenerateData):
    """Long, readable chains of thought to begin from (R1 v2, B.3.2)."""

    sources: tuple[str, ...] = ("r1_zero",)
    """Of SOURCES; rows are labelled with theirs."""
    prompted: ModelConfig = field(default_factory=ModelConfig)
    """What few_shot and direct ask; without a path it is `model`."""
    few_shot: str = ""
    """File with the prompt of few_shot: worked examples with long reasoning, and {question}."""
    direct: str = ""
    """File with the prompt of direct; empty takes the one of data/cold_start.py."""
    human: str = ""
    """Rows of source human: a jsonl file with question, response and answer."""
    template: str = "r1"
    """Of the model that will be trained on the rows: how reasoning and summary are written as one response."""
    rewriting: str = "endpoint"
    """"endpoint" (`rewriter`) | "rules" (a toy) | "none"."""
    review: str = "none"
    """"files": two passes over review/pass1.jsonl and pass2.jsonl, edited by people | "none"."""

    def _complaints(self) -> Iterator[str]:
        yield from super()._complaints()
        yield from _unknown("sources", self.sources, SOURCES)
        yield from _unknown("rewriting", (self.rewriting,), REWRITING)
        yield from _unknown("review", (self.review,), REVIEWS)
        template(self.template, "template")
        if not self.sources:
            yield f"sources=: name one or more of {', '.join(SOURCES)}"
        for source in ("few_shot", HUMAN):
            if source in self.sources and not getattr(self, source):
                yield f"{source}=: the source {source} needs its file"
        if self.rewriting == "endpoint" and not (self.rewriter.url and self.rewriter.model):
            yield "rewriter.url=, rewriter.model=: name the endpoint that rewrites, or set rewriting=rules or none"


@dataclass(frozen=True)
class RejectionSampling(GenerateData):
    """Right and readable samples of a checkpoint, and general data beside them (R1 v2, B.3.3)."""

    general: str = ""
    """jsonl file of general rows: question (or messages), response, and optionally task, reasoning, language."""
    reasoned: tuple[str, ...] = ()
    """Tasks of general rows that get a chain of thought, written by `rewriter` where the row has none."""

    def _complaints(self) -> Iterator[str]:
        yield from super()._complaints()
        if self.reasoned and not self.general:
            yield f"reasoned={','.join(self.reasoned)}: there is no general data to reason about; set general=FILE"


def _unknown(setting: str, given: tuple[str, ...], known: tuple[str, ...]) -> Iterator[str]:
    for name in given:
        if name not in known:
            yield f"{setting}={','.join(given)}: {name!r} is not one of {', '.join(known)}"
