"""Process-reward reranking on the toy chains: the first of R1's unsuccessful attempts.

    python tools/experiments/process_reward.py runs/tiny_pipeline/base/hf --out runs/prm [--rl-steps 60]

R1 ("Unsuccessful Attempts", section 4.2 of the first preprint) found that a process-reward model (PRM) reranks well and
yet is not worth it in large-scale RL: a fine step is hard to define in general reasoning, whether a step is right is
hard to label, and a PRM as the objective gets hacked and costs retraining. Here a step is a worked operation and its
label a rule (toy_steps.py), exact and free: the kindest case there is. Monte-Carlo labels
(Math-Shepherd) need completions from every prefix; their price is computed, not paid.

The PRM reranks k samples by the minimum, product, mean or last of their steps' scores, beside pass@1, the majority
vote (cons@k) and the oracle (pass@k). Growing k is optimisation pressure: where the score of the chosen rises and its
accuracy falls, the PRM is hacked. --rl-steps trains the policy against the PRM's score of the whole response alone.

What it showed: docs/failed_attempts.md.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from command import command, on_cluster, parser
from reranking import auc, reranked
from toy_steps import (
    MAX_TOKENS,
    PrefixScorer,
    is_right,
    prefixes,
    problem_of,
    questions,
    sampled,
    step_labels,
    tokens_in,
    train_scorer,
)

from r1mega.checks import check
from r1mega.config import DataConfig, EvalConfig, ModelConfig, RewardConfig, RolloutConfig
from r1mega.overrides import load
from r1mega.rewards.math_answer import extract_answer
from r1mega.samples import Prompt, Rollout
from r1mega.stages import rl
from r1mega.stages.console import Console
from r1mega.stages.run_directory import RunDirectory
from r1mega.training.metrics import read_jsonl

COMPLETIONS = 8
"""Of a prefix, for one Monte-Carlo label."""
RECIPE = Path(__file__).parents[2] / "configs/tiny/r1_zero.py"


def run(options: Namespace) -> dict[str, Any]:
    heldout = questions(options, options.questions, heldout=True)
    scorer, report = (options.scorer, {}) if options.scorer else _trained(options)
    began = time.monotonic()
    samples = asyncio.run(sampled(options, heldout, options.k))
    sampling = {"sampling_seconds": round(time.monotonic() - began, 1)}
    return {
        **report,
        **sampling,
        **on_cluster(options, scorer, lambda: _rerank(scorer, options, heldout, samples)),
        **({"rl": rl_run(options, scorer)} if options.rl_steps else {}),
    }


def _trained(options: Namespace) -> tuple[Path, dict[str, Any]]:
    """A scorer of labelled steps, and what labels and training cost."""
    prompts = questions(options, options.train_questions, heldout=False)
    began = time.monotonic()
    samples = asyncio.run(sampled(options, prompts, options.train_samples))
    rows = labelled_rows(prompts, samples)
    labelled = time.monotonic()
    path = train_scorer(rows, options, options.out)
    return path, {
        "labelling": {
            "sampled_tokens": tokens_in(samples),
            "labels": len(rows),
            "right": round(sum(row["safe"] for row in rows) / len(rows), 4),
            "monte_carlo_tokens": monte_carlo_tokens(samples),
            "seconds": round(labelled - began, 1),
        },
        "training_seconds": round(time.monotonic() - labelled, 1),
        "heldout_steps": json.loads((options.out / "scorer/results.json").read_text())["after"]["heldout"],
    }


def labelled_rows(
    prompts: Sequence[Prompt], samples: Mapping[str, list[Rollout]], kind: str = "steps"
) -> list[dict[str, Any]]:
    """Prefixes in the form that stages/reward_model.py reads.

    steps: every different prefix of a question once, with its rule's label. outcome: the prefixes of every sample,
    each with the sample's outcome, so that a score is the chance of ending right.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for prompt in prompts:
        for rollout in samples[prompt.id]:
            labels = step_labels(problem_of(prompt), rollout.response_text)
            for prefix, label in zip(prefixes(rollout.response_text), labels, strict=True):
                right, copy = (label, 0) if kind == "steps" else (labels[-1], rollout.index)
                row = {"prompt": prompt.question, "response": prefix, "safe": right}
                rows[prompt.question, prefix, copy] = row
    return [row for row in rows.values() if row["response"].strip()]


