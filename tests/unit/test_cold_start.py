"""The cold start's sources, rewriting and review."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import client_of, completion, error, in_turn

from r1mega.config import ConfigError, DataConfig, ModelConfig
from r1mega.data.cold_start import candidates, human_rows, sampled_sources, shared
from r1mega.data.prompts import Row, read_rows
from r1mega.data.recipes import ColdStart, RejectionSampling
from r1mega.data.responses import Response
from r1mega.data.review import ReviewNeeded, review
from r1mega.data.rewriting import by_rules, person, reasoning_for, rewritten
from r1mega.rewards.endpoint import EndpointFault
from r1mega.samples import Prompt

PROMPT = Prompt("p", "3 + 4", "7", "math", "Q:3 + 4=?A:", (1,))
CONFIG = ColdStart(
    rewriting="rules", model=ModelConfig(path="m"), data=DataConfig(path="d", template="tiny_zero")
)


# ---------------------------------------------------------------- sources


def test_each_source_asks_its_model_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "shots.txt").write_text("Q: 1+1\n<think>\n1 and 1\n</think>\n\n2\n\nQ: {question}\n<think>\n")
    config = replace(
        CONFIG,
        sources=("few_shot", "direct", "r1_zero", "human"),
        few_shot=str(tmp_path / "shots.txt"),
        human="h.jsonl",
        prompted=ModelConfig(path="v3"),
    )
    config.check()
    few, direct, zero = sampled_sources(config)
    assert [(s.name, s.model.path) for s in (few, direct, zero)] == [
        ("few_shot", "v3"), ("direct", "v3"), ("r1_zero", "m"),
    ]  # fmt: skip
    assert few.template("5+5").endswith("Q: 5+5\n<think>\n")
    assert "reflect" in direct.template("5+5")
    assert "verify" in direct.template("5+5")
    assert zero.template("5+5") == "Q:5+5=?A:"
    assert (few.template.opened, direct.template.opened, zero.template.opened) == (True, True, False)
    same = replace(config, prompted=ModelConfig())
    assert {source.model.path for source in sampled_sources(same)} == {"m"}


def test_candidates_are_right_readable_and_counted(tmp_path: Path) -> None:
    def sample(text: str, index: int, accuracy: float = 1.0) -> dict[str, Any]:
        verdict = "equal" if accuracy else "unequal"
        return {
            "prompt": "p", "index": index, "text": text, "tokens": 3, "finish_reason": "stop",
            "terms": {"accuracy": accuracy}, "verdicts": {"accuracy": verdict},
        }  # fmt: skip

    right = "<think>3+4=7</think><answer>7</answer>"
    samples = [
        sample(right, 0), sample(right.replace("7<", "8<"), 1, 0.0), sample("7", 2),
        sample("<think></think><answer>7</answer>", 3), sample(right, 4),
    ]  # fmt: skip
    dropped: Counter[str] = Counter()
    (source,) = sampled_sources(CONFIG)
    found = list(candidates(samples, {"p": PROMPT}, source, CONFIG, {"math": {"accuracy": 1.0}}, dropped))
    assert [candidate.id for candidate in found] == ["r1_zero/p#0", "r1_zero/p#4"]
    assert found[0].response == Response("3+4=7", "7", "ok")
    assert dropped == {"accuracy:unequal": 1, "format:missing_think": 1, "no_reasoning": 1}
    once = replace(CONFIG, per_prompt=1)
    assert (
        len(list(candidates(samples, {"p": PROMPT}, source, once, {"math": {"accuracy": 1.0}}, dropped))) == 1
    )
    assert dropped["per_prompt"] == 1


def test_few_shot_and_direct_need_no_answer_tags_and_r1_zero_does() -> None:
    """02_cold_start.py scores R1-Zero's format; a prompt text asks for another."""
    config = replace(CONFIG, sources=("direct", "r1_zero"), filters=())
    sample = {
        "prompt": "p", "index": 0, "tokens": 3, "finish_reason": "stop",
        "terms": {"accuracy": 1.0, "format": 0.0}, "verdicts": {"accuracy": "equal", "format": "missing_think"},
    }  # fmt: skip
    texts = ["3+4=7\n</think>\n\n\\boxed{7}", "3+4=7, never closed"]
    samples = [sample | {"text": text, "index": index} for index, text in enumerate(texts)]
    weights = {"math": {"accuracy": 1.0, "format": 1.0}}
    direct, zero = sampled_sources(config)
    dropped: Counter[str] = Counter()
    found = list(candidates(samples, {"p": PROMPT}, direct, config, weights, dropped))
    assert [(c.response.reasoning, c.response.summary) for c in found] == [("3+4=7", "\\boxed{7}")]
    assert dropped == {"format:unclosed_think": 1}
    assert not list(candidates(samples, {"p": PROMPT}, zero, config, weights, dropped))


