"""What an evaluation will sample: everything is read here, so that every mistake is found before the first sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, ModelConfig, RunConfig
from r1mega.data.chat import TEMPLATES, template
from r1mega.data.generations import by_question, questions_inside, read_generations
from r1mega.data.suite_formats import Question, mathematics
from r1mega.data.suites import SUITES, Suite, named_suites, read_suite
from r1mega.rollout.engine import Sampling
from r1mega.stages.evaluation_config import CHAT, EvaluationConfig
from r1mega.stages.evaluation_grading import JUDGED
from r1mega.stages.evaluation_sources import (
    EndpointSource,
    EngineSource,
    FileSource,
    Request,
    Source,
    check_model,
    fitting,
)
from r1mega.stages.run_directory import checksum
from r1mega.stages.tokenizer import load_tokenizer

GREEDY = "-greedy"
"""Ends the name of the decoding check's samples."""
LIMITS = {"math": ("cpu_seconds", "last_number"), "code": ("code_seconds", "code_memory_mib", "isolation")}
"""Task -> settings of `rewards` that its verdicts depend on."""


@dataclass(frozen=True)
class Job:
    """The samples of one suite (of one variant in a file of generations)."""

    name: str
    suite: Suite
    questions: list[Question]
    prompts: dict[str, str]
    """Question id -> exactly what the model reads."""
    k: dict[str, int]
    """Question id -> samples."""
    sampling: Sampling
    source: Source
    settings: dict[str, Any]
    """What its samples and their verdicts depend on."""

    @property
    def requests(self) -> list[Request]:
        return [Request(q, i, self.prompts[q.id]) for q in self.questions for i in range(self.k[q.id])]


@dataclass(frozen=True)
class Plan:
    config: EvaluationConfig
    jobs: list[Job]
    inputs: dict[str, Path]
    """Files that lineage names with their checksums."""
    notes: tuple[str, ...] = ()


def plan_of(config: EvaluationConfig) -> Plan:
    """Raises ConfigError or FileNotFoundError for whatever cannot be read or served."""
    if not config.suites:
        return Plan(config, [], {"contests": Path(config.contests)})
    return _plan_of_file(config) if config.generations else _plan_of_model(config)


def _plan_of_model(config: EvaluationConfig) -> Plan:
    pairs = named_suites(config.suites, config.data, operations=config.operations)
    read = [
        read_suite(suite, path, limit=config.limit, **_window(config, suite, pairs)) for suite, path in pairs
    ]
    prompting = _Prompting(config)
    prompts = [
        {q.id: prompting.text(suite, q) for q in each} for (suite, _), each in zip(pairs, read, strict=True)
    ]
    limit, source = prompting.limit_and_source(prompts)
    jobs = []
    for (suite, path), questions, texts in zip(pairs, read, prompts, strict=True):
        settings = {
            "model": prompting.identity,
            "template": prompting.name(suite),
            "data": _data(suite, path, config),
            "max_tokens": limit,
            "seed": config.seed,
        } | _grading(config, questions)
        drawn = Sampling(config.temperature, config.top_p, limit)
        kinds = [
            (suite.name, drawn, config.k or suite.k),
            (suite.name + GREEDY, replace(drawn, temperature=0.0, top_p=1.0), 1),
        ]
        for name, sampling, k in kinds[: 1 + config.decoding_check]:
            own = settings | {"temperature": sampling.temperature, "top_p": sampling.top_p}
            jobs.append(Job(name, suite, questions, texts, dict.fromkeys(texts, k), sampling, source, own))
    note = (
        f"responses of at most {limit:,} tokens, not {config.max_tokens:,}: the model has no more positions"
    )
    inputs = {f"suite {suite.name}": path for suite, path in pairs if suite.file or path.is_file()}
    return Plan(config, jobs, inputs, (note,) if limit < config.max_tokens else ())


def _window(config: EvaluationConfig, suite: Suite, pairs: Sequence[tuple[Suite, Path]]) -> dict[str, str]:
    """The dates among which this suite's questions are chosen; those without dates are read whole beside one with."""
    if suite.dated or not any(other.dated for other, _ in pairs):
        return {"since": config.since, "until": config.until}
    return {}


