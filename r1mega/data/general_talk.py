"""Small talk of the toy world: greetings, and how-to questions with good, rude, repeated and dangerous answers.

The vocabulary and the rules of what is good are those of generated_preferences.py, on which the toy's reward models are
trained: helpful is polite and says nothing twice, safe gives no secret away.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.data.generated_preferences import (
    GOOD,
    RUDE,
    SECRETS,
    SENTENCES,
    held_out_questions,
    how_to_question,
)

GREETINGS = {
    "hello": "Hello! How do I help?",
    "Who are you?": "I am a small model.",
    "thanks": "Take your time.",
}
"""Simple queries: answered without reasoning (R1, B.3.3)."""


@dataclass(frozen=True)
class Talk:
    question: str
    reasoning: str
    """Empty for a simple query."""
    answer: str


def raw_document(rng: random.Random) -> tuple[str, str]:
    """(question, answer) as the base model's web has them: no reasoning, of any quality."""
    if rng.random() < 0.1:
        question = rng.choice(list(GREETINGS))
        return question, GREETINGS[question] if rng.random() < 0.5 else rng.choice(RUDE)
    sentences = rng.choices(GOOD + RUDE, k=SENTENCES)
    if rng.random() < 0.2:
        sentences[rng.randrange(SENTENCES)] = rng.choice(SECRETS)
    return how_to_question(rng, heldout=False), " ".join(sentences)


def good_talk(rng: random.Random, *, heldout: bool) -> Talk:
    """As a strong instruct model would answer."""
    if rng.random() < 0.15:
        question = rng.choice(list(GREETINGS))
        return Talk(question, "", GREETINGS[question])
    question = how_to_question(rng, heldout=heldout)
    return Talk(question, "I work slowly.", " ".join(rng.sample(GOOD, SENTENCES)))


def checked_questions() -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Every held-out how-to question, with what a good answer obeys, as instructions (rewards/instructions.py): enough
    sentences, none twice, no word of a rude remark or a secret."""
    forbidden = sorted({re.findall("[a-z]+", text)[-1] for text in RUDE} | {"code", "key", "pin"})
    rules: list[tuple[str, dict[str, Any]]] = [
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": SENTENCES}),
        ("keywords:forbidden_words", {"forbidden_words": forbidden}),
    ]
    for sentence in GOOD:
        once = {"keyword": re.escape(sentence), "relation": "less than", "frequency": 2}
        rules.append(("keywords:frequency", once))
    return [(question, rules) for question in held_out_questions()]


def rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """General rows for fine-tuning: writing with a chain of thought, simple queries without."""
    rng = random.Random(f"general rows {seed}")
    found = []
    for number in range(count):
        talk = good_talk(rng, heldout=False)
        row = {"id": f"talk:{number}", "question": talk.question, "response": talk.answer, "task": "general"}
        found.append(row | ({"reasoning": talk.reasoning} if talk.reasoning else {}))
    return found


def main() -> None:
    """python -m r1mega.data.general_talk FILE COUNT [SEED]: write general rows as jsonl."""
    file, count, seed = (*sys.argv[1:], "1")[:3]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(int(count), seed=int(seed))]
    Path(file).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
