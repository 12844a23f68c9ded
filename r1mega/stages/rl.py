"""Reinforcement learning with rule rewards: R1-Zero (R1 section 2.2), GRPO on Megatron-core and vLLM.

The driver is this one plain process. Trainer ranks and engines are Ray actors; scoring overlaps
decoding; after every rollout's updates the new weights are broadcast to the engines. What dies is replaced:
engines by engines.py, the trainer by recovery.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from r1mega import cluster, platforms
from r1mega.algorithms.credit import OutputKey, Plan, credit, of_sequences, plan_samples
from r1mega.config import ConfigError, RunConfig
from r1mega.data import chain
from r1mega.data.curriculum import Curriculum
from r1mega.data.packing import pack
from r1mega.data.prompts import PromptSet, read_prompts
from r1mega.report import write_report
from r1mega.rewards.scoring import Scorer, Scoring
from r1mega.rewards.sums import NEURAL, weights_of
from r1mega.rewards.watch import reward_hacking
from r1mega.rollout.engine import rollout_sampling
from r1mega.rollout.vllm_engine import check_numbers
from r1mega.samples import PackedBatch, Prompt, Rollout, ScoredRollout
from r1mega.stages.console import Console
from r1mega.stages.engines import Engines
from r1mega.stages.evaluate import Evaluation, evaluate
from r1mega.stages.interrupt import cancel_on_sigterm
from r1mega.stages.placement import place
from r1mega.stages.policy import PolicyWorker
from r1mega.stages.preflight import check_model, check_references, check_rewards, check_vocabulary
from r1mega.stages.recovery import TRAINER, with_restarts
from r1mega.stages.reward_server import RewardClient
from r1mega.stages.run_directory import RunDirectory
from r1mega.stages.summary import combine_reports, rollout_metrics
from r1mega.stages.tokenizer import load_tokenizer
from r1mega.stages.trace import Trace
from r1mega.training import checkpoint
from r1mega.training.metrics import Recorder, read_jsonl

COLUMNS = (
    "step", "accuracy", "format", "response_length", "kl", "entropy", "tokens_per_second",
    "time/generate", "time/train", "time/sync", "time/step",
)  # fmt: skip


CHANCE = {"generated:chain": chain.CHANCE, "generated:bilingual": chain.CHANCE}
"""Accuracy of guessing, where it is known."""


class LostRollouts(RuntimeError):
    """The gate that accounts for every sampled output: trained on, masked, or the run stops."""


def run(config: RunConfig, directory: RunDirectory, console: Console) -> None:
    """Train to the end, resuming from the newest checkpoint; leaves `hf/`, results.json and report.html."""
    check_model(config)
    check_numbers(config.model.path)
    tokenizer = load_tokenizer(config.model)
    prompts = read_prompts(config.data, tokenizer, seed=config.seed)
    check_vocabulary(config, (prompt.token_ids for prompt in prompts.train + prompts.heldout))
    check_rewards(config, prompts.tasks)
    check_references(prompts.train + prompts.heldout)
    console.note(
        f"{len(prompts.train):,} problems to train on, {len(prompts.heldout):,} held out "
        f"({prompts.dropped} over data.max_prompt_tokens, {prompts.unanswered} without an answer and "
        f"{prompts.duplicates} that overlap held-out ones dropped)"
    )
    if not prompts.heldout:
        raise ConfigError(
            f"no held-out problem in {config.data.eval_path or config.data.path}: "
            "set data.eval_size above 0, or data.eval_path=FILE"
        )
    directory.begin()
    with cluster.start(config):
        asyncio.run(_run(config, directory, prompts, console))


async def _run(config: RunConfig, directory: RunDirectory, prompts: PromptSet, console: Console) -> None:
    cancel_on_sigterm()
    tasks = prompts.tasks
    models = await reward_models(config, tasks, console)
    try:
        async with Scorer(config.rewards, judge=config.judge, models=models) as scorer:
            scorer.prepare(tasks)
            console.phase(
                f"starting {config.world_size} trainer rank(s) and {config.rollout.engines} vLLM engine(s)"
            )
            job = ReinforcementLearning(config, directory, prompts, scorer, console)
            try:
                await with_restarts(job.attempt, directory, console)
            finally:
                await job.stop()
    finally:
        for model in models.values():
            model.close()


async def reward_models(config: RunConfig, tasks: Iterable[str], console: Console) -> dict[str, RewardClient]:
    """The reward models that some task's sum names, served in the policy's own layout without data parallelism."""
    paths = {"helpful": config.rewards.helpful_model, "safety": config.rewards.safety_model}
    wanted = {term for task in tasks for term in weights_of(config.rewards, task)} & paths.keys()
    placement = place(config, platforms.detect(config.platform))
    cluster.require_gpus(placement.total_gpus(config, len(wanted)))
    parallel = replace(config.parallel, data=1)
    models = {}
    for name in sorted(wanted):
        console.phase(f"starting the {name} reward model {paths[name]}")
        models[name] = await RewardClient.start(paths[name], config, parallel, f"{name} reward model")
    return models


class ReinforcementLearning:
    """The parts of a run and the loop over them."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        prompts: PromptSet,
        scorer: Scorer,
        console: Console,
    ):
        """The engines begin to start."""
        self.config, self.directory, self.prompts = config, directory, prompts
        self.scorer, self.console = scorer, console
        self.placement = place(config, platforms.detect(config.platform))
        cluster.require_gpus(self.placement.total_gpus(config, len(scorer.services.models)))
        self.engines = Engines(config, self.placement, console)
        self.policy = cluster.WorkerGroup([])
        self.rollouts_done = 0
        self.trace = Trace()

    @classmethod
    async def start(
        cls, config: RunConfig, directory: RunDirectory, prompts: PromptSet, scorer: Scorer, console: Console
    ) -> ReinforcementLearning:
        """A job whose next rollout can begin."""
        job = cls(config, directory, prompts, scorer, console)
        await job._begin()
        return job

    async def stop(self) -> None:
        """End the workers."""
        await self.engines.close()
        self.policy.kill()

    async def attempt(self) -> None:
        """From the newest checkpoint to the end, with a trainer of its own."""
        try:
            await self._begin()
            await self.train()
        finally:
            await self.policy.end()

    async def _begin(self) -> None:
        """Bring up the trainer beside the engines, resume, and give them its weights."""
        self.policy = await cluster.WorkerGroup.create(
            PolicyWorker,
            self.config,
            self.placement.trainer_threads,
            size=self.config.world_size,
            name=TRAINER,
            silent_seconds=self.config.sync.timeout_seconds,
            **self.placement.trainer,
        )
        self.engines.follow(self.policy)
        self.step = 0
        self.stream = Curriculum(self.prompts.train, self.config)
        self.times: dict[str, float] = {}
        saved = checkpoint.complete(self.directory.checkpoints)
        if saved:
            state = checkpoint.read_state(saved[-1])
            await self.policy.call("load", str(saved[-1]))
            self.step = state["step"]
            self.stream.restore(state["prompts"])
            self.console.note(f"resuming from {saved[-1]} (step {self.step})")
        await self.engines.publish(self.step)

    async def train(self) -> None:
        if "before" not in self.directory.results():
            before = await self._evaluate("before")
            self.console.note(f"before: {_line(before)}")
        with Recorder(self.directory.path, resume_step=self.step + 1) as recorder:
            table = self.console.table(COLUMNS)
            while self.step < self.config.num_steps:
                scored, metrics = await self.one_rollout()
                if self._due(self.config.eval.every):
                    metrics |= _eval_metrics(await self._evaluate(f"step {self.step}"))
                recorder.log(self.step, metrics | self.engines.report())
                recorder.log_samples(self.step, scored)
                if "eval/sampled" in metrics:
                    self._watch()
                table.row(self.step, metrics, of=self.config.num_steps)
                if self._due(self.config.checkpoint.every) or self.step >= self.config.num_steps:
                    with self._timed("checkpoint"):
                        await self._save()
        await self._finish()

    async def one_rollout(self) -> tuple[list[ScoredRollout], dict[str, float]]:
        """Sample, score, credit, pack, update, publish: `grpo.mini_batches` policy updates.

        Scoring begins with the first finished output and goes on while the reference model runs; `time/score`
        is what is left of it then. `time/checkpoint` is the save that followed the rollout before.
        """
        config, began = self.config, time.monotonic()
        prompts = tell_apart(self.stream.take(config.questions_per_rollout, self.step))
        async with self.scorer.begin(self._generate(prompts)) as scoring:
            moved = await self._offload()
            with self._timed("generate"):
                rollouts = await scoring.rollouts()
            await self._onload()
            with self._timed("pack"):
                plan = plan_samples(rollouts, config, self.step)
                self._account(rollouts, plan, prompts)
                packed = self._pack(plan)
            with self._timed("reference"):
                await self.policy.scatter("rl_prepare", [(packed[r], self.step) for r in self._data_ranks])
            with self._timed("score"):
                scored = await scoring.scored()
        with self._timed("train"):
            values = credit(scored, config)
            of_output = values.rewards if config.ppo.enabled else values.advantages
            numbers = [_of_chunks(chunks, plan.keys, of_output) for chunks in packed]
            reports = await self.policy.scatter(
                "rl_update", [(numbers[r], self.step) for r in self._data_ranks]
            )
        self.step += config.grpo.mini_batches
        with self._timed("sync"):
            await self.engines.publish(self.step)
        elapsed = time.monotonic() - began
        times, self.times = self.times, {}
        self._write_trace(scoring)
        metrics = rollout_metrics(scored) | combine_reports(reports, config.grpo.mini_batches)
        tokens = sum(len(item.rollout.response_ids) for item in scored)
        return scored, metrics | {
            "zero_std_groups": values.num_zero_std / max(1, values.num_groups),
            "masked_outputs": float(plan.num_masked),
            "max_tokens": float(scored[0].rollout.max_tokens),
            **moved,
            "tokens_per_second": tokens / elapsed,
            "samples_per_second": len(scored) / elapsed,
            **{f"time/{name}": seconds for name, seconds in times.items()},
            "time/step": elapsed,
        }

    async def _generate(self, prompts: list[Prompt]) -> AsyncIterator[Rollout]:
        """Outputs of the current policy as they finish."""
        sampling = rollout_sampling(self.config, self.step)
        total, done = len(prompts) * sampling.n, 0
        async for rollout in self.engines.group.generate(prompts, sampling, self.step):
            yield rollout
            done += 1
            if done % 64 == 0:
                self.console.progress(f"step {self.step}: sampling", done, total)

    def _account(self, rollouts: Sequence[Rollout], plan: Plan, prompts: list[Prompt]) -> None:
        expected = len(prompts) * self.config.grpo.group_size
        trained = sum(len(samples) for samples in plan.mini_batches)
        versions = {rollout.weight_version for rollout in rollouts}
        if len(rollouts) != expected or trained + plan.num_masked != expected:
            raise LostRollouts(
                f"gate every-rollout-counts, step {self.step}: {expected} outputs were asked for, {len(rollouts)} came "
                f"back, {trained} are trained on and {plan.num_masked} masked"
            )
        if not all(plan.mini_batches):
            raise LostRollouts(
                f"gate every-rollout-counts, step {self.step}: a mini-batch has no output left, all were cut at the "
                "length limit and masked (grpo.mask_truncated): raise rollout.max_tokens"
            )
        unrouted = [rollout for rollout in rollouts if rollout.routed_experts is None]
        if self.config.grpo.routing_replay and unrouted:
            raise LostRollouts(
                f"gate routed-experts, step {self.step}: {len(unrouted)} outputs came without the experts that sampled them, "
                f"such as output {unrouted[0].index} of prompt {unrouted[0].prompt.id}; grpo.routing_replay needs all"
            )
        if versions != {self.step}:
            raise LostRollouts(
                f"gate weight-version, step {self.step}: outputs were sampled with weights of step {sorted(versions)}"
            )

    def _pack(self, plan: Plan) -> list[list[list[PackedBatch]]]:
        """[data rank][mini-batch] -> chunks."""
        parallel, align = self.config.parallel, self.config.token_alignment
        packed = [
            pack(samples, parallel.data, parallel.tokens_per_chunk, align) for samples in plan.mini_batches
        ]
        return [[ranks[r] for ranks in packed] for r in range(parallel.data)]

    @property
    def _data_ranks(self) -> list[int]:
        """Every trainer rank's data rank."""
        return [self.config.data_rank(rank) for rank in range(self.config.world_size)]

    def _write_trace(self, scoring: Scoring) -> None:
        """A Chrome trace of the second rollout (the first one warms up), as trace.json."""
        self.rollouts_done += 1
        if self.rollouts_done == 2:
            for span in scoring.spans:
                name = f"{span.rollout.prompt.id} output {span.rollout.index}"
                self.trace.add("scoring", name, span.began, span.ended)
            self.trace.write(self.directory.path / "trace.json")
        self.trace.clear()

    def _watch(self, last: Evaluation | None = None) -> None:
        """Say it loudly, and keep it in results.json, when a model's reward looks hacked. `last`: the end's, in no row."""
        rows = read_jsonl(self.directory.path / "metrics.jsonl")
        rows += [{"step": self.step} | _eval_metrics(last)] if last else []
        ruled = sum("accuracy" in weights_of(self.config.rewards, p.task) for p in self.prompts.heldout)
        alarm = reward_hacking(rows, tuple(NEURAL), ruled)
        known = self.directory.results().get("alarms", [])
        if alarm and alarm not in known:
            self.console.note(f"ALARM: {alarm}")
            self.directory.add_results(alarms=[*known, alarm])

    async def _offload(self) -> dict[str, float]:
        """The trainer gives its device up for the time of the sampling; returns rank 0's report."""
        if self.config.checkpoint.offload == "none":
            return {}
        with self._timed("offload"):
            return (await self.policy.call("offload"))[0]

    async def _onload(self) -> None:
        if self.config.checkpoint.offload != "none":
            with self._timed("offload"):
                await self.policy.call("onload")

    async def _save(self) -> None:
        state = {"prompts": self.stream.state()}
        await self.policy.call("save", str(self.directory.checkpoints), self.step, state)

    def _due(self, every: int) -> bool:
        """Whether a multiple of `every` was passed by the last rollout's updates."""
        return every > 0 and self.step // every > (self.step - self.config.grpo.mini_batches) // every

    async def _evaluate(self, when: str) -> Evaluation:
        self.console.phase(f"evaluating on {len(self.prompts.heldout)} held-out problems ({when})")
        evaluation = await evaluate(
            self.engines.group, self.scorer, self.prompts.heldout, self.config, self.step
        )
        if when == "before":
            self.directory.add_results(before=evaluation.as_dict(), chance=CHANCE.get(self.config.data.path))
        return evaluation

    async def _finish(self) -> None:
        after = await self._evaluate("after")
        self._watch(after)
        self.console.phase("writing the Hugging Face checkpoint and the report")
        await self.policy.call("export", str(self.directory.hf))
        await self.policy.call("finish_save")
        results = self.directory.add_results(after=after.as_dict(), steps=self.step, finished=True)
        show_results(results, after.examples, write_report(self.directory.path), self.directory, self.console)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.times[name] = self.times.get(name, 0.0) + ended - began
        self.trace.add("phases", name, began, ended)


