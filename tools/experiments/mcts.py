"""Monte-Carlo tree search at inference on the toy chains: the second of R1's unsuccessful attempts.

    python tools/experiments/mcts.py runs/tiny_pipeline/base/hf --out runs/mcts [--labels outcome|steps]

R1 ("Unsuccessful Attempts", section 4.2 of the first preprint) searched in AlphaGo's way, guided by a value model. It
found that the search can help at inference, and that improving the model by its own search did not work: text spans a
far larger space than a board, so a node's children were capped and the search could stay in a local optimum; and the
value model, on which every choice rests, is hard to train. Only the search at inference is tried here.

A node is a prefix that ends after a worked step; its children are the different next steps among --width samples, with
their shares as priors. PUCT (AlphaZero) chooses; a node is worth what the scorer says, an ended response too, for there
is no reference answer at inference. The answer is the one whose ended nodes have most visits.

labels outcome: the value model learns whether the sample that a prefix is from ended right, V(prefix) under the policy.
labels steps: the rule labels of process_reward.py.

Baselines at the same budget of generated tokens: majority vote over whole samples, and the same vote weighted by the
scorer. What it showed: docs/failed_attempts.md.
"""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from command import command, on_cluster, parser
from process_reward import labelled_rows
from reranking import share
from search_tree import Node, answer_of, back_up, expand, select
from toy_steps import (
    PrefixScorer,
    policy,
    problem_of,
    questions,
    sample,
    sampled,
    tokens_in,
    train_scorer,
)

from r1mega.data.prompts import encode
from r1mega.rewards.math_answer import extract_answer
from r1mega.samples import Prompt, Rollout

FIRST_TOKENS, STEP_TOKENS = 6, 4
"""A step generates four tokens; the first also opens the thought and names the first digit."""
BUDGETS = (32, 64, 128, 256, 512)


# ---------------------------------------------------------------- search


async def search(
    engine: Any, scorer: PrefixScorer, prompts: Sequence[Prompt], options: Namespace
) -> tuple[dict[int, list[str | None]], dict[str, Any]]:
    """All questions' trees side by side, one simulation of each at a time; the answers at each budget."""
    roots = [Node("") for _ in prompts]
    spent = [0] * len(prompts)
    answers: dict[int, list[str | None]] = {budget: [None] * len(prompts) for budget in BUDGETS}
    rounds, stopped_early = 0, 0
    while active := [
        q for q in range(len(prompts)) if spent[q] < BUDGETS[-1] and rounds < options.simulations
    ]:
        rounds += 1
        paths = {q: select(roots[q], options.c) for q in active}
        leaves = {q: path for q, path in paths.items() if not path[-1].ended}
        grown = await _continuations(
            engine, {q: path[-1] for q, path in leaves.items()}, prompts, options, rounds
        )
        new: list[tuple[int, Node]] = []
        for q, path in leaves.items():
            cost = tokens_in({"": grown[q]})
            for budget in BUDGETS:  # what the tree knew before it could not pay for this expansion
                if spent[q] <= budget < spent[q] + cost:
                    answers[budget][q] = answer_of(roots[q])
            spent[q] += cost
            expand(path[-1], [(r.response_text, r.finish_reason == "stop") for r in grown[q]], len(path))
            new += [(q, child) for child in path[-1].children]
        scores = await scorer.score((prompts[q].question, child.text) for q, child in new)
        for (_, child), score in zip(new, scores, strict=True):
            child.value = score
        for q, path in paths.items():
            if path[-1].ended:
                back_up(path, path[-1].value)
            for child in path[-1].children if q in leaves else ():
                back_up([*path, child], child.value)
    for q in range(len(prompts)):
        for budget in BUDGETS:
            if spent[q] <= budget:
                answers[budget][q] = answer_of(roots[q])
        stopped_early += spent[q] < BUDGETS[-1]
    return answers, {"rounds": rounds, "below_the_last_budget": stopped_early}


