"""`r1mega eval`: benchmarks on a model, an endpoint or a file of generations (R1, supplement D.1).

The paper's protocol: sampling at temperature 0.6 and top-p 0.95, never greedy (greedy decoding repeats itself;
`decoding_check` measures that), at most 32,768 tokens, pass@1 as the mean over k samples. A folder holds
  generations/<suite>.jsonl   a row per sample: prompt, response, verdict; appended as samples are graded
  results.json                suite -> metrics; "finished"
  evaluation.json             what the samples of each suite were made with
  lineage.json                versions, hardware, checksums of the inputs
The same command again continues: samples that are there are not drawn again, and k may be raised.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from r1mega.algorithms.estimators import ELO_BOUNDS
from r1mega.data.prompts import read_rows
from r1mega.stages.console import Console
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.evaluation_folder import EvaluationFolder
from r1mega.stages.evaluation_grading import VOTED, Grader
from r1mega.stages.evaluation_metrics import (
    HEADER,
    contest_metrics,
    decoding_check,
    suite_metrics,
    table_line,
    vote,
)
from r1mega.stages.evaluation_plan import GREEDY, Job, Plan, plan_of
from r1mega.stages.evaluation_sources import EngineSource
from r1mega.stages.interrupt import cancel_on_sigterm
from r1mega.stages.run_directory import write_json


def run(config: EvaluationConfig, console: Console) -> dict[str, Any]:
    """Evaluate, continue or just count again; returns what results.json holds. ConfigError before anything is written."""
    config.check()
    contests = contest_metrics(read_rows(config.contests, "contests")) if config.contests else {}
    plan = plan_of(config)
    for note in plan.notes:
        console.note(note)
    with EvaluationFolder(config.folder) as folder:
        folder.begin(plan)
        if any(folder.missing(job) for job in plan.jobs):
            with plan.jobs[0].source.opened():
                asyncio.run(_sample(plan, folder, console))
        results = asyncio.run(_count(plan, folder))
        if contests:
            results["codeforces"] = contests
        model = config.model or config.endpoint.model or config.generations
        suites = folder.results() | results
        written = {"finished": True, "model": model, "tokens": folder.tokens(), "suites": suites}
        write_json(folder.path / "results.json", written)
    _show(results, console)
    console.note(f"results in {config.folder}")
    return written


async def _sample(plan: Plan, folder: EvaluationFolder, console: Console) -> None:
    """Draws and grades what is missing; the first job's source is open, and all jobs of a model share it."""
    cancel_on_sigterm()
    config, source = plan.config, plan.jobs[0].source
    async with Grader(config.rewards, config.judge, config.seed) as grader:
        grader.prepare({question.task for job in plan.jobs for question in job.questions})
        if isinstance(source, EngineSource):
            console.phase(f"starting {config.rollout.engines} engine(s) on {config.model}")
        await source.start()
        try:
            for job in plan.jobs:
                await _sample_job(job, grader, folder, console)
        finally:
            await source.close()


async def _sample_job(job: Job, grader: Grader, folder: EvaluationFolder, console: Console) -> None:
    requests = folder.missing(job)
    total = len(job.requests)
    done, right = total - len(requests), 0.0
    kept = f", {done:,} are there" if done else ""
    console.phase(f"{job.name}: {len(job.questions):,} questions, {total:,} samples{kept}")
    graded = 0
    with folder.appending(job) as append:
        async with aclosing(grader.rows(job.suite, job.source.outputs(requests, job.sampling))) as rows:
            async for row in rows:
                append(row)
                graded, right = graded + 1, right + row["value"]
                console.progress(f"{job.name} {right / graded:.1%}", done + graded, total)
    if graded < len(requests):
        raise RuntimeError(
            f"{job.name}: {len(requests) - graded} samples could not be graded here (the log has each case); run again"
        )


async def _count(plan: Plan, folder: EvaluationFolder) -> dict[str, Any]:
    """Metrics of every job from its rows."""
    results: dict[str, Any] = {}
    config = plan.config
    kept = {}
    async with Grader(config.rewards, config.judge, config.seed) as grader:
        for job in plan.jobs:
            rows = folder.rows(job)
            samples = [[rows[q.id, i] for i in range(job.k[q.id])] for q in job.questions]
            kept[job.name] = [row for each in samples for row in each]
            classes = None
            if any(len(each) > 1 for each in samples) and all(q.task in VOTED for q in job.questions):
                answers = [[vote(row) for row in each] for each in samples]
                classes = await grader.classes(job.questions, answers)
            if not job.name.endswith(GREEDY):
                results[job.name] = suite_metrics(samples, classes) | {"settings": job.settings}
    for name in results:
        if f"{name}{GREEDY}" in kept:
            results[name]["decoding_check"] = decoding_check(kept[name], kept[f"{name}{GREEDY}"])
    return results


def _show(results: dict[str, Any], console: Console) -> None:
    suites = {name: metrics for name, metrics in results.items() if name != "codeforces"}
    if suites:
        console.line(HEADER)
    for name, metrics in suites.items():
        console.line(table_line(name, metrics))
        if "disagreements" in metrics:
            console.line(
                f"  published {metrics['published_pass@1']:.2%}, {metrics['disagreements']} verdicts differ from ours"
            )
        for decoding, shares in metrics.get("decoding_check", {}).items():
            console.line(
                f"  {decoding:<8} repetitive {shares['repetitive']:.1%}, truncated {shares['truncated']:.1%}, "
                f"accuracy {shares['accuracy']:.1%}"
            )
    if "codeforces" in results:
        found = results["codeforces"]
        for of, words in (("", "rating from problems"), ("rank_", "rating from ranks")):
            rating = found.get(f"{of}rating")
            if rating is not None:
                more = "" if of or found["error"] is None else f" ± {1.96 * found['error']:.0f}"
                if found[f"{of}bounded"]:
                    more = (
                        " or more (a bound: all won)"
                        if rating == ELO_BOUNDS[1]
                        else " or less (a bound: all lost)"
                    )
                console.line(f"codeforces: {words} {rating:.0f}{more}")
