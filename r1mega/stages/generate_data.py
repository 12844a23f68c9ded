"""Makes training data: the cold start's (R1 v2, B.3.2) or rejection-sampled (B.3.3).

Prompts go through Ray and vLLM shard by shard; a shard is scored while the next one is sampled. What is made is kept:
  samples/    what the model wrote             scored/     what rules and judge say of it
  rewritten/  what the rewriter made of it     review/     what people say of it
so that a run that was killed, or stopped because an endpoint was down, goes on where it was. From those files
data.jsonl and manifest.json are put together at the end.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1mega import cluster
from r1mega.config import ConfigError, JudgeConfig, RewardConfig
from r1mega.data import cold_start, rejection_sampling, rewriting
from r1mega.data.chat import template
from r1mega.data.cold_start import Candidate, Source, sampled_sources
from r1mega.data.evaluation_texts import read_evaluation
from r1mega.data.manifest import Manifest
from r1mega.data.prompts import read_questions, read_rows, tokenised
from r1mega.data.recipes import HUMAN, ColdStart, GenerateData, RejectionSampling
from r1mega.data.rejection_sampling import General, Selection, clean_prompts, unfit, without_form, wrong
from r1mega.data.responses import Response
from r1mega.data.review import review
from r1mega.data.shards import Rows, Shard, shards, write_lines
from r1mega.rewards.endpoint import Endpoint
from r1mega.rewards.language import detect
from r1mega.rewards.scoring import Scorer
from r1mega.rewards.sums import weights_of
from r1mega.rewards.terms import ACCURACY
from r1mega.samples import Prompt
from r1mega.stages.console import Console
from r1mega.stages.interrupt import cancel_on_sigterm
from r1mega.stages.preflight import check_model, check_references, check_rewards, check_vocabulary
from r1mega.stages.run_directory import RunDirectory, checksum, write_json
from r1mega.stages.sampled_shards import SampledShards, as_rollout, sampling_of, scores_of
from r1mega.stages.tokenizer import load_tokenizer


def run(config: GenerateData, directory: RunDirectory, console: Console) -> None:
    """Sample, score, filter, rewrite, review, write; leaves data.jsonl, manifest.json and results.json."""
    job = Generation(config, directory, console)
    directory.begin()
    with cluster.start(job.run_config) if job.waiting else nullcontext():
        asyncio.run(job.make())
    rows = job.rows()
    write_lines(directory.path / "data.jsonl", job.manifest.counted(rows))
    manifest = job.manifest.as_dict()
    write_json(directory.path / "manifest.json", manifest)
    _show(console, directory, job.manifest)
    if not manifest["total"]["samples"]:
        raise ConfigError(f"{directory.path}: no row is left; manifest.json counts what dropped them")
    directory.add_results(
        finished=True, rows=manifest["total"]["samples"], tokens=job.tokens_sampled(), manifest=manifest
    )


class Generation:
    """One stage's work; raises ConfigError or FileNotFoundError for inputs that cannot be used."""

    def __init__(self, config: GenerateData, directory: RunDirectory, console: Console):
        self.config, self.path, self.console = config, directory.path, console
        self.manifest = Manifest()
        self.tokenizer = load_tokenizer(config.model)
        self.evaluation = read_evaluation(config.decontaminate, "decontaminate")
        self.selection = Selection(config, self.evaluation, self.manifest.dropped)
        self.sources = _sources(config)
        self.general = _general(config)
        self.human = self._human(config)
        self.works = [self._work(source) for source in self.sources]
        tasks = {prompt.task for work in self.works for prompt in work.by_id.values()}
        self.rewards = _with_judge(config, tasks)
        self.weights = {task: weights_of(self.rewards, task) for task in tasks}
        self.run_config = replace(config.run_config(), stage="rl", rewards=self.rewards)
        check_rewards(self.run_config, tasks)
        for work in self.works:
            check_references(work.by_id.values())
            self._check_judged(work.by_id.values())
        self.judge = _with_cache(config.judge, directory.path / "judge.sqlite")
        self.rewriter = _with_cache(config.rewriter, directory.path / "rewriter.sqlite")

    def _human(self, config: GenerateData) -> Rows:
        """What people wrote, read before anything is sampled."""
        if not isinstance(config, ColdStart) or HUMAN not in config.sources:
            return []
        return list(cold_start.human_rows(read_rows(config.human, "human"), config, self._count_tokens))

    def _check_judged(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            if self.weights[prompt.task].get("judge") and not prompt.answer:
                raise ConfigError(
                    f"prompt {prompt.id} of {self.config.data.path} (task {prompt.task}): no answer, and the judge "
                    "compares with one; fill it in or remove the row"
                )

    @property
    def waiting(self) -> bool:
        """Some prompt has yet to be sampled: engines are needed."""
        return any(work.waiting for work in self.works)

    def tokens_sampled(self) -> int:
        """Kept or dropped; what the rewriter's endpoint wrote is not ours to count."""
        return sum(row["tokens"] for work in self.works for shard in work.samples for row in shard.read())

    def _work(self, source: Source) -> SampledShards:
        config = replace(self.config.run_config(source.model), stage="rl")
        check_model(config)
        questions = read_questions(config.data, seed=config.seed)
        tokenizer = self.tokenizer if source.model == self.config.model else load_tokenizer(source.model)
        limit = config.data.max_prompt_tokens
        prompts = tokenised(questions, source.template, tokenizer, limit)
        dropped = self.manifest.dropped
        if len(prompts) < len(questions):
            dropped["prompts: too long"] += len(questions) - len(prompts)
        prompts = clean_prompts(prompts, self.evaluation, dropped)
        if not prompts:
            raise ConfigError(
                f"{config.data.path}: none of {len(questions)} prompts is left for {source.name}: the others are longer "
                f"than data.max_prompt_tokens={limit} or overlap an evaluation set ({dict(dropped)})"
            )
        check_vocabulary(config, (prompt.token_ids for prompt in prompts))
        return SampledShards(source, prompts, self.config, self.path)

    # ------------------------------------------------------------ making

    async def make(self) -> None:
        """See to it that every file of samples, scores and rewritings is there."""
        cancel_on_sigterm()
        async with Scorer(self.rewards, judge=self.judge) as scorer:
            scorer.prepare(self.weights)
            for work in self.works:
                await work.make(self.run_config, scorer, self.judge, self.console)
            if isinstance(self.config, ColdStart):
                await self._rewrite(self.config, scorer)
            if isinstance(self.config, RejectionSampling):
                await self._reason(self.config)

    # ------------------------------------------------------------ rewriting (cold start)

    def _candidates(self, config: ColdStart, *, counting: bool) -> list[Candidate]:
        dropped = self.manifest.dropped if counting else type(self.manifest.dropped)()
        return [
            candidate
            for work in self.works
            for candidate in cold_start.candidates(
                work.scored_samples(), work.by_id, work.source, config, self.weights, dropped
            )
        ]

    def _rewritings(self, config: ColdStart, found: Sequence[Candidate]) -> list[Shard[Candidate]]:
        return shards(found, config.shard_size, self.path / "rewritten", "cold_start", lambda c: c.id)

    async def _rewrite(self, config: ColdStart, scorer: Scorer) -> None:
        found = self._candidates(config, counting=False)
        work = self._rewritings(config, found)
        self.console.phase(f"{len(found):,} right and readable samples; rewriting ({config.rewriting})")
        with Endpoint(self.rewriter) if config.rewriting == "endpoint" else nullcontext() as endpoint:
            for shard in work:
                await shard.rows(lambda part: self._rewritten(config, part, endpoint, scorer))

    async def _rewritten(
        self, config: ColdStart, part: Sequence[Candidate], endpoint: Endpoint | None, scorer: Scorer
    ) -> Rows:
        """Each candidate's new text, or why it has none; the new text must be right and readable too."""
        texts = await _all(_new_text(config, candidate, endpoint) for candidate in part)
        whole = template(config.template)
        rollouts = [
            as_rollout(candidate.prompt, slot, whole.response(text.reasoning, text.summary))
            for slot, (candidate, text) in enumerate(zip(part, texts, strict=True))
            if isinstance(text, Response)
        ]
        scores = {score["index"]: score for score in await scores_of(rollouts, scorer, self.judge)}
        rows: Rows = []
        for slot, (candidate, text) in enumerate(zip(part, texts, strict=True)):
            if isinstance(text, str):
                rows.append({"id": candidate.id, "why": text})
                continue
            prompt = candidate.prompt
            why = wrong(scores[slot], without_form(self.weights[prompt.task]))
            why = why or unfit(text, prompt.question, config.filters)
            rows.append(
                {
                    "id": candidate.id,
                    "why": why and f"rewritten {why}",
                    "reasoning": text.reasoning,
                    "summary": text.summary,
                }
            )
        return rows

    # ------------------------------------------------------------ general data (rejection sampling)

    def _unreasoned(self, config: RejectionSampling) -> list[Shard[General]]:
        wanted = [row for row in self.general if row.wants_reasoning(config.reasoned)]
        return shards(wanted, config.shard_size, self.path / "rewritten", "general", lambda row: row.id)

    async def _reason(self, config: RejectionSampling) -> None:
        """Chains of thought for the general rows that are to have one."""
        work = self._unreasoned(config)
        if all(shard.done for shard in work):
            return
        with Endpoint(self.rewriter) as endpoint:

            async def written(part: Sequence[General]) -> Rows:
                texts = await _all(
                    rewriting.reasoning_for(endpoint, row.question, row.summary) for row in part
                )
                return [{"id": row.id, "reasoning": text} for row, text in zip(part, texts, strict=True)]

            for shard in work:
                await shard.rows(written)

    # ------------------------------------------------------------ putting together

    def rows(self) -> Iterable[dict[str, Any]]:
        """The rows of data.jsonl, counted in the manifest as they are made."""
        config = self.config
        if isinstance(config, ColdStart):
            return self._cold_start(config)
        return _at_most(self._rejection(config), config.size, self.manifest)

    def _rejection(self, config: GenerateData) -> Iterator[dict[str, Any]]:
        assert isinstance(config, RejectionSampling)
        as_written = template(config.data.template)
        for work in self.works:
            yield from rejection_sampling.select(
                work.scored_samples(),
                work.by_id,
                self.weights,
                as_written,
                self.selection,
                self._lineage(work.source, rewriter=None, label="rejection_sampling"),
            )
        written = {row["id"]: row["reasoning"] for shard in self._unreasoned(config) for row in shard.read()}
        yield from rejection_sampling.general_rows(
            self.general, written, as_written, self.selection, _name(config.rewriter), self._count_tokens
        )

    def _cold_start(self, config: ColdStart) -> Rows:
        found = self._candidates(config, counting=True)
        rewriter = _name(config.rewriter) if config.rewriting == "endpoint" else config.rewriting
        lineages = {source.name: self._lineage(source, rewriter=rewriter) for source in self.sources}
        keeps = self.selection.keeps
        human = [row for row in self.human if keeps(row["question"], row["response"], HUMAN)]
        before, after = rewriting.Person(), rewriting.Person()
        sampled: dict[str, Rows] = {source.name: [] for source in self.sources}
        texts = [row for shard in self._rewritings(config, found) for row in shard.read()]
        for candidate, text in zip(found, texts, strict=True):
            assert candidate.id == text["id"]
            if text["why"]:
                self.manifest.dropped[text["why"]] += 1
                continue
            response = Response(text["reasoning"], text["summary"], "ok")
            source = candidate.source.name
            row = cold_start.rewritten_row(candidate, response, config, lineages[source], self._count_tokens)
            if keeps(row["question"], row["response"], source):
                before += rewriting.person(candidate.response.reasoning)
                after += rewriting.person(response.reasoning)
                sampled[source].append(row)
        rows = cold_start.shared(human, sampled.values(), config.size, self.manifest.dropped)
        self.manifest.facts["first_person"] = {
            "before": {"I": before.singular, "we": before.plural, "share": before.share},
            "after": {"I": after.singular, "we": after.plural, "share": after.share},
        }
        if config.review == "files":
            rows = review(rows, self.path / "review", self.manifest.dropped, self._count_tokens)
        asyncio.run(self._check_people([row for row in rows if row["lineage"]["source"] == HUMAN]))
        return rows

    async def _check_people(self, rows: Rows) -> None:
        """What people wrote or edited must give the reference answer, where a rule or the judge can tell."""
        rows = [row for row in rows if row["answer"] and row["task"] in self.weights]
        prompts = [Prompt(row["id"], row["question"], row["answer"], row["task"], "", ()) for row in rows]
        rollouts = [as_rollout(prompt, 0, row["response"]) for prompt, row in zip(prompts, rows, strict=True)]
        async with Scorer(self.rewards, judge=self.judge) as scorer:
            for row, score in zip(rows, await scores_of(rollouts, scorer, self.judge), strict=True):
                if why := wrong(score, without_form(self.weights[row["task"]])):
                    raise ConfigError(
                        f"row {row['id']}: what people wrote does not give the answer {row['answer']!r} ({why}): mend it "
                        f"in {self.path / 'review'} or {getattr(self.config, 'human', '')}, or drop the row"
                    )

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _lineage(self, source: Source, *, rewriter: str | None, label: str = "") -> dict[str, Any]:
        sampling = sampling_of(self.config)
        return {
            "source": label or source.name,
            "model": checksum(Path(source.model.path)),
            "rewriter": rewriter,
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                "seed": self.config.seed,
            },
        }