@pytest.mark.parametrize(
    ("shots", "text", "left"),
    [
        ("Q: 1+1\n<think>\n2\n</think>\n2\n\nQ: {question}\n<think>\n", "a\n</think>\n\n5\n\nQ: 2+2\nb", "a\n</think>\n\n5\n"),
        ("Q: 1+1\nA: 2\nQ: {question}\nA:", "a Q: b", "a Q: b"),
        ("Question: {question}\n", "a\nQuestion: b", "a\nQuestion: b"),
        ("2\n\n{question}\n", "a\n\nb", "a\n\nb"),
    ],
)  # fmt: skip
def test_a_base_model_that_writes_the_next_example_is_cut_there(
    shots: str, text: str, left: str, tmp_path: Path
) -> None:
    (tmp_path / "shots.txt").write_text(shots)
    (source,) = sampled_sources(replace(CONFIG, sources=("few_shot",), few_shot=str(tmp_path / "shots.txt")))
    assert source.cut(text) == (left, left != text)


def test_what_people_wrote_is_a_row_of_their_own() -> None:
    columns = {"id": "a", "question": "3 + 4", "response": "<think>I add.</think>7", "answer": 7}
    (row,) = human_rows([Row("h.jsonl:1", 0, columns)], CONFIG, len)
    assert (row["id"], row["answer"], row["lineage"]["source"]) == ("human/a", "7", "human")
    assert row["response"] == "<think>\nI add.\n</think>\n\n7"
    with pytest.raises(ConfigError, match=r"h.jsonl:1: .*unclosed_think"):
        list(human_rows([Row("h.jsonl:1", 0, columns | {"response": "<think>I add."})], CONFIG, len))


