"""Preference pairs: candidate responses in, a judge's votes and a pair file out (R1 section 3.1).

Reads jsonl rows {"prompt", "responses": [...]} or {"prompt", "a", "b"} (with an optional "id") and leaves
  votes.jsonl   every vote: order, label, reply word for word, model, sampling, tokens, cost, time
  pairs.jsonl   {"prompt", "chosen", "rejected", ...}: what the reward model is trained on
Votes are appended to votes.partial.jsonl as pairs are finished; a run that was killed goes on from there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, RunConfig
from r1mega.data.preference_votes import (
    SAMPLING,
    VOTES,
    Kept,
    Pair,
    Vote,
    collect_votes,
    pair_row,
    pairs_of,
    select,
    unfit,
)
from r1mega.rewards.endpoint import Endpoint, EndpointFault
from r1mega.stages.console import Console
from r1mega.stages.interrupt import cancel_on_sigterm
from r1mega.stages.run_directory import RunDirectory, checksum

MAX_FAULTS = 16
MAX_FAULT_SHARE = 0.05
"""More votes lost to the endpoint than both, and the run stops: the same command goes on when it is back."""
NOTE_EVERY = 0.1
"""Share of the pairs between two lines of progress."""
Votes = dict[str, tuple[Vote, ...]]
"""Pair.id -> its votes."""


def run(config: RunConfig, directory: RunDirectory, console: Console) -> None:
    """Ask until every pair has its votes, resuming what an earlier run asked; leaves pairs.jsonl, results.json."""
    pairs = read_candidates(Path(config.data.path), reads=config.reward_model.reads, seed=config.seed)
    worth = [pair for pair in pairs if unfit(pair) is None]
    console.note(f"{len(pairs):,} pairs of responses, {len(worth):,} of them worth asking about")
    with Endpoint(config.judge) as endpoint:
        directory.begin()
        votes = asyncio.run(_ask_all(config, directory, console, endpoint, worth))
        asked = endpoint.metrics()
    kept, drops, facts = select(pairs, votes)
    write_lines(directory.path / "votes.jsonl", (asdict(v) for pair in worth for v in votes[pair.id]))
    lineage = _lineage(config)
    write_lines(directory.path / "pairs.jsonl", (pair_row(one) | {"lineage": lineage} for one in kept))
    partial_votes(directory).unlink(missing_ok=True)
    directory.add_results(
        finished=True,
        steps=config.num_steps,
        pairs=len(pairs),
        kept=len(kept),
        drops=dict(drops),
        facts=facts,
        tokens=round(facts["tokens"]),
        endpoint=asked,
    )
    _show(console, directory, len(pairs), kept, drops, facts)


def read_candidates(path: Path, *, reads: str, seed: int) -> list[Pair]:
    """Every pair of the file; raises ConfigError with the line of a row that is none."""
    pairs: list[Pair] = []
    ids: set[str] = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            id, prompt, responses = _row(line, f"{path}:{number}", default_id=str(number))
            if id in ids:
                raise ConfigError(f"{path}:{number}: a second row with id {id!r}; ids tell rows apart")
            ids.add(id)
            pairs += pairs_of(id, prompt, responses, reads=reads, seed=seed)
    if not pairs:
        raise ConfigError(f"{path}: no row with two responses")
    return pairs


def _row(line: str, where: str, default_id: str) -> tuple[str, str, list[str]]:
    wanted = '{"prompt": text, "responses": [text, text, ...]} or {"prompt": text, "a": text, "b": text}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}); a row is {wanted}") from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    responses = row.get("responses", [row.get("a"), row.get("b")]) if isinstance(row, dict) else None
    texts = isinstance(responses, list) and all(isinstance(text, str) for text in responses)
    if not isinstance(prompt, str) or not isinstance(responses, list) or not texts or len(responses) < 2:
        raise ConfigError(f"{where}: not a row of candidates; a row is {wanted}")
    id, prompt, *responses = (
        text.encode(errors="replace").decode()  # half a surrogate pair could not be written to a file
        for text in (str(row.get("id", default_id)), prompt, *responses)
    )
    return id, prompt, responses


def _lineage(config: RunConfig) -> dict[str, Any]:
    """Of every pair, as rows of other data have it; the row's id names the candidates' row."""
    return {
        "source": "preference_pairs",
        "candidates": checksum(Path(config.data.path)),
        "judge": f"{config.judge.model} at {config.judge.url}",
        "sampling": asdict(SAMPLING) | {"seed": config.seed, "votes": VOTES},
        "filters": ["lengths", "mean", "balance"],
    }


async def _ask_all(
    config: RunConfig, directory: RunDirectory, console: Console, endpoint: Endpoint, pairs: list[Pair]
) -> Votes:
    cancel_on_sigterm()
    votes = read_votes(partial_votes(directory), {pair.id for pair in pairs})
    waiting = [pair for pair in pairs if pair.id not in votes]
    if votes:
        console.note(f"resuming: {len(votes):,} pairs have their votes")
    console.phase(
        f"asking {config.judge.model} at {endpoint.url} about {len(waiting):,} pairs, {VOTES} votes each"
    )
    noted, faults = 0, 0
    write_lines(partial_votes(directory), (asdict(v) for each in votes.values() for v in each))
    with partial_votes(directory).open("a", encoding="utf-8") as file:
        answers = collect_votes(endpoint, waiting, seed=config.seed, in_flight=config.judge.concurrency)
        async with aclosing(answers):
            async for each in answers:
                votes[each[0].pair] = each
                file.write("".join(_line(asdict(vote)) for vote in each))
                file.flush()
                faults += sum(vote.verdict == "fault" for vote in each)
                _check_faults(faults, len(votes) * VOTES, each)
                console.progress("votes", len(votes), len(pairs))
                if len(votes) >= (noted + 1) * NOTE_EVERY * len(pairs):
                    noted = int(len(votes) / (NOTE_EVERY * len(pairs)))
                    cost = endpoint.metrics()["cost"]
                    console.note(
                        f"{len(votes):,} of {len(pairs):,} pairs, {faults} votes lost, cost {cost:.2f}"
                    )
    return votes


def _check_faults(faults: int, asked: int, latest: tuple[Vote, ...]) -> None:
    if faults > max(MAX_FAULTS, MAX_FAULT_SHARE * asked):
        words = next((vote.reply for vote in latest if vote.verdict == "fault"), "")
        raise EndpointFault(
            f"{faults} of {asked} votes were lost to the endpoint; the same command asks for them again. {words}"
        )


def partial_votes(directory: RunDirectory) -> Path:
    return directory.path / "votes.partial.jsonl"


def read_votes(path: Path, wanted: set[str]) -> Votes:
    """Votes of pairs that have all of theirs; those of a pair that lost one to the endpoint are asked for again."""
    votes: dict[str, list[Vote]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                vote = Vote(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the last line of a run that was killed while writing it
            votes.setdefault(vote.pair, []).append(vote)
    return {
        pair: tuple(sorted(each, key=lambda vote: vote.index))
        for pair, each in votes.items()
        if pair in wanted and len(each) == VOTES and all(vote.verdict != "fault" for vote in each)
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the jsonl file in one step."""
    partial = path.with_name(f".writing-{path.name}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, rows))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def summary(
    total: int, kept: list[Kept], drops: Counter[str], facts: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """(name, value) of each line that the run ends with."""
    yield "pairs kept", f"{len(kept):,} of {total:,}"
    for reason, count in drops.most_common():
        yield f"dropped, {reason}", f"{count:,} ({count / total:.1%})"
    yield "votes", f"{facts['votes']:,.0f} ({facts['unparsable']:.0f} unparsable, {facts['fault']:.0f} lost)"
    yield "first place is worth", f"{facts['first_place']:+.2f} (0: the judge does not mind the order)"
    yield (
        "longer response chosen",
        f"{facts['longer_share']:.1%} (before balancing {facts['longer_share_before']:.1%})",
    )
    yield "tokens, cost", f"{facts['tokens']:,.0f}, {facts['cost']:.4f}"


def _show(
    console: Console,
    directory: RunDirectory,
    total: int,
    kept: list[Kept],
    drops: Counter[str],
    facts: dict[str, float],
) -> None:
    console.line()
    for name, value in summary(total, kept, drops, facts):
        console.result(name, value)
    console.result("pairs", directory.path / "pairs.jsonl")
    console.result("votes", directory.path / "votes.jsonl")