# ---------------------------------------------------------------- parts


def _sources(config: GenerateData) -> list[Source]:
    if isinstance(config, ColdStart):
        return sampled_sources(config)
    name = config.data.template
    return [Source("samples", config.model, template(name), f"template {name}")]


def _general(config: GenerateData) -> list[General]:
    if not isinstance(config, RejectionSampling) or not config.general:
        return []
    rows = rejection_sampling.read_general(read_rows(config.general, "general"))
    if any(row.wants_reasoning(config.reasoned) for row in rows) and not config.rewriter.url:
        raise ConfigError(
            f"reasoned={','.join(config.reasoned)}: rows of {config.general} are to get a chain of thought; name the "
            "endpoint that writes it with rewriter.url= and rewriter.model="
        )
    return rows


def _with_judge(config: GenerateData, tasks: set[str]) -> RewardConfig:
    """The rewards, with the judge for those of the tasks that no rule and no row of their own serves."""
    if not config.judge.url:
        return config.rewards
    rows = {task: {"judge": 1.0} for task in tasks - ACCURACY.keys()}
    return replace(config.rewards, task_weights=rows | config.rewards.task_weights)


async def _new_text(config: ColdStart, candidate: Candidate, endpoint: Endpoint | None) -> Response | str:
    prompt, response = candidate.prompt, candidate.response
    if endpoint:
        return await rewriting.rewritten(endpoint, prompt.question, response, prompt.task)
    return (
        rewriting.by_rules(response, prompt.task, detect(prompt.question))
        if config.rewriting == "rules"
        else response
    )


async def _all(calls: Iterable[Any]) -> list[Any]:
    """All results in order; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _at_most(rows: Iterable[dict[str, Any]], size: int, manifest: Manifest) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if size and number >= size:
            manifest.dropped["size"] += 1
        else:
            yield row


def _with_cache(endpoint: JudgeConfig, file: Path) -> JudgeConfig:
    """Answers are kept in the stage's folder, so that a stop costs none of them."""
    return replace(endpoint, cache=endpoint.cache or str(file))


def _name(endpoint: JudgeConfig) -> str:
    return f"{endpoint.model} at {endpoint.url}"


def _show(console: Console, directory: RunDirectory, manifest: Manifest) -> None:
    console.line()
    for line in manifest.table():
        console.line(f"  {line}")
    console.line()
    for reason, count in manifest.dropped.most_common():
        console.result(f"dropped, {reason}", f"{count:,}")
    for name, fact in manifest.facts.items():
        console.result(name, json.dumps(fact))
    console.result("data", directory.path / "data.jsonl")
