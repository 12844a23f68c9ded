"""A search tree over reasoning steps: a node is a prefix of a response, chosen by PUCT (AlphaZero)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from toy_steps import STEP

from r1mega.rewards.math_answer import extract_answer

MAX_DEPTH = 8
"""Steps after which a response counts as ended."""


@dataclass
class Node:
    text: str
    """The response so far."""
    prior: float = 1.0
    ended: bool = False
    visits: int = 0
    total: float = 0.0
    """Sum of the values backed up through it."""
    value: float = 0.5
    """The scorer's."""
    children: list[Node] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return self.total / self.visits if self.visits else 0.0


def puct(parent: Node, child: Node, c: float) -> float:
    """Q + c P sqrt(N) / (1 + n), as in AlphaZero."""
    return child.mean + c * child.prior * math.sqrt(parent.visits) / (1 + child.visits)


def select(root: Node, c: float) -> list[Node]:
    """The path from the root to a node without children."""
    path = [root]
    while path[-1].children:
        parent = path[-1]
        path.append(max(parent.children, key=lambda child: puct(parent, child, c)))
    return path


def back_up(path: Sequence[Node], value: float) -> None:
    for node in path:
        node.visits += 1
        node.total += value


def next_step(text: str, added: str, stopped: bool) -> tuple[str, bool]:
    """What a sampled continuation adds up to the end of its first worked step; whether the response ends with it."""
    border = len(text)
    ends = [match.end() for match in STEP.finditer(text + added) if match.end() > border]
    if ends:
        return text + added[: ends[0] - border], False
    whole = text + added
    return whole, stopped or "</answer>" in whole


def expand(node: Node, continuations: Sequence[tuple[str, bool]], depth: int) -> None:
    """Children: the different next steps, each with its share of the samples as prior."""
    counts = Counter(next_step(node.text, added, stopped) for added, stopped in continuations)
    for (text, ended), count in counts.items():
        node.children.append(Node(text, count / len(continuations), ended or depth >= MAX_DEPTH))


def answer_of(root: Node) -> str | None:
    """The answer with most visits among ended nodes, then with most value; None where none has ended."""
    votes: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    waiting = [root]
    while waiting:
        node = waiting.pop()
        waiting += node.children
        answer = extract_answer(node.text) if node.ended else None
        if answer is not None:
            visits, value = votes[answer]
            votes[answer] = (visits + node.visits, value + node.value)
    return max(votes, key=lambda answer: votes[answer]) if votes else None
