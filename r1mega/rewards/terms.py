"""The reward terms: each is `async (Rollout) -> (value, verdict)`, and a table of them.

value is unweighted, 1 at best; verdict says why. To add a reward, write its maker `(Services) -> RewardTerm` and
a row in REWARDS (docs/rewards.md); a config then names it with its weight.

Of the paper: accuracy, format (R1, 2.2.2), language (3.2.1), helpful, safety (3.1). Repetition, readability and
length are ours as reward terms; the paper uses the first two to filter data.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TypeVar

from r1mega.rewards.choices import compare_choice, read_options
from r1mega.rewards.code_spec import parse_tests
from r1mega.rewards.format import check_format, check_reasoning_format
from r1mega.rewards.judge import judge_correctness
from r1mega.rewards.language import consistency, detect
from r1mega.rewards.length import length_penalty
from r1mega.rewards.logic_answer import compare_logic, read_reference
from r1mega.rewards.math_answer import extract_answer, quick_compare
from r1mega.rewards.prose import chain_of_thought, summary, whole_response
from r1mega.rewards.readability import readability
from r1mega.rewards.repetition import repetition
from r1mega.rewards.services import Services
from r1mega.samples import Rollout

RewardTerm = Callable[[Rollout], Awaitable[tuple[float, str]]]
Maker = Callable[[Services], RewardTerm]
Result = TypeVar("Result")

INLINE_CHARACTERS = 4000
"""Longer texts are read in a thread, so that the loop that feeds the engines is not held up."""
LENGTH_BUFFER = 0.2
"""Of the limit: where the length term begins to fall."""


# ---------------------------------------------------------------- accuracy


def accuracy_term(services: Services) -> RewardTerm:
    """1 for the right answer, judged by the rule of the prompt's task (ACCURACY).

    An output cut at the length limit is worth 0 whatever it says (verdict truncated).
    """
    rules = {task: make(services) for task, make in ACCURACY.items()}

    async def accuracy(rollout: Rollout) -> tuple[float, str]:
        task = rollout.prompt.task
        if task not in rules:
            raise ValueError(
                f"prompt {rollout.prompt.id}: task {task!r} has no rule; known are {', '.join(rules)}"
            )
        if rollout.finish_reason == "length":
            return 0.0, "truncated"
        return await rules[task](rollout)

    return accuracy


def math_rule(services: Services) -> RewardTerm:
    """1 when the answer in <answer>...</answer> (or, without the tags, the last \\boxed{}) equals the reference.

    Verdicts: equal | unequal | unparsable | timeout | too_long | memory | fault, and missing (no answer found).
    """

    async def compared(rollout: Rollout) -> tuple[float, str]:
        answer = extract_answer(whole(rollout), last_number=services.rewards.last_number)
        if answer is None:
            return 0.0, "missing"
        verdict = quick_compare(rollout.prompt.answer, answer)
        if verdict is None:
            verdict = await services.pool.run("math", rollout.prompt.answer, answer)
        return float(verdict == "equal"), verdict

    return compared


def code_rule(services: Services) -> RewardTerm:
    """1 when the program in the response passes all tests (code_tests.py has the verdicts)."""

    async def code(rollout: Rollout) -> tuple[float, str]:
        outcome = await services.code.check_response_async(whole(rollout), rollout.prompt.answer)
        return float(outcome.verdict == "passed"), outcome.verdict

    return code


def choice_rule(_: Services) -> RewardTerm:
    """1 for the right option of a multiple-choice question, by letter or by its text."""

    async def choice(rollout: Rollout) -> tuple[float, str]:
        answer = final_text(whole(rollout))
        if answer is None:
            return 0.0, "missing"
        verdict = compare_choice(rollout.prompt.answer, answer, read_options(rollout.prompt.question) or None)
        return float(verdict == "equal"), verdict

    return choice


def logic_rule(_: Services) -> RewardTerm:
    """1 for the right set, ordering, assignment or truth value (logic_answer.py has the forms of a reference)."""

    async def logic(rollout: Rollout) -> tuple[float, str]:
        answer = final_text(whole(rollout))
        if answer is None:
            return 0.0, "missing"
        verdict = compare_logic(rollout.prompt.answer, answer)
        return float(verdict == "equal"), verdict

    return logic


def whole(rollout: Rollout) -> str:
    """The response with the opening tag that its prompt may hold: what answers and summaries are read from."""
    return whole_response(rollout.prompt.text, rollout.response_text)


def final_text(response: str) -> str | None:
    """What a whole response ends in: its <answer> block or box, else all of its summary; None where there is nothing."""
    return extract_answer(response) or summary(response) or None


# ---------------------------------------------------------------- form and language


def format_term(_: Services) -> RewardTerm:
    """1 for exactly <think>...</think><answer>...</answer> (format.py has the verdicts)."""

    async def form(rollout: Rollout) -> tuple[float, str]:
        verdict = check_format(rollout.response_text, truncated=rollout.finish_reason == "length")
        return float(verdict == "ok"), verdict

    return form


def reasoning_format_term(_: Services) -> RewardTerm:
    """1 for reasoning, </think> and a summary: the format of R1's chat template, which opens <think> itself."""

    async def form(rollout: Rollout) -> tuple[float, str]:
        verdict = check_reasoning_format(rollout.response_text, truncated=rollout.finish_reason == "length")
        return float(verdict == "ok"), verdict

    return form


