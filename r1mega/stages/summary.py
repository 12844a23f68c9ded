"""From what the trainer ranks and the scored rollouts report to the metrics of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from r1mega.algorithms.losses import combine, summarise
from r1mega.rewards.reflection import has_aha, reflective_words
from r1mega.rewards.watch import language_mixing
from r1mega.samples import ScoredRollout

GIB = 1 << 30


def combine_reports(reports: Sequence[dict[str, Any]], num_updates: int = 1) -> dict[str, float]:
    """Metrics of `num_updates` optimizer steps from every rank's report (Trainer.rl_update, sft_update)."""
    counted = [
        {key: torch.tensor(value, dtype=torch.float64) for key, value in report["totals"].items()}
        for report in reports
        if report["counted"]
    ]
    metrics = summarise(combine(counted))
    metrics |= {
        name: metrics[name] / num_updates for name in ("loss", "mtp_loss", "value_loss") if name in metrics
    }
    if "critic_grad_norm" in reports[0]:
        metrics["critic_grad_norm"] = reports[0]["critic_grad_norm"]
    balances = [report["expert_balance"] for report in reports if report["expert_balance"]]
    for name in balances[0] if balances else ():
        total, layers = (sum(column) for column in zip(*(balance[name] for balance in balances), strict=True))
        metrics[f"busiest_expert_rank/{name}"] = total / layers
    return metrics | {
        "grad_norm": reports[0]["grad_norm"],
        "lr": reports[0]["lr"],
        "peak_memory_gib": max(report["peak_memory_bytes"] for report in reports) / GIB,
    }


def term_means(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """Mean of every term over the outputs that have it: a task's row names its terms. "format" is that of R1-Zero's
    tags or of R1's reasoning, whichever the template has."""
    values: dict[str, list[float]] = {}
    for item in scored:
        for term, value in item.reward.terms.items():
            values.setdefault("format" if term == "reasoning_format" else term, []).append(value)
    return {term: sum(found) / len(found) for term, found in values.items()}


def rollout_metrics(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """Means over the outputs of one rollout; verdicts as counts, reflective words per response, the share with "aha".

    language_mixing is absent where no output has words.
    """
    n = max(1, len(scored))
    metrics = {
        "reward": sum(item.reward.total for item in scored) / n,
        "response_length": sum(len(item.rollout.response_ids) for item in scored) / n,
        "truncated": sum(item.rollout.finish_reason == "length" for item in scored) / n,
        "aha": sum(has_aha(item.rollout.response_text) for item in scored) / n,
    }
    metrics |= term_means(scored)
    if (mixing := language_mixing(scored)) is not None:
        metrics["language_mixing"] = mixing
    verdicts = Counter(
        f"{term}:{verdict}" for item in scored for term, verdict in item.reward.verdicts.items()
    )
    metrics |= {f"verdict/{name}": float(count) for name, count in sorted(verdicts.items())}
    words: Counter[str] = Counter()
    for item in scored:
        words.update(reflective_words(item.rollout.response_text))
    metrics["reflective_words"] = words.total() / n
    return metrics | {f"words/{word}": count / n for word, count in words.items()}