async def _continuations(
    engine: Any, leaves: Mapping[int, Node], prompts: Sequence[Prompt], options: Namespace, number: int
) -> dict[int, list[Rollout]]:
    """`--width` samples of the next step of each leaf."""
    found: dict[int, list[Rollout]] = {}
    for first in (True, False):
        some = {q: node for q, node in leaves.items() if (not node.text) == first}
        ids = (
            encode([node.text for node in some.values()], engine.tokenizer, add_special_tokens=False)
            if some
            else []
        )
        asked = [
            replace(prompts[q], token_ids=prompts[q].token_ids + tail)
            for q, tail in zip(some, ids, strict=True)
        ]
        if asked:
            limit = FIRST_TOKENS if first else STEP_TOKENS
            steps = await sample(engine, asked, options.width, max_tokens=limit, step=1000 + number)
            found |= {q: steps[prompts[q].id] for q in some}
    return found


# ---------------------------------------------------------------- whole samples at the same budget


def votes_within(
    budget: int, group: Sequence[Rollout], values: Sequence[float]
) -> tuple[str | None, str | None]:
    """(majority, weighted by the scorer) over the first samples that fit into the budget."""
    plain: dict[str, float] = defaultdict(float)
    weighted: dict[str, float] = defaultdict(float)
    spent = 0
    for rollout, value in zip(group, values, strict=True):
        spent += len(rollout.response_ids)
        answer = extract_answer(rollout.response_text)
        if spent > budget:
            break
        if answer is not None:
            plain[answer] += 1
            weighted[answer] += value
    return tuple(max(v, key=lambda a: v[a]) if v else None for v in (plain, weighted))  # type: ignore[return-value]


def run(options: Namespace) -> dict[str, Any]:
    heldout = questions(options, options.questions, heldout=True)
    scorer, report = options.scorer, {}
    if scorer is None:
        train = questions(options, options.train_questions, heldout=False)
        rows = labelled_rows(
            train, asyncio.run(sampled(options, train, options.train_samples)), options.labels
        )
        scorer, report = train_scorer(rows, options, options.out), {"labels": len(rows)}
    return report | on_cluster(options, scorer, lambda: _compare(scorer, options, heldout))


async def _compare(path: Path, options: Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    engine = policy(options.model, options)
    scorer = await PrefixScorer.start(path, options)
    k = BUDGETS[-1] // 10
    samples = await sample(engine, prompts, k, step=1)
    pairs = [(p.question, r.response_text) for p in prompts for r in samples[p.id]]
    values = await scorer.score(pairs)
    sampled_tokens, scorer.tokens, scorer.seconds = scorer.tokens, 0, 0.0
    began = time.monotonic()
    found, report = await search(engine, scorer, prompts, options)
    report |= {
        "seconds": round(time.monotonic() - began, 1),
        "scored_tokens": scorer.tokens,
        "scored_tokens_of_the_vote": sampled_tokens,
        "tokens_per_sample": round(tokens_in(samples) / len(pairs), 2),
    }
    scorer.close()
    await engine.close()
    gold = [problem_of(prompt).answer for prompt in prompts]
    rows = []
    for budget in BUDGETS:
        voted = [
            votes_within(budget, samples[p.id], values[q * k : (q + 1) * k]) for q, p in enumerate(prompts)
        ]
        methods = {
            "mcts": found[budget],
            "vote": [v for v, _ in voted],
            "weighted_vote": [w for _, w in voted],
        }
        rows.append(
            {"budget": budget}
            | {
                name: share([float(a == g) for a, g in zip(given, gold, strict=True)], len(gold))
                | {"unanswered": given.count(None)}
                for name, given in methods.items()
            }
        )
    return {"search": report, "by_budget": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser(__doc__)
    parsed.add_argument(
        "--labels", choices=("outcome", "steps"), default="outcome", help="of the value model"
    )
    parsed.add_argument("--width", type=int, default=4, help="samples of a node's next step")
    parsed.add_argument("--simulations", type=int, default=96, help="of each question, at most")
    parsed.add_argument("--c", type=float, default=1.0, help="PUCT's weight of exploration")
    return command("mcts", run, parsed.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