def language_term(services: Services) -> RewardTerm:
    """Share of the chain of thought's words that are in the question's language (R1, section 3.2.1)."""
    exact = services.rewards.exact_chinese

    async def language(rollout: Rollout) -> tuple[float, str]:
        return await _read(lambda text: consistency(text, language_of(rollout), exact_chinese=exact), rollout)

    return language


def repetition_term(_: Services) -> RewardTerm:
    """1 unless the chain repeats itself."""

    async def repeats(rollout: Rollout) -> tuple[float, str]:
        _, verdict = await _read(repetition, rollout)
        return float(verdict == "ok"), verdict

    return repeats


def readability_term(_: Services) -> RewardTerm:
    """1 for a chain without long paragraphs, code blocks, mixed languages or loops."""

    async def readable(rollout: Rollout) -> tuple[float, str]:
        return await _read(lambda text: readability(text, language_of(rollout)), rollout)

    return readable


def length_term(_: Services) -> RewardTerm:
    """0, falling to -1 over the last fifth of the length limit."""

    async def length(rollout: Rollout) -> tuple[float, str]:
        return length_penalty(
            len(rollout.response_ids),
            rollout.max_tokens,
            max(1, round(LENGTH_BUFFER * rollout.max_tokens)),
            truncated=rollout.finish_reason == "length",
        )

    return length


async def _read(measure: Callable[[str], Result], rollout: Rollout) -> Result:
    """`measure` of the chain of thought."""
    chain = chain_of(rollout)
    if len(chain) <= INLINE_CHARACTERS:
        return measure(chain)
    return await asyncio.to_thread(measure, chain)


def chain_of(rollout: Rollout) -> str:
    """The chain of thought. A response without </think> or <think> is all chain: none is left out."""
    return chain_of_thought(rollout.response_text) or chain_of_thought(rollout.response_text, opened=True)


def language_of(rollout: Rollout) -> str:
    """Of the question."""
    return _detected(rollout.prompt.question)


@lru_cache(maxsize=1 << 16)
def _detected(question: str) -> str:
    return detect(question)


# ---------------------------------------------------------------- models


def as_reward(score: float | None) -> tuple[float, str]:
    """(value in (0, 1), verdict): the sigmoid of a score, for safety the probability of being safe.

    The paper leaves the scale open. Bounded, a response that leaves nothing to read (None) can be worth 0 and so
    less than any other, whatever the sign of the scores. Verdicts: scored | no_summary.
    """
    return (0.0, "no_summary") if score is None else (0.5 + 0.5 * math.tanh(score / 2), "scored")


def model_term(name: str) -> Maker:
    """The score of a reward model that the stage serves, brought into (0, 1)."""

    def make(services: Services) -> RewardTerm:
        model = services.models[name]

        async def scored(rollout: Rollout) -> tuple[float, str]:
            return as_reward(await model.score(rollout.prompt.question, whole(rollout)))

        return scored

    return make


def judge_term(services: Services) -> RewardTerm:
    """1 where the judge says that the summary agrees with the reference (judge.py has the verdicts)."""

    async def judged(rollout: Rollout) -> tuple[float, str]:
        prediction = final_text(whole(rollout))
        if prediction is None:
            return 0.0, "missing"
        prompt = rollout.prompt
        judgement = await judge_correctness(services.judge, prompt.question, prompt.answer, prediction)
        return judgement.value, judgement.verdict

    return judged


ACCURACY: dict[str, Maker] = {
    "math": math_rule,
    "code": code_rule,
    "choice": choice_rule,
    "logic": logic_rule,
}
"""Prompt.task -> its rule."""

REFERENCES: dict[str, Callable[[str], object]] = {"code": parse_tests, "logic": read_reference}
"""Task -> what reads a reference answer and raises ValueError for one that its rule could not use."""

REWARDS: dict[str, Maker] = {
    "accuracy": accuracy_term,
    "format": format_term,
    "reasoning_format": reasoning_format_term,
    "language": language_term,
    "repetition": repetition_term,
    "readability": readability_term,
    "length": length_term,
    "helpful": model_term("helpful"),
    "safety": model_term("safety"),
    "judge": judge_term,
}
"""Term -> its maker; a config names terms and weights (rewards.weights, rewards.task_weights)."""
