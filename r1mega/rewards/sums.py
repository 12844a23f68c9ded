"""How terms add up: plain weighted sums, a row of weights for each task (R1, sections 2.2 and 3.2).

R1-Zero: accuracy + format, equally. The first reinforcement learning adds language consistency. The second adds up
R_reasoning + R_general + R_lang, where R_reasoning = accuracy + format and R_general = a reward model + format;
a prompt is either kind, so every task has one row. The paper uses no neural reward model on reasoning, because
it was hacked; here that combination must be asked for by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from r1mega.config import ConfigError, JudgeConfig, RewardConfig, Weights

NEURAL = {"helpful": "rewards.helpful_model", "safety": "rewards.safety_model", "judge": "judge.url"}
"""Terms that a model computes, and the setting each needs."""


def weights_of(rewards: RewardConfig, task: str) -> Weights:
    """Term -> weight for prompts of this task."""
    return rewards.task_weights.get(task, rewards.weights)


def check_sums(
    rewards: RewardConfig,
    judge: JudgeConfig,
    tasks: Iterable[str],
    *,
    terms: Collection[str],
    ruled: Collection[str],
) -> None:
    """Refuses sums that cannot be computed, or that the paper warns of, before anything starts.

    tasks: those of the prompts. terms: the known terms. ruled: tasks whose answers a rule can verify.
    """
    for task in sorted(set(tasks)):
        row = weights_of(rewards, task)
        where = f"rewards.task_weights[{task}]" if task in rewards.task_weights else "rewards.weights"
        for term in row:
            if term not in terms:
                near = difflib.get_close_matches(term, terms, n=1)
                mend = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(terms))}"
                raise ConfigError(f"{where}: no term {term!r}; {mend}")
        if "accuracy" in row and task not in ruled:
            raise ConfigError(
                f"{where}: no rule knows the right answer of task {task!r} (rules: {', '.join(sorted(ruled))}); "
                f"give the task terms of its own in rewards.task_weights, or the data another task"
            )
        for term in sorted(NEURAL.keys() & row.keys()):
            _check_neural(rewards, judge, task, term, where, verifiable=task in ruled)


def _check_neural(
    rewards: RewardConfig, judge: JudgeConfig, task: str, term: str, where: str, *, verifiable: bool
) -> None:
    section, _, name = NEURAL[term].partition(".")
    if not getattr(rewards if section == "rewards" else judge, name):
        raise ConfigError(f"{where}: the term {term!r} needs {NEURAL[term]}=")
    if verifiable and weights_of(rewards, task)[term] > 0 and not rewards.model_on_reasoning:
        raise ConfigError(
            f"{where}: {term!r} would let a model reward task {task!r}, which a rule can verify; R1 does not, because "
            "such rewards get hacked. Give the task a row without it in rewards.task_weights, or say "
            "rewards.model_on_reasoning=true"
        )
