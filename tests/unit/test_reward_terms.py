"""Every term of the table, from a rollout to its value and verdict."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import Any

import pytest
from scripted_endpoint import ScriptedEndpoint, in_turn, judge_config, verdict

from r1mega.config import ConfigError, JudgeConfig, RewardConfig
from r1mega.data.preferences import part_read
from r1mega.rewards.scoring import Scorer
from r1mega.samples import Prompt, Reward, Rollout
from r1mega.stages.preflight import check_references

ENGLISH = "First we add the two numbers, then we check that the sum is right."
GERMAN = "Zuerst addieren wir die beiden Zahlen, dann prüfen wir, ob die Summe stimmt."
TESTS = json.dumps({"asserts": ["assert double(2) == 4", "assert double(-1) == -2"]})
ADDS = json.dumps({"stdin": ["1 2\n", "5 6\n"], "stdout": ["3\n", "11\n"]})
needs_jail = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs the package bubblewrap")


def rollout(
    text: str,
    *,
    task: str = "math",
    question: str = "What is 3 + 4?",
    answer: str = "7",
    finish: str = "stop",
    tokens: int = 10,
    limit: int = 100,
    opening: str = "",
) -> Rollout:
    prompt = Prompt("p", question, answer, task, f"{question}{opening}", (1,))
    return Rollout(prompt, 0, (4,) * tokens, (-0.1,) * tokens, text, finish, 0, limit)


def scored(
    item: Rollout, *terms: str, models: dict[str, Any] | None = None, judge: JudgeConfig | None = None
) -> Reward:
    async def scenario() -> Reward:
        rewards = RewardConfig(weights=dict.fromkeys(terms, 1.0))
        async with Scorer(rewards, judge=judge, models=models) as scorer:
            return await scorer.score(item)

    return asyncio.run(scenario())


def outcome(item: Rollout, term: str, **services: Any) -> tuple[float, str]:
    reward = scored(item, term, **services)
    return reward.terms[term], reward.verdicts[term]


def thought(chain: str, answer: str = "7") -> str:
    return f"<think>{chain}</think><answer>{answer}</answer>"


def program(source: str) -> str:
    return f"<think>easy</think>\n```python\n{source}\n```\n"


@needs_jail
@pytest.mark.parametrize(
    ("source", "tests", "expected"),
    [
        ("def double(x): return 2 * x", TESTS, (1.0, "passed")),
        ("def double(x): return x * x", TESTS, (0.0, "wrong_answer")),
        ("print(sum(map(int, input().split())))", ADDS, (1.0, "passed")),
        ("print(3)", ADDS, (0.0, "wrong_answer")),
    ],
)
def test_a_program_earns_its_reward_by_passing_every_test(
    source: str, tests: str, expected: tuple[float, str]
) -> None:
    assert outcome(rollout(program(source), task="code", answer=tests), "accuracy") == expected


@pytest.mark.parametrize(
    ("task", "question", "answer", "response", "expected"),
    [
        ("choice", "Which? A. Rome B. Paris", "B", thought("hm", "Paris"), (1.0, "equal")),
        ("choice", "Which? A. Rome B. Paris", "B", "<think>hm</think>ANSWER: A", (0.0, "unequal")),
        ("logic", "In which order?", "a > b > c", thought("hm", "a > b > c"), (1.0, "equal")),
        ("logic", "In which order?", "a > b > c", thought("hm", "a > c > b"), (0.0, "unequal")),
        ("math", "?", "1/2", thought("hm", "0.5"), (1.0, "equal")),
        ("math", "?", "1/2", "<think>0.5", (0.0, "missing")),
        ("choice", "?", "B", "<think>B", (0.0, "missing")),
    ],
)
def test_each_task_has_its_rule(
    task: str, question: str, answer: str, response: str, expected: tuple[float, str]
) -> None:
    assert outcome(rollout(response, task=task, question=question, answer=answer), "accuracy") == expected


@pytest.mark.parametrize("task", ["math", "code", "choice", "logic"])
def test_a_truncated_output_is_never_right(task: str) -> None:
    item = rollout(thought("hm"), task=task, finish="length")
    assert outcome(item, "accuracy") == (0.0, "truncated")


def test_language_follows_the_question_and_needs_words() -> None:
    english, german = "How many apples are left in the basket?", "Wie viele Äpfel sind noch im Korb?"
    assert outcome(rollout(thought(ENGLISH), question=english), "language") == (1.0, "consistent")
    assert outcome(rollout(thought(GERMAN), question=german), "language") == (1.0, "consistent")
    value, said = outcome(rollout(thought(GERMAN), question=english), "language")
    assert (value < 0.1, said) == (True, "other_language")
    mixed, said = outcome(rollout(thought(f"{ENGLISH} {GERMAN}"), question=english), "language")
    assert (0.3 < mixed < 0.7, said) == (True, "mixed")
    for empty in (thought(""), thought(r"$x^2 + y^2$"), ""):
        assert outcome(rollout(empty, question=english), "language") == (0.0, "no_words")
    open_chain = outcome(rollout(f"{ENGLISH}</think>Sieben ist die Antwort.", question=english), "language")
    assert open_chain == (1.0, "consistent"), "the template may have opened the block"


def test_a_long_chain_is_read_as_a_short_one() -> None:
    long = rollout(thought(" ".join([ENGLISH] * 200)), question="How many apples are left in the basket?")
    assert outcome(long, "language") == (1.0, "consistent")
    assert outcome(long, "repetition")[0] == 0.0
    assert outcome(rollout(thought(ENGLISH)), "repetition") == (1.0, "ok")


def test_readability_and_formats() -> None:
    assert outcome(rollout(thought(ENGLISH)), "readability") == (1.0, "readable")
    assert outcome(rollout(thought(f"{ENGLISH}\n```python\nx = 1\n```")), "readability") == (
        0.0,
        "code_block",
    )
    assert outcome(rollout("reasoning</think>7"), "reasoning_format") == (1.0, "ok")
    assert outcome(rollout("reasoning</think>"), "reasoning_format") == (0.0, "empty_summary")


def test_length_falls_over_the_last_fifth_of_the_limit() -> None:
    values = [outcome(rollout("x", tokens=n), "length")[0] for n in (10, 80, 90, 100)]
    assert values == [0.0, 0.0, -0.5, -1.0]


class Constant:
    """A reward model that gives every response the same score."""

    def __init__(self, value: float | None):
        self.value, self.asked = value, []  # type: ignore[var-annotated]

    async def score(self, question: str, response: str) -> float | None:
        self.asked.append((question, response))
        return self.value


def test_a_reward_model_reads_question_and_response_and_its_score_is_bounded() -> None:
    model = Constant(0.0)
    item = rollout(thought(ENGLISH), task="chat")
    assert outcome(item, "helpful", models={"helpful": model}) == (0.5, "scored")
    assert model.asked == [(item.prompt.question, item.response_text)]
    values = [outcome(item, "safety", models={"safety": Constant(s)})[0] for s in (-50.0, -1.0, 1.0, 50.0)]
    assert values == sorted(values)
    assert 0 <= values[0] < values[-1] <= 1
    assert outcome(item, "safety", models={"safety": Constant(None)}) == (0.0, "no_summary")


@pytest.mark.parametrize("opening", ["<think>\n", "<think>"])
def test_a_chain_that_the_prompt_opened_and_nobody_closed_is_no_summary_and_no_answer(opening: str) -> None:
    model = Constant(0.0)
    for task in ("math", "choice", "logic", "code"):
        item = rollout(
            "I work slowly: \\boxed{7}\n```python\nx\n```", task=task, answer=TESTS, opening=opening
        )
        assert scored(item, "accuracy").total == 0.0
    item = rollout("I work slowly and never stop thinking", task="chat", opening=opening)
    assert scored(item, "helpful", models={"helpful": model}).total == 0.5
    ((_, read),) = model.asked
    assert part_read(read, "summary") is None
    assert part_read(read, "response") == read == f"{opening}{item.response_text}"
    closed = rollout("I add.\n</think>\n\n\\boxed{7}", opening=opening)
    assert outcome(closed, "accuracy") == (1.0, "equal")


def test_the_judges_word_is_the_reward() -> None:
    item = rollout("<think>hm</think>It is seven.", task="open")
    with ScriptedEndpoint(in_turn(verdict("correct"), verdict("incorrect"))) as server:
        assert outcome(item, "judge", judge=judge_config(server)) == (1.0, "correct")
        assert outcome(item, "judge", judge=judge_config(server)) == (0.0, "incorrect")


def test_a_reference_that_no_rule_can_read_is_refused_before_the_run() -> None:
    good = [rollout("x", task="code", answer=TESTS).prompt, rollout("x", answer="anything").prompt]
    check_references(good)
    for task, answer in (("code", "{}"), ("code", "not json"), ("logic", "")):
        with pytest.raises(ConfigError, match=rf"prompt p \(task {task}\)"):
            check_references([*good, rollout("x", task=task, answer=answer).prompt])
