"""A toy preference task for the tiny models, with rules that are known: so that a fresh clone can train a reward
model without any file, and a test can tell whether one has learnt them.

Helpful pairs: the better summary is the one with fewer faults, a fault being a rude remark or a sentence said
twice; both have about the same length. The reasoning before it is drawn independently and full of rude remarks, so
a model that reads the reasoning is misled. Labelled responses: unsafe where the reasoning or the summary gives a
secret away; half of the unsafe ones do it in the reasoning alone. Questions that are held out never train.
"""

from __future__ import annotations

import random
from typing import Any

VERBS = (
    "boil", "bake", "fry", "paint", "clean", "mend", "move", "wash", "weigh", "wrap", "fold",
    "sort", "count", "lift", "store",
)  # fmt: skip
THINGS = (
    "rice", "eggs", "bread", "chairs", "lamps", "boots", "coats", "plates", "stones", "books",
    "pans", "shells", "roots", "toys", "nets", "bells",
)  # fmt: skip
GOOD = (
    "Take your time.",
    "Start with a few.",
    "Use warm water.",
    "Keep it dry.",
    "Ask a friend.",
    "Work slowly.",
    "Two hands help.",
    "Check it twice.",
)
RUDE = ("That is dumb.", "Who cares.", "Go away.", "You fool.")
SECRETS = ("The code is 77.", "The key is 42.", "The pin is 90.")
SENTENCES = 3
"""In a summary."""


def pair_rows(count: int, *, seed: int, heldout: bool) -> list[dict[str, Any]]:
    """`count` rows with prompt, chosen and rejected; a function of its arguments alone."""
    rng = random.Random(f"preference pairs {seed} {heldout}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        question = how_to_question(rng, heldout=heldout)
        faults, summaries = zip(*(_summary(rng) for _ in range(2)), strict=True)
        if faults[0] == faults[1]:
            continue
        better = 0 if faults[0] < faults[1] else 1
        texts = [f"<think>{_thought(rng)}</think>{summary}" for summary in summaries]
        rows.append({"prompt": question, "chosen": texts[better], "rejected": texts[1 - better]})
    return rows


def labelled_rows(count: int, *, seed: int, heldout: bool) -> list[dict[str, Any]]:
    """`count` rows with prompt, response and safe, about as many safe as unsafe."""
    rng = random.Random(f"labelled responses {seed} {heldout}")
    rows = []
    for _ in range(count):
        thought, summary = rng.sample(GOOD, SENTENCES), rng.sample(GOOD, SENTENCES)
        safe = rng.random() < 0.5
        if not safe:
            rng.choice((thought, summary))[rng.randrange(SENTENCES)] = rng.choice(SECRETS)
        response = f"<think>{' '.join(thought)}</think>{' '.join(summary)}"
        rows.append({"prompt": how_to_question(rng, heldout=heldout), "response": response, "safe": safe})
    return rows


def how_to_question(rng: random.Random, *, heldout: bool) -> str:
    """Of the verb-thing combinations every fifth is held out."""
    while True:
        verb, thing = rng.randrange(len(VERBS)), rng.randrange(len(THINGS))
        if _is_held_out(verb, thing) == heldout:
            return _question(verb, thing)


def held_out_questions() -> list[str]:
    return [
        _question(verb, thing)
        for verb in range(len(VERBS))
        for thing in range(len(THINGS))
        if _is_held_out(verb, thing)
    ]


def _is_held_out(verb: int, thing: int) -> bool:
    return (verb + thing) % 5 == 0


def _question(verb: int, thing: int) -> str:
    return f"How do I {VERBS[verb]} {THINGS[thing]}?"


def _summary(rng: random.Random) -> tuple[int, str]:
    """(number of faults, text)."""
    sentences = rng.sample(GOOD, SENTENCES)
    faults = rng.randrange(SENTENCES)
    for place in rng.sample(range(1, SENTENCES), faults):
        sentences[place] = rng.choice((rng.choice(RUDE), sentences[0]))
    return faults, " ".join(sentences)


def _thought(rng: random.Random) -> str:
    return " ".join(rng.choice(GOOD + RUDE) for _ in range(2))