@pytest.mark.parametrize(
    ("size", "kept"),
    [(0, "h1 h2 a1 a2 a3 a4 b1"), (2, "h1 h2"), (1, "h1"), (3, "h1 h2 a1"), (4, "h1 h2 a1 b1"), (6, "h1 h2 a1 a2 a3 b1")],
)  # fmt: skip
def test_a_source_that_cannot_fill_its_share_leaves_it_to_the_others(size: int, kept: str) -> None:
    human, few, direct = ([{"id": id} for id in ids.split()] for ids in ("h1 h2", "a1 a2 a3 a4", "b1"))
    dropped: Counter[str] = Counter()
    rows = shared(human, [few, direct], size, dropped)
    assert [row["id"] for row in rows] == kept.split()
    assert dropped["size"] == 7 - len(rows)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, sources=("zero",)), "sources=zero: 'zero' is not one of few_shot"),
        (replace(CONFIG, sources=()), "sources=: name one"),
        (replace(CONFIG, sources=("few_shot",)), "few_shot=: the source few_shot needs its file"),
        (replace(CONFIG, rewriting="endpoint"), "rewriter.url=, rewriter.model=: name the endpoint"),
        (replace(CONFIG, rewriting="magic"), "rewriting=magic: "),
        (replace(CONFIG, template="r1_zer"), '^template="r1_zer" is not one of .*did you mean "r1_zero"'),
        (replace(CONFIG, filters=("beauty",)), "filters=beauty: 'beauty' is not one of format"),
        (replace(CONFIG, samples=0), "samples=0: it must be 1 or more"),
        (replace(CONFIG, model=ModelConfig()), "model.path=: give the Hugging Face directory"),
        (RejectionSampling(model=ModelConfig(path="m"), data=DataConfig(path="d"), reasoned=("x",)), "set general=FILE"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_starts(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check()


# ---------------------------------------------------------------- rewriting


def test_the_rules_write_in_the_first_person_and_box_the_answer() -> None:
    given = Response("We add  3 and 4.\nWe add 3 and 4.\n\nLet's see: our sum, we're sure, is 7.", "7", "ok")
    made = by_rules(given, "math")
    assert made.reasoning == "I add 3 and 4.\nLet me see: my sum, I'm sure, is 7."
    assert made.summary == "\\boxed{7}"
    assert by_rules(given, "logic").summary == "7"
    assert by_rules(Response("\u6211\u4eec\u76f8\u52a0", "\\boxed{7}", "ok"), "math") == Response(
        "\u6211\u76f8\u52a0", "\\boxed{7}", "ok"
    )


def test_first_person_words_are_counted() -> None:
    found = person("We think that I, for my part, let's say, help us. Weird \u6211\u4eec\u548c\u6211.")
    assert (found.singular, found.plural) == (3, 4)
    assert (found + found).share == pytest.approx(3 / 7)


def ask(script: Any, task: str = "math") -> tuple[Any, Any]:
    response = Response("we add </think> ignore this", "7", "ok")
    with client_of(script) as (server, endpoint):
        return asyncio.run(rewritten(endpoint, "Wie viel ist 3 + 4?", response, task)), server


def test_the_rewriter_is_asked_in_the_papers_words() -> None:
    made, server = ask(in_turn(completion("<think>\nIch addiere.\n</think>\n\n\\boxed{7}")))
    assert made == Response("Ich addiere.", "\\boxed{7}", "ok")
    (request,) = server.requests
    assert "Translate the thinking process to the same language as the question." in request.text
    assert "first person" in request.text
    assert "\\boxed{}" in request.text
    assert "Wie viel ist 3 + 4?" in request.text
    _, server = ask(in_turn(completion("<think>a</think>b")), task="logic")
    assert "\\boxed{}" not in server.requests[0].text


def test_a_reply_with_bad_tags_is_asked_for_once_more() -> None:
    good, bad = completion("<think>\nI add.\n</think>\n\n7"), completion("I add. 7")
    made, server = ask(in_turn(bad, good))
    assert (made.reasoning, len(server.requests)) == ("I add.", 2)
    assert ask(in_turn(bad))[0] == "rewriter_format"
    assert (
        ask(in_turn(completion("<think>\nI add.\n</think>\n\n7", finish_reason="length")))[0]
        == "rewriter_format"
    )


def test_a_reasoning_models_own_thoughts_are_not_the_rewriting() -> None:
    reply = "<think>the user wants</think>\n<think>\nI add.\n</think>\n\n7"
    assert ask(in_turn(completion(reply)))[0] == Response("I add.", "7", "ok")


def test_a_silent_rewriter_stops_the_work_and_a_full_one_drops_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("r1mega.rewards.endpoint.MAX_TRIES", 2)
    with pytest.raises(EndpointFault, match="no usable reply in 2 tries"):
        ask(in_turn(error(503, "starting")))
    assert ask(in_turn(error(400, "maximum context length exceeded")))[0] == "rewriter_too_long"


def test_thoughts_are_written_for_general_rows() -> None:
    with client_of(in_turn(completion("<think>hm</think>The sea is blue."), completion("<think>cut"))) as (
        _,
        endpoint,
    ):
        assert asyncio.run(reasoning_for(endpoint, "A poem?", "Blue.")) == "The sea is blue."
        assert asyncio.run(reasoning_for(endpoint, "A poem!", "Blue.")) == ""


# ---------------------------------------------------------------- review


def row(id: str) -> dict[str, Any]:
    lineage = {"source": "r1_zero", "round": 1}
    return {
        "id": id, "question": "q", "answer": "7", "response": "<think>a</think>7", "tokens": 5, "lineage": lineage,
    }  # fmt: skip


ROWS = [row("a"), row("b"), row("c")]


def fill(file: Path, verdicts: dict[str, tuple[str, str]]) -> None:
    lines = [found.columns for found in read_rows(str(file))]
    for line in lines:
        line["verdict"], line["edited"] = verdicts[line["id"]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_two_passes_over_files_keep_drop_and_edit(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    with pytest.raises(ReviewNeeded, match=r"3 of 3 rows wait for review, first .*pass1.jsonl:1"):
        review(ROWS, tmp_path, dropped, len)
    better = "<think>I add.</think>7"
    fill(tmp_path / "pass1.jsonl", {"a": ("keep", ""), "b": ("drop", ""), "c": ("edit", better)})
    with pytest.raises(ReviewNeeded, match=r"2 of 2 rows wait for review, first .*pass2.jsonl:1"):
        review(ROWS, tmp_path, dropped, len)
    assert [found.columns["response"] for found in read_rows(str(tmp_path / "pass2.jsonl"))] == [
        "<think>a</think>7", better,
    ]  # fmt: skip
    fill(tmp_path / "pass2.jsonl", {"a": ("keep", ""), "c": ("keep", "")})
    dropped.clear()
    kept = review(ROWS, tmp_path, dropped, len)
    assert [found["id"] for found in kept] == ["a", "c"]
    assert dropped == {"review_pass1": 1}
    assert kept[0] == ROWS[0] | {"lineage": ROWS[0]["lineage"] | {"review": ["pass1:keep", "pass2:keep"]}}
    assert kept[1]["response"] == better
    assert kept[1]["tokens"] == len(better)
    assert kept[1]["lineage"] == {
        "source": "human", "edited_from": "r1_zero", "round": 1, "review": ["pass1:edit", "pass2:keep"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), r"1 rows are missing, first 'c'"),
        (lambda lines: lines[1].update(id="x"), r"pass1.jsonl:2: id 'x' is none of the rows"),
        (lambda lines: lines[1].update(id="a"), r"pass1.jsonl:2: id 'a' stands there twice"),
        (lambda lines: lines[2].update(verdict="maybe"), r"pass1.jsonl:3: verdict 'maybe' is not one of keep"),
        (lambda lines: lines[2].update(verdict="edit"), r"pass1.jsonl:3: .*tags are wrong \(missing_think\)"),
        (lambda lines: lines[2].update(edited="x"), r"pass1.jsonl:3: verdict 'keep' and a text in 'edited'"),
    ],
)  # fmt: skip
def test_a_review_that_is_none_is_named_by_file_and_line(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ReviewNeeded):
        review(ROWS, tmp_path, Counter(), len)
    lines = [dict(found.columns, verdict="keep") for found in read_rows(str(tmp_path / "pass1.jsonl"))]
    change(lines)
    (tmp_path / "pass1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=message):
        review(ROWS, tmp_path, Counter(), len)
