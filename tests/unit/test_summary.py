"""From reports and scored rollouts to the numbers of one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from r1mega.rewards.reflection import has_aha
from r1mega.samples import Prompt, Reward, Rollout, ScoredRollout
from r1mega.stages.evaluate import score
from r1mega.stages.summary import combine_reports, rollout_metrics


def report(counted: bool = True, **totals: float) -> dict[str, Any]:
    return {
        "totals": totals, "counted": counted, "grad_norm": 2.0, "lr": 0.1, "peak_memory_bytes": 1 << 30,
        "expert_balance": {},
    }  # fmt: skip


def test_means_are_over_the_tokens_of_all_replicas() -> None:
    metrics = combine_reports(
        [report(tokens=10, loss=0.5, entropy=20.0, ratio_deviation_max=0.1),
         report(tokens=30, loss=0.25, entropy=20.0, ratio_deviation_max=0.3)]
    )  # fmt: skip
    assert metrics["tokens"] == 40
    assert metrics["loss"] == 0.75, "losses carry their weight already"
    assert metrics["entropy"] == 1.0
    assert metrics["ratio_deviation_max"] == 0.3
    assert (metrics["grad_norm"], metrics["lr"], metrics["peak_memory_gib"]) == (2.0, 0.1, 1.0)


def test_a_tensor_group_counts_once_but_its_memory_fully() -> None:
    second = report(counted=False, tokens=10, loss=0.5) | {"peak_memory_bytes": 3 << 30}
    metrics = combine_reports([report(tokens=10, loss=0.5), second])
    assert (metrics["tokens"], metrics["loss"], metrics["peak_memory_gib"]) == (10, 0.5, 3.0)


def test_the_busiest_rank_is_the_mean_over_the_layers_of_all_the_pipelines_ranks() -> None:
    balances = [
        {"with_replicas": (2.0, 2), "without_replicas": (4.0, 2)},
        {},
        {"with_replicas": (1.75, 1), "without_replicas": (5.0, 1)},
    ]
    metrics = combine_reports([report(tokens=10, loss=1.0) | {"expert_balance": row} for row in balances])
    assert metrics["busiest_expert_rank/with_replicas"] == 1.25
    assert metrics["busiest_expert_rank/without_replicas"] == 3.0


def test_losses_are_the_mean_of_the_updates() -> None:
    metrics = combine_reports([report(tokens=10, loss=3.0, mtp_loss=6.0)], num_updates=3)
    assert (metrics["loss"], metrics["mtp_loss"]) == (1.0, 2.0)


def scored(text: str, accuracy: float, verdict: str, finish: str = "stop") -> ScoredRollout:
    prompt = Prompt("p", "1+1", "2", "math", "1+1=", (1, 2))
    rollout = Rollout(prompt, 0, (1,) * len(text), (-0.5,) * len(text), text, finish, 0)
    return ScoredRollout(
        rollout,
        Reward(accuracy + 1.0, {"accuracy": accuracy, "format": 1.0}, {"accuracy": verdict, "format": "ok"}),
    )


def test_rollouts_are_averaged_and_verdicts_counted() -> None:
    metrics = rollout_metrics(
        [scored("wait, 2", 1.0, "equal"), scored("3", 0.0, "unequal"), scored("4" * 10, 0.0, "truncated", "length"),
         scored("5! Wait, wait. Check it", 0.0, "unequal")]
    )  # fmt: skip
    assert metrics["accuracy"] == 0.25
    assert metrics["format"] == 1.0
    assert metrics["reward"] == 1.25
    assert metrics["truncated"] == 0.25
    assert metrics["response_length"] == pytest.approx((7 + 1 + 10 + 23) / 4)
    verdicts = {name: value for name, value in metrics.items() if name.startswith("verdict/")}
    assert verdicts == {
        "verdict/accuracy:equal": 1, "verdict/accuracy:truncated": 1, "verdict/accuracy:unequal": 2,
        "verdict/format:ok": 4,
    }  # fmt: skip
    assert (metrics["words/wait"], metrics["words/check"], metrics["reflective_words"]) == (0.75, 0.25, 1.0)
    assert metrics["aha"] == 0.25
    assert "language_mixing" not in metrics, "the question is a formula: no language is foreign to it"


def test_the_interval_of_an_accuracy_counts_problems_and_not_their_samples() -> None:
    def of(problem: str, *accuracies: float) -> list[ScoredRollout]:
        one = scored("2", 1.0, "equal")
        rollout = replace(one.rollout, prompt=replace(one.rollout.prompt, id=problem))
        return [
            ScoredRollout(rollout, Reward(value, {"accuracy": value}, {"accuracy": ""}))
            for value in accuracies
        ]

    single = score([*of("a", 1.0), *of("b", 0.0), *of("c", 1.0), *of("d", 1.0)])
    assert (single.accuracy, single.n) == (0.75, 4)
    assert single.ci == pytest.approx(1.96 * (0.75 * 0.25 / 4) ** 0.5)
    alike = score([*of("a", 1.0, 1.0), *of("b", 0.0, 0.0), *of("c", 1.0, 1.0), *of("d", 1.0, 1.0)])
    assert alike == replace(single, format=alike.format)
    assert score([*of("a", 1.0, 0.0), *of("b", 0.0, 1.0)]).ci == 0.0


def answered(chain: str, **terms: float) -> ScoredRollout:
    prompt = Prompt("p", "How many are two and three apples?", "5", "math", "", (1,))
    rollout = Rollout(prompt, 0, (1,), (-0.5,), f"<think>{chain}</think>5", "stop", 0)
    return ScoredRollout(rollout, Reward(1.0, terms, dict.fromkeys(terms, "mixed")))


def test_language_mixing_is_logged_whether_or_not_language_is_rewarded() -> None:
    english, formula = answered("I add two and three and say it."), answered("2+3=5")
    chinese = answered("我们先把两个数加起来再说。")
    assert rollout_metrics([english, chinese, formula])["language_mixing"] == pytest.approx(0.5)
    assert rollout_metrics([english, answered("", language=0.25)])["language_mixing"] == pytest.approx(0.375)
    assert "language_mixing" not in rollout_metrics([formula])


@pytest.mark.parametrize(
    ("text", "aha"),
    [
        ("Wait, wait. Wait. That's an aha moment I can flag here.", True),
        ("Let's reevaluate this step-by-step", True),
        ("let me check it again", True),
        ("I wait. But who waits?", False),
        ("let me check the sum", False),
        ("", False),
    ],
)
def test_an_aha_is_a_turn_back_not_a_word(text: str, aha: bool) -> None:
    assert has_aha(text) == aha
