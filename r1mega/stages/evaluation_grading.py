"""Grades outputs of a benchmark: an output becomes a row with its verdict, answer, language and repetition.

The rules are the rewards' own (rewards/terms.py). Programs run under the benchmark's time limit, in CPU time, so that a
loaded machine changes no verdict, and three times that by the clock, so that one that sleeps is ended as well.
Chat is judged on the summary alone (R1, supplement D.1): against a reference, or against a baseline's response by four votes
with the order drawn each time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from r1mega.algorithms.estimators import equivalence_classes
from r1mega.config import ConfigError, JudgeConfig, RewardConfig
from r1mega.data.preference_votes import VOTES, Pair, ask_vote, unfit
from r1mega.data.suite_formats import Question
from r1mega.data.suites import Suite
from r1mega.rewards.choices import compare_choice, read_options
from r1mega.rewards.code_answer import extract_code
from r1mega.rewards.code_tests import CodeTests
from r1mega.rewards.instructions import follows, follows_loosely
from r1mega.rewards.judge import judge_correctness
from r1mega.rewards.language import consistency, detect
from r1mega.rewards.logic_answer import compare_logic
from r1mega.rewards.math_answer import extract_answer, quick_compare
from r1mega.rewards.prose import chain_of_thought, summary, whole_response
from r1mega.rewards.repetition import repetition
from r1mega.rewards.sandbox import Limits, Sandbox
from r1mega.rewards.scoring import FAULTS, Scorer
from r1mega.rewards.terms import final_text
from r1mega.samples import Prompt, Rollout, ScoredRollout

CLOCK_SHARE = 3.0
"""Wall-clock limit of a program over its CPU limit."""
VOTED = ("math", "choice", "logic")
"""Tasks whose answers can be compared with one another: those of cons@k."""
JUDGED = ("judged", "compared")
"""Tasks that a model behind `judge.url` grades."""
READ = (*VOTED, *JUDGED)
"""Tasks whose responses are prose in the question's language."""
TERMS = dict.fromkeys(VOTED, "accuracy") | {"code": "program"}
"""Task -> its term; others have a term of their own name."""


@dataclass(frozen=True)
class Output:
    """One sample of a question, from wherever it comes."""

    question: Question
    index: int
    prompt: str
    """Exactly what the model read; of an existing generation the question's text."""
    text: str
    finish_reason: str
    tokens: int | None = None
    """None where nobody counted."""
    published: bool | None = None
    """The verdict that came with it."""
    is_completion: bool = False
    """It continues the question's code as it stands."""

    @property
    def whole(self) -> str:
        """The text with the <think> that its prompt may have opened."""
        return whole_response(self.prompt, self.text)