def _of_chunks(
    mini_batches: list[list[PackedBatch]],
    keys: Sequence[Sequence[OutputKey]],
    of_output: Mapping[OutputKey, float],
) -> list[list[Tensor]]:
    """[mini-batch][chunk] -> fp32 [S], for one data rank."""
    return [
        [of_sequences(chunk, of_batch, of_output) for chunk in chunks]
        for chunks, of_batch in zip(mini_batches, keys, strict=True)
    ]


def tell_apart(prompts: list[Prompt]) -> list[Prompt]:
    """A question drawn twice for one rollout becomes two: groups and sampling seeds go by a prompt's id."""
    seen: Counter[str] = Counter()
    told = []
    for prompt in prompts:
        seen[prompt.id] += 1
        repeats = seen[prompt.id]
        told.append(prompt if repeats == 1 else replace(prompt, id=f"{prompt.id} again {repeats}"))
    return told


def _eval_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {"eval/sampled": evaluation.sampled.accuracy, "eval/greedy": evaluation.greedy.accuracy}


def _line(evaluation: Evaluation) -> str:
    sampled, greedy = evaluation.sampled, evaluation.greedy
    return (
        f"sampled accuracy {sampled.accuracy:.1%} ± {sampled.ci:.1%}, greedy {greedy.accuracy:.1%}, "
        f"format {sampled.format:.1%}, response length {sampled.response_length:.1f}"
    )


def show_results(
    results: dict[str, Any],
    examples: list[ScoredRollout],
    report: Path,
    directory: RunDirectory,
    console: Console,
) -> None:
    """The end of a run, for a reader who skipped the table."""
    console.line()
    console.line(
        f"Held-out accuracy ({results['after']['sampled']['n']} problems, ± 95 % confidence interval)"
    )
    for kind in ("sampled", "greedy"):
        before, after = results["before"][kind], results["after"][kind]
        console.result(
            kind,
            f"{before['accuracy']:.1%} ± {before['ci']:.1%}  ->  {after['accuracy']:.1%} ± {after['ci']:.1%}",
        )
    if results.get("chance") is not None:
        console.result("chance level", f"{results['chance']:.1%}")
    console.result("report", report)
    console.result("Hugging Face checkpoint", directory.hf)
    console.line("Three sample answers")
    for item in examples:
        verdict = ", ".join(f"{term} {said}" for term, said in item.reward.verdicts.items())
        console.line(f"  {item.rollout.prompt.text.strip()[-120:]}")
        console.line(
            f"    {item.rollout.response_text.strip()[:400]}   [{verdict}, reference {item.rollout.prompt.answer}]"
        )
