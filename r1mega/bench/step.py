"""One reinforcement-learning step, measured: the real loop (Ray, vLLM, scoring, Megatron, weight sync) on a
DeepSeek-V3 of about a million parameters, and in the same run vLLM alone and transformers alone.

16 questions x 16 outputs, one update, steady state: medians over the steps after the first. The responses'
lengths are in the checkpoint (model.py). On a GPU machine the same benchmark runs as it is; its model is then
far too small to say anything but the overheads.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega import checks, cluster, platforms
from r1mega.algorithms.credit import build_samples
from r1mega.bench import model
from r1mega.bench.processes import Measured, round_together
from r1mega.bench.training_alone import TrainerAlone, TransformersAlone
from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    GRPOConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
)
from r1mega.data.packing import pack
from r1mega.data.prompts import PromptStream, read_prompts
from r1mega.rewards.scoring import Scorer
from r1mega.rollout.vllm_alone import VLLMAlone
from r1mega.samples import Prompt, ScoredRollout
from r1mega.stages.console import Console
from r1mega.stages.placement import place
from r1mega.stages.rl import ReinforcementLearning
from r1mega.stages.run_directory import RunDirectory
from r1mega.stages.tokenizer import load_tokenizer

WARM_STEPS = 2
STEPS = 7
ROUNDS = 5
"""Of each reference, after one that is not counted."""
PHASES = ("generate", "pack", "reference", "score", "train", "sync")
MAX_PROMPT_TOKENS = 32


@dataclass
class Steps:
    """What the measured steps of our loop left."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    prompts: list[list[Prompt]] = field(default_factory=list)
    first: int = 0
    """Step of the first measured one: its seeds."""
    last: list[ScoredRollout] = field(default_factory=list)


def run(
    responses: str, steps: int = STEPS, rounds: int = ROUNDS, console: Console | None = None
) -> dict[str, Any]:
    """Measure with responses of that kind ("varying", "uniform"), print a table, return its numbers."""
    console = console or Console()
    with tempfile.TemporaryDirectory(prefix="r1mega-bench-") as folder:
        work = Path(folder)
        parameters = model.write_model(work / "model", responses)
        config = run_config(work / "model", responses, WARM_STEPS + steps)
        checks.check(config)
        console.phase(f"{responses} responses: {parameters:,} parameters; starting the loop")
        done = our_steps(config, work, console)
        console.phase("the same requests with vLLM alone")
        rollout = against_vllm(config, done, work, rounds)
        console.phase("the same samples with transformers alone")
        training = against_transformers(config, done, work, rounds)
    result = (
        {"model_parameters": parameters} | summary(config, done) | {"rollout": rollout, "training": training}
    )
    show(responses, result, console)
    return result


def run_config(model_path: Path, responses: str, num_steps: int) -> RunConfig:
    """The demo's settings (configs/tiny/r1_zero.py), with this model and a learning rate that changes little."""
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, 2)
    return RunConfig(
        stage="rl",
        num_steps=num_steps,
        model=ModelConfig(path=str(model_path), dtype="float32"),
        data=DataConfig(
            path="generated:chain",
            template="tiny_zero",
            operations=model.OPERATIONS,
            size=256,
            eval_size=8,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
        ),
        grpo=GRPOConfig(group_size=16, questions_per_step=16, kl_coef=0.001, reference_every=0),
        rollout=RolloutConfig(
            engines=workers,
            max_tokens=((0, model.MAX_TOKENS[responses]),),
            dtype="float32",
            kv_cache_gib=0.25,
            max_concurrent=128,
        ),
        parallel=ParallelConfig(data=workers, tokens_per_chunk=8192),
        optimizer=OptimizerConfig(lr=1e-6),
        rewards=RewardConfig(workers=1),
        sync=SyncConfig(bucket_mib=16),
        checkpoint=CheckpointConfig(every=0),
    )


def training_prompts(config: RunConfig) -> list[Prompt]:
    return read_prompts(config.data, load_tokenizer(config.model), seed=config.seed).train


# ---------------------------------------------------------------- our loop


def our_steps(config: RunConfig, work: Path, console: Console) -> Steps:
    prompts = read_prompts(config.data, load_tokenizer(config.model), seed=config.seed)

    async def loop(directory: RunDirectory) -> Steps:
        done = Steps(first=WARM_STEPS)
        async with Scorer(config.rewards) as scorer:
            job = await ReinforcementLearning.start(config, directory, prompts, scorer, console)
            try:
                for step in range(config.num_steps):
                    scored, metrics = await job.one_rollout()
                    console.progress("steps", step + 1, config.num_steps)
                    if step >= WARM_STEPS:
                        done.metrics.append(metrics)
                        done.last = scored
            finally:
                await job.stop()
        stream = PromptStream(prompts.train, config.seed)
        taken = [stream.take(config.questions_per_rollout) for _ in range(config.num_steps)]
        done.prompts = taken[WARM_STEPS:]
        return done

    with RunDirectory(work / "run", config) as directory, cluster.start(config):
        return asyncio.run(loop(directory))