class Grader:
    """`async with Grader(...) as grader`; owns the scorer's processes, the jails and the judge's connection."""

    def __init__(self, rewards: RewardConfig, judge: JudgeConfig, seed: int):
        self.rewards, self.seed = rewards, seed
        weights = {task: {TERMS.get(task, task): 1.0} for task in (*VOTED, "code", "instructions", *JUDGED)}
        terms = {
            "program": self._program,
            "instructions": self._instructions,
            "judged": self._judged,
            "compared": self._compared,
        }
        self.scorer = Scorer(replace(rewards, task_weights=weights), judge=judge, extra=terms)
        self._owned = ExitStack()
        self._tests: dict[float, CodeTests] = {}
        self._waiting: dict[str, Output] = {}
        """Outputs that are being graded, by the id their prompt has there."""

    async def __aenter__(self) -> Grader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._owned.close)
        await self.scorer.__aexit__()

    def prepare(self, tasks: set[str]) -> None:
        """Start what these tasks need. ConfigError where the machine or the settings cannot serve them."""
        if "code" in tasks:
            self._code_tests(0.0)
        if tasks & set(JUDGED):
            if not self.scorer.services.judge_config.url:
                raise ConfigError("a suite's answers need a judge: set judge.url= and judge.model=")
            _ = self.scorer.services.judge

    async def rows(
        self, suite: Suite, outputs: AsyncIterator[Output]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A row for each output, as soon as it is graded; none for one that our machine failed to grade."""

        async def rollouts() -> AsyncIterator[Rollout]:
            async for output in outputs:
                question = output.question
                key = f"{question.id}#{output.index}"
                self._waiting[key] = output
                # no prompt text: what is read is whole already
                prompt = Prompt(key, question.question, question.answer, question.task, "", ())
                yield Rollout(
                    prompt,
                    output.index,
                    (),
                    (),
                    readable(suite, output),
                    output.finish_reason,
                    weight_version=0,
                )

        async for scored in self.scorer.score_stream(rollouts()):
            output = self._waiting.pop(scored.rollout.prompt.id)
            row = await asyncio.to_thread(_row, output, scored)
            if row["verdict"] not in FAULTS:
                yield row

    async def classes(
        self, questions: Sequence[Question], answers: Sequence[Sequence[str | None]]
    ) -> list[list[Any]]:
        """The equivalence class of each sample's answer, question by question."""
        return await asyncio.to_thread(
            lambda: [
                equivalence_classes(given, self._same(q)) for q, given in zip(questions, answers, strict=True)
            ]
        )

    def _same(self, question: Question) -> Any:
        if question.task == "choice":
            options = read_options(question.question) or None
            return lambda a, b: a == b or compare_choice(a, b, options) == "equal"
        if question.task == "logic":
            return lambda a, b: a == b or compare_logic(a, b) == "equal"
        return self._same_mathematics

    def _same_mathematics(self, one: str, other: str) -> bool:
        """Called in a thread: what text and exact numbers cannot tell goes to the worker processes."""
        if one == other:
            return True
        verdict = quick_compare(one, other)
        if verdict is None:
            verdict = self.scorer.services.pool.submit("math", one, other).result()
        return verdict == "equal"

    # ------------------------------------------------------------ terms

    @cached_property
    def _sandbox(self) -> Sandbox:
        sandbox = Sandbox(slots=self.rewards.jails, isolation=self.rewards.isolation)
        self._owned.callback(sandbox.close)
        return sandbox

    def _code_tests(self, seconds: float) -> CodeTests:
        seconds = seconds or self.rewards.code_seconds
        if seconds not in self._tests:
            limits = Limits(
                cpu_seconds=seconds,
                wall_seconds=CLOCK_SHARE * seconds,
                memory_mib=self.rewards.code_memory_mib,
            )
            self._tests[seconds] = CodeTests(self._sandbox, limits)
            self._owned.callback(self._tests[seconds].close)
            self._owned.callback(self._sandbox.close)  # first: checks under way end at once
        return self._tests[seconds]

    async def _program(self, rollout: Rollout) -> tuple[float, str]:
        if rollout.finish_reason == "length":
            return 0.0, "truncated"
        question = self._waiting[rollout.prompt.id].question
        tests = self._code_tests(question.seconds)
        outcome = await tests.check_async(rollout.response_text or None, question.answer)
        return float(outcome.verdict == "passed"), outcome.verdict

    async def _instructions(self, rollout: Rollout) -> tuple[float, str]:
        """1 where all are followed, strictly (IFEval's prompt-level accuracy)."""
        if rollout.finish_reason == "length":
            return 0.0, "truncated"
        followed = followed_instructions(rollout.response_text, rollout.prompt.answer)
        return float(all(followed["strict"])), "followed" if all(followed["strict"]) else "not_followed"

    async def _judged(self, rollout: Rollout) -> tuple[float, str]:
        if rollout.finish_reason == "length":
            return 0.0, "truncated"
        said = summary(rollout.response_text)
        if not said:
            return 0.0, "no_summary"
        prompt = rollout.prompt
        judgement = await judge_correctness(self.scorer.services.judge, prompt.question, prompt.answer, said)
        if judgement.verdict == "fault":
            raise _judge_down(judgement.why)
        return judgement.value, judgement.verdict

    async def _compared(self, rollout: Rollout) -> tuple[float, str]:
        """1 for a win over the baseline, 0.5 for a tie, by the mean of the votes."""
        if rollout.finish_reason == "length":
            return 0.0, "truncated"
        prompt, said = rollout.prompt, summary(rollout.response_text)
        pair = Pair(prompt.id, prompt.question, said, prompt.answer, said, summary(prompt.answer))
        unseen = unfit(pair)
        if unseen in ("empty", "identical", "too_long"):  # lengths may differ here
            return (0.5, "tie") if unseen == "identical" else (0.0, "no_summary" if not said else "too_long")
        judge = self.scorer.services.judge
        votes = await asyncio.gather(*(ask_vote(judge, pair, i, self.seed) for i in range(VOTES)))
        if any(vote.verdict == "fault" for vote in votes):
            raise _judge_down(next(vote.reply for vote in votes if vote.verdict == "fault"))
        scores = [vote.score for vote in votes if vote.verdict == "voted"]
        if not scores:
            return 0.0, "unparsable"
        total = sum(scores)
        return (1.0, "win") if total > 0 else (0.0, "loss") if total < 0 else (0.5, "tie")


def _judge_down(why: str) -> ConfigError:
    return ConfigError(
        f"the judge gives no answer ({why}); start it or set judge.url=, and run the same command again"
    )


# ---------------------------------------------------------------- one output


def readable(suite: Suite, output: Output) -> str:
    """What the rule reads: the program of a code task ("" for none), else the response in the suite's final form."""
    if output.question.task == "code":
        return program(output) or ""
    return suite.final(output.whole)


def program(output: Output) -> str | None:
    """The whole program: a completion behind the question's code, or the last block of code of a response.

    A block, or a text without any, that begins with an indented line is a function's body. None without code.
    """
    question, text = output.question, output.text if output.is_completion else output.whole
    if not output.is_completion:
        final = text.rsplit("</think>", 1)[-1]
        block = extract_code(text)
        if block is None and ("```" in final or not (question.before and summary(text))):
            return None
        text = (final if block is None else block).strip("\n") + "\n"
        if not text[0].isspace():
            return text + question.after
    return question.before + text + question.after


def followed_instructions(response: str, answer: str) -> dict[str, list[bool]]:
    """Of the summary, instruction by instruction; answer: a suite's JSON of [id, arguments] pairs."""
    said, wanted = summary(response), json.loads(answer)
    return {
        "strict": [follows(said, name, given) for name, given in wanted],
        "loose": [follows_loosely(said, name, given) for name, given in wanted],
    }


def extracted(question: Question, text: str) -> str | None:
    """What a response answers, for cons@k; None for nothing."""
    if question.task == "math":
        return extract_answer(text)
    return final_text(text) if question.task in VOTED else None


def _row(output: Output, scored: ScoredRollout) -> dict[str, Any]:
    question, text = output.question, output.text
    (verdict,) = scored.reward.verdicts.values()
    chain = chain_of_thought(text) or text
    row: dict[str, Any] = {
        "id": question.id,
        "index": output.index,
        "prompt": output.prompt,
        "response": text,
        "finish_reason": output.finish_reason,
        "tokens": output.tokens,
        "value": scored.reward.total,
        "correct": scored.reward.total == 1.0,
        "verdict": verdict,
        "answer": extracted(question, scored.rollout.response_text),
        "repetition": repetition(chain)[1],
    }
    if question.task in READ:
        target = question.language or detect(question.question)
        share, why = consistency(chain, target)
        row["language"] = None if why in ("no_words", "no_target") else share
    if question.task == "instructions":
        row |= followed_instructions(output.whole, question.answer)
    if output.published is not None:
        row["published"] = output.published
    return row
