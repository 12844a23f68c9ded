"""The toy world of the whole pipeline: `chain` (chain.py) told in English or Chinese words, and small talk.

    question  Take 3, then plus 4, then times 2. What is the answer?        取3，再加4，再乘2。答案是几？
    worked    3 plus 4 is 7 times 2 is 4                                    3加4得7乘2得4
    answer    4

The world's base documents have what makes the stages of R1 necessary. Worked steps change their language half-way,
and Chinese ones have fewer mistakes, as if the web's better solutions were in Chinese: so reinforcement learning by
accuracy alone mixes languages, and the language-consistency reward has something to do (R1, section 3.2.1). Small talk
(general_talk.py) is answered rudely, twice, or with secrets as often as well.

One token for each word, space or sign around it included (WORDS), gives an operation of the question four tokens and a
worked step four, in both languages: what comes next always stands equally far back, as in chain.py.
"""

# ruff: noqa: RUF001  (full-width signs are Chinese)

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.data import general_talk
from r1mega.data.chain import OPERATORS, ChainProblem, apply, check_operations, training_problem
from r1mega.data.chat import template


@dataclass(frozen=True)
class Words:
    """How a language tells a chain."""

    language: str
    take: str
    then: tuple[str, str]
    operators: dict[str, str]
    gives: str
    ask: str
    so: str
    """Ends the reasoning of a readable solution, in the first person."""
    stop: str
    summary: str

    def question(self, problem: ChainProblem) -> str:
        steps = "".join(
            "".join(self.then) + self.operators[operator] + str(digit) for operator, digit in problem.steps
        )
        return f"{self.take}{problem.start}{steps}{self.ask}"

    def step(self, operator: str, digit: int, value: int) -> str:
        return f"{self.operators[operator]}{digit}{self.gives}{value}"

    def conclusion(self, reasoning: str, answer: str) -> str:
        return f"{reasoning}{self.stop}{self.so}{answer}{self.stop}"

    def answered(self, answer: str) -> str:
        return f"{self.summary}\\boxed{{{answer}}}{self.stop}"


ENGLISH = Words(
    "en", "Take ", (", ", "then"), {"+": " plus ", "-": " minus ", "*": " times "}, " is ",
    ". What is the answer?", " So I get ", ".", "The answer is ",
)  # fmt: skip
CHINESE = Words(
    "zh", "取", ("，", "再"), {"+": "加", "-": "减", "*": "乘"}, "得", "。答案是几？", "所以我得", "。", "答案是",
)  # fmt: skip
LANGUAGES = (ENGLISH, CHINESE)

WORDS = tuple(
    dict.fromkeys(
        part
        for words in LANGUAGES
        for part in (
            words.take, *words.then, *words.operators.values(), words.gives, words.ask, words.so, words.stop,
            words.summary,
        )
    )
)  # fmt: skip
"""Each is one token of the toy model (tools/make_bilingual_model.py)."""


@dataclass(frozen=True)
class BilingualMix:
    """Shares of the base documents and how good their content is."""

    facts: float = 0.14
    talk: float = 0.10
    chat: float = 0.12
    """Worked solutions in R1's chat template: the web has transcripts, and a template's tokens need a meaning before
    little fine-tuning data can use them."""
    untagged: float = 0.15
    direct: float = 0.15
    """The rest are worked solutions."""
    direct_right: float = 0.5
    own_language: float = 0.6
    """How often worked steps begin in the question's language."""
    switch: float = 0.2
    """Chance that a step changes the language."""
    noise_english: float = 0.35
    noise_chinese: float = 0.08
    """Chance that a worked step shows a random digit (later steps go on from it)."""
    worked_untagged: float = 0.3


def questions(problems: list[ChainProblem], seed: int) -> list[tuple[str, ChainProblem]]:
    """Each problem told in one language, drawn by `seed` and the problem."""
    told = []
    for problem in problems:
        words = LANGUAGES[random.Random(f"language {seed} {problem.question}").randrange(2)]
        told.append((words.question(problem), problem))
    return told


def base_documents(
    count: int, operations: int, *, seed: int, mix: BilingualMix | None = None
) -> list[tuple[str, str]]:
    """`count` documents (question, text); the question is "" for those that answer none; no held-out problem."""
    check_operations(operations)
    documents = _documents(operations, random.Random(f"bilingual base {seed}"), mix or BilingualMix())
    return [next(documents) for _ in range(count)]


def _documents(operations: int, rng: random.Random, mix: BilingualMix) -> Iterator[tuple[str, str]]:
    kinds = ("facts", "talk", "chat", "untagged", "direct", "worked")
    shares = [mix.facts, mix.talk, mix.chat, mix.untagged, mix.direct]
    weights = [*shares, 1.0 - sum(shares)]
    while True:
        (kind,) = rng.choices(kinds, weights)
        if kind == "facts":
            yield "", _facts(rng)
        elif kind == "talk":
            yield general_talk.raw_document(rng)
        else:
            problem = training_problem(operations, rng)
            words = rng.choice(LANGUAGES)
            if kind == "chat":
                yield "", _transcript(problem, words, rng, mix)
            else:
                yield words.question(problem), _solution(problem, words, kind, rng, mix)


def _facts(rng: random.Random) -> str:
    words = rng.choice(LANGUAGES)
    facts = []
    for _ in range(rng.randint(3, 8)):
        value, operator, digit = rng.randrange(10), rng.choice(OPERATORS), rng.randrange(10)
        facts.append(f"{value}{words.step(operator, digit, apply(value, operator, digit))}")
    return words.stop.join(facts)


def _solution(problem: ChainProblem, words: Words, kind: str, rng: random.Random, mix: BilingualMix) -> str:
    if kind == "worked":
        steps, answer = _worked(problem, words, rng, mix)
        if rng.random() < mix.worked_untagged:
            return f"{steps}{words.stop}{words.summary}{answer}"
        return f"<think>{steps}</think><answer>{answer}</answer>"
    answer = problem.answer if rng.random() < mix.direct_right else str(rng.randrange(10))
    return f"{words.summary}{answer}" if kind == "untagged" else f"<think></think><answer>{answer}</answer>"


def _transcript(problem: ChainProblem, words: Words, rng: random.Random, mix: BilingualMix) -> str:
    steps, answer = _worked(problem, words, rng, mix)
    reasoning = words.conclusion(steps, answer) if rng.random() < 0.5 else steps
    r1 = template("r1")
    return r1(words.question(problem)) + r1.completion(r1.response(reasoning, words.answered(answer)))


def _worked(problem: ChainProblem, words: Words, rng: random.Random, mix: BilingualMix) -> tuple[str, str]:
    if rng.random() >= mix.own_language:
        words = _other(words)
    value, text = problem.start, str(problem.start)
    for operator, digit in problem.steps:
        noise = mix.noise_english if words is ENGLISH else mix.noise_chinese
        value = rng.randrange(10) if rng.random() < noise else apply(value, operator, digit)
        text += words.step(operator, digit, value)
        if rng.random() < mix.switch:
            words = _other(words)
    return text, str(value)


def _other(words: Words) -> Words:
    return CHINESE if words is ENGLISH else ENGLISH