def summary(config: RunConfig, done: Steps) -> dict[str, Any]:
    """Medians over the steps, and shares of the median step."""

    def median(name: str) -> float:
        return statistics.median(metrics[name] for metrics in done.metrics)

    step = median("time/step")
    seconds = {phase: median(f"time/{phase}") for phase in PHASES} | {"step": step}
    return {
        "steps": len(done.metrics),
        "seconds": seconds,
        "share": {phase: seconds[phase] / step for phase in PHASES},
        "samples_per_second": config.outputs_per_rollout / step,
        "tokens_per_second": median("tokens_per_second"),
        "response_length": median("response_length"),
        "accuracy": median("accuracy"),
        "every_step_seconds": [metrics["time/step"] for metrics in done.metrics],
    }


# ---------------------------------------------------------------- references


def against_vllm(config: RunConfig, done: Steps, work: Path, rounds: int) -> dict[str, float]:
    """Our rollout phase beside offline vLLM: as many engines, as many threads each, the same requests."""
    engines = config.rollout.engines
    threads = place(config, platforms.detect(config.platform)).engine_threads
    chosen = list(zip(done.prompts, done.metrics, strict=True))[: rounds + 1]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                Measured(
                    VLLMAlone,
                    config,
                    threads,
                    [prompts[i::engines] for prompts, _ in chosen],
                    done.first,
                    log=work / f"vllm-{i}.log",
                    threads=threads,
                )
            )
            for i in range(engines)
        ]
        for process in processes:
            process.ready()
        measured = [round_together(processes) for _ in chosen][1:]
    alone_speed = statistics.median(
        sum(share["tokens"] for share in shares) / seconds for seconds, shares in measured
    )
    our_speed = statistics.median(_rollout_speed(config, metrics) for _, metrics in chosen[1:])
    return {
        "tokens_per_second": our_speed,
        "vllm_alone_tokens_per_second": alone_speed,
        "vllm_alone_seconds": statistics.median(seconds for seconds, _ in measured),
        "ratio": our_speed / alone_speed,
    }


def _rollout_speed(config: RunConfig, metrics: dict[str, float]) -> float:
    return metrics["response_length"] * config.outputs_per_rollout / metrics["time/generate"]


def against_transformers(config: RunConfig, done: Steps, work: Path, rounds: int) -> dict[str, float]:
    """CPU seconds of one update: our ranks together, and plain transformers, on the last step's samples."""
    samples = build_samples(done.last, config, done.first)[0]
    ours = _trainer_rounds(
        config, pack(samples, config.parallel.data, config.parallel.tokens_per_chunk), work, rounds
    )
    with Measured(TransformersAlone, config, samples, log=work / "transformers.log") as process:
        process.ready()
        theirs = [round_together([process])[1][0] for _ in range(rounds + 1)][1:]
    cpu = statistics.median(sum(rank["cpu_seconds"] for rank in ranks) for ranks in ours)
    reference = statistics.median(result["cpu_seconds"] for result in theirs)
    return {
        "cpu_seconds": cpu,
        "transformers_cpu_seconds": reference,
        "ratio": cpu / reference,
        "grad_norm": ours[0][0]["grad_norm"],
        "transformers_grad_norm": theirs[0]["grad_norm"],
        "transformers_padding": theirs[0]["padding"],
    }


def _trainer_rounds(
    config: RunConfig, packed: Sequence[list], work: Path, rounds: int
) -> list[list[dict[str, float]]]:
    """Results of every rank, round by round; one thread a rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(config.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        processes = []
        for rank in range(config.world_size):
            env = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            chunks = packed[config.data_rank(rank)]
            log = work / f"trainer-{rank}.log"
            processes.append(stack.enter_context(Measured(TrainerAlone, config, chunks, log=log, env=env)))
        for process in processes:
            process.ready()
        return [round_together(processes)[1] for _ in range(rounds + 1)][1:]


# ---------------------------------------------------------------- table


def show(responses: str, result: dict[str, Any], console: Console) -> None:
    """The numbers a reader asks for, with the bounds the project holds itself to."""
    seconds, share, rollout, training = (result[key] for key in ("seconds", "share", "rollout", "training"))
    console.line(f"one step, {responses} responses (mean {result['response_length']:.1f} tokens), medians")
    for phase in PHASES:
        console.result(phase, f"{seconds[phase]:8.3f} s  {share[phase]:6.1%}")
    console.result("step", f"{seconds['step']:8.3f} s")
    console.result("samples/s", f"{result['samples_per_second']:8.1f}")
    console.result(
        "sync and packing of the step", f"{share['sync'] + share['pack']:8.1%}    (goal: under 3 % )"
    )
    console.result("rollout, tokens/s", f"{rollout['tokens_per_second']:8.0f}")
    console.result("vLLM alone, tokens/s", f"{rollout['vllm_alone_tokens_per_second']:8.0f}")
    console.result("rollout / vLLM alone", f"{rollout['ratio']:8.1%}    (goal: at least 80 %)")
    console.result("update, CPU seconds", f"{training['cpu_seconds']:8.3f}")
    console.result("transformers, CPU seconds", f"{training['transformers_cpu_seconds']:8.3f}")
    console.result("update / transformers", f"{training['ratio']:8.2f}    (goal: at most 1.15)")