def monte_carlo_tokens(samples: Mapping[str, list[Rollout]]) -> int:
    """What COMPLETIONS of every worked step of these samples would generate, each as long as what was left."""
    total = 0.0
    for group in samples.values():
        for rollout in group:
            parts = prefixes(rollout.response_text)[:-1]
            length = max(1, len(rollout.response_text))
            total += sum(len(rollout.response_ids) * (1 - len(part) / length) for part in parts)
    return round(COMPLETIONS * total)


# ---------------------------------------------------------------- reranking


async def _rerank(
    path: Path, options: Namespace, prompts: Sequence[Prompt], samples: Mapping[str, list[Rollout]]
) -> dict[str, Any]:
    scorer = await PrefixScorer.start(path, options)
    steps: list[list[list[float]]] = []  # [question][sample][step]
    flat_scores: list[float] = []
    flat_labels: list[bool] = []
    for prompt in prompts:
        parts = [prefixes(rollout.response_text) for rollout in samples[prompt.id]]
        scores = iter(await scorer.score((prompt.question, part) for group in parts for part in group))
        steps.append([[next(scores) for _ in group] for group in parts])
        for rollout, given in zip(samples[prompt.id], steps[-1], strict=True):
            flat_scores += given
            flat_labels += step_labels(problem_of(prompt), rollout.response_text)
    scorer.close()
    texts = [[rollout.response_text for rollout in samples[prompt.id]] for prompt in prompts]
    problems = [problem_of(prompt) for prompt in prompts]
    right = [
        [is_right(problem, text) for text in group] for problem, group in zip(problems, texts, strict=True)
    ]
    worked = [[float(len(group) > 1) for group in question] for question in steps]
    votes = [[extract_answer(text) for text in group] for group in texts]
    ladder = [2**i for i in range(options.k.bit_length()) if 2**i <= options.k]
    return {
        "samples": {
            "tokens": tokens_in(dict(samples)),
            "distinct_prefixes": len(labelled_rows(prompts, samples)),
            "monte_carlo_tokens": monte_carlo_tokens(samples),
        },
        "scorer": {
            "steps": len(flat_labels),
            "right": round(sum(flat_labels) / len(flat_labels), 4),
            "auc": round(auc(flat_scores, flat_labels), 4),
            "scored_tokens": scorer.tokens,
            "seconds": round(scorer.seconds, 1),
        },
        "by_k": [reranked(k, steps, right, votes, worked) for k in ladder],
    }


# ---------------------------------------------------------------- the PRM as the objective


def rl_run(options: Namespace, scorer: Path) -> dict[str, Any]:
    """R1-Zero's toy recipe, but the reward is the scorer's alone; accuracy and format are measured beside it."""
    config = replace(
        load(RECIPE),
        seed=options.seed,
        num_steps=options.rl_steps,
        model=ModelConfig(path=options.model, dtype="float32"),
        data=DataConfig(
            path="generated:bilingual",
            template="tiny_bilingual",
            max_prompt_tokens=64,
            operations=options.operations,
            size=8000,
            eval_size=options.questions,
        ),
        rollout=RolloutConfig(
            max_tokens=((0, MAX_TOKENS),), dtype="float32", kv_cache_gib=0.25, max_concurrent=256
        ),
        rewards=RewardConfig(
            workers=1,
            weights={"helpful": 1.0, "accuracy": 0.0, "format": 0.0},
            helpful_model=str(scorer),
            model_on_reasoning=True,
        ),
        eval=EvalConfig(every=10),
    )
    config = replace(config, parallel=replace(config.parallel, data=1))
    check(config)
    began = time.monotonic()
    with RunDirectory(options.out / "rl", config) as directory:
        rl.run(config, directory, Console())
        results = directory.results()
    names = ("step", "reward", "accuracy", "format", "response_length", "eval/sampled")
    rows = read_jsonl(options.out / "rl/metrics.jsonl")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "before": results["before"],
        "after": results["after"],
        "curve": [{name: row.get(name) for name in names} for row in rows],
        "commonest_answers": commonest_answers(read_jsonl(options.out / "rl/samples.jsonl")),
    }


def commonest_answers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the logged samples of each ten steps: how many, and the three answers given most."""
    tens: dict[int, list[str | None]] = defaultdict(list)
    for row in rows:
        tens[(row["step"] - 1) // 10 * 10].append(extract_answer(row["response"]))
    return [
        {"after_step": first, "samples": len(given), "answers": Counter(given).most_common(3)}
        for first, given in sorted(tens.items())
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser(__doc__)
    parsed.add_argument("--k", type=int, default=64, help="samples of each held-out question, at most")
    parsed.add_argument("--rl-steps", type=int, default=0, help="RL against the scorer (0: none)")
    return command("process_reward", run, parsed.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