def _data(suite: Suite, path: Path, config: EvaluationConfig) -> str:
    """What the questions are: a checksum of their file or folder, or the generator's settings."""
    return checksum(path) if suite.file or path.is_file() else f"generated, {config.operations} operations"


def _grading(config: EvaluationConfig, questions: Sequence[Question]) -> dict[str, Any]:
    """The judge and the limits that grade these questions."""
    tasks = {question.task for question in questions}
    names = [name for task, limits in LIMITS.items() if task in tasks for name in limits]
    judge = {"judge.model": config.judge.model} if tasks & set(JUDGED) else {}
    return judge | {f"rewards.{name}": getattr(config.rewards, name) for name in names}


def _plan_of_file(config: EvaluationConfig) -> Plan:
    path = Path(config.generations)
    generations = read_generations(path)
    named = config.suites[0]
    questions = questions_inside(path) if _is_mathematics(named) else []
    if questions:  # GSM8K's model solutions bring their own, and may be a part of the suite's
        ((suite, file),) = named_suites([f"{named}={path}"], config.data)
    else:
        ((suite, file),) = named_suites([named], config.data, operations=config.operations)
        questions = read_suite(suite, file, since=config.since, until=config.until)
    variants = by_question(generations, questions, path)
    questions = questions[: config.limit or None]
    settings = {"generations": checksum(path), "data": _data(suite, file, config)}
    settings |= _grading(config, questions)
    prompts = {q.id: q.text for q in questions}
    jobs = []
    for variant, texts_of in variants.items():
        name = f"{suite.name}-{_plain(variant)}" if variant else suite.name
        k = {q.id: min(len(texts_of[q.id]), config.k or len(texts_of[q.id])) for q in questions}
        jobs.append(
            Job(name, suite, questions, prompts, k, Sampling(0.0, 1.0, 0), FileSource(texts_of), settings)
        )
    inputs = {"generations": path} | ({f"suite {suite.name}": file} if file.is_file() else {})
    return Plan(config, jobs, inputs)


def _is_mathematics(named: str) -> bool:
    """A suite of mathematics that is named without a file."""
    return any(suite.name == named and suite.read is mathematics for suite in SUITES.values())


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


class _Prompting:
    """How questions become prompts, and who answers them."""

    def __init__(self, config: EvaluationConfig):
        self.config = config
        if config.model:
            self.description = check_model(config.model)
            self.tokenizer = load_tokenizer(ModelConfig(path=config.model))

    def name(self, suite: Suite) -> str:
        """The template's name."""
        if self.config.endpoint.url:
            return "endpoint"
        own = bool(self.tokenizer.chat_template)
        if self.config.template == CHAT and not own:
            raise ConfigError(
                f"--template chat: the tokenizer of {self.config.model} has no chat template; known are {', '.join(TEMPLATES)}"
            )
        return self.config.template or suite.template or (CHAT if own else "plain")

    def text(self, suite: Suite, question: Question) -> str:
        name = self.name(suite)
        if name == "endpoint":
            return question.text
        if name == CHAT:
            messages = [{"role": "user", "content": question.text}]
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return template(name)(question.text)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """A chat template writes its own beginning of sequence; other prompts get the tokenizer's."""
        begin = self.tokenizer.bos_token
        special = not (begin and prompt.startswith(begin))
        return tuple(self.tokenizer(prompt, add_special_tokens=special)["input_ids"])

    def limit_and_source(self, texts: Sequence[dict[str, str]]) -> tuple[int, Source]:
        """(response tokens, who samples)."""
        config = self.config
        if config.endpoint.url:
            return config.max_tokens, EndpointSource(config.endpoint)
        longest = max(len(self.encode(text)) for prompts in texts for text in prompts.values())
        limit = fitting(
            config.max_tokens, longest, self.description.get("max_position_embeddings"), config.model
        )
        run = RunConfig(
            seed=config.seed,
            platform=config.platform,
            model=ModelConfig(path=config.model),
            rollout=replace(config.rollout, max_tokens=((0, limit),)),
        )
        return limit, EngineSource(run, self.encode, longest)

    @cached_property
    def identity(self) -> str:
        config = self.config
        return (
            checksum(Path(config.model))
            if config.model
            else f"{config.endpoint.model} at {config.endpoint.url}"
        )
