"""Reading preferences: formats, what a reward model may see, what is dropped, and packing of whole texts."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sft_rows import chat_tokenizer

from r1mega.config import (
    ConfigError,
    DataConfig,
    RewardConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from r1mega.data.chat import template
from r1mega.data.generated_preferences import RUDE, SECRETS, labelled_rows, pair_rows
from r1mega.data.preferences import Encoder, part_read, question_of, read_preferences
from r1mega.data.score_packing import pack_preferences, pack_whole
from r1mega.overrides import load
from r1mega.rewards.scoring import Scorer
from r1mega.samples import Prompt, Reward, Rollout

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("R1MEGA_SHARED", ROOT.parent / "shared"))
EOS = 1
PAIRWISE, POINTWISE = RewardModelConfig(), RewardModelConfig(objective="pointwise", reads="response")


class Characters:
    """A tokenizer whose ids are code points above 10."""

    eos_token_id = EOS

    def __call__(self, texts: list[str], add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) + 10 for c in text] for text in texts]}


def decode(ids: tuple[int, ...]) -> str:
    assert ids[-1] == EOS
    return "".join(chr(i - 10) for i in ids[:-1])


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(path: str, kind: RewardModelConfig = PAIRWISE, max_length: int = 500, **fields: Any):
    data = DataConfig(path=path, **{"template": "tiny_zero", "eval_size": 1, **fields})
    return read_preferences(data, kind, Characters(), seed=1, max_length=max_length)


def pair(number: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": "yes", "rejected": "no"} | changes


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("response", "summary"),
    [
        ("plain answer", "plain answer"),
        ("<think>hm</think>\n\nanswer ", "answer"),
        ("hm</think>answer", "answer"),  # the template opened the block
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>never ends", None),
        ("<think>a</think>b<think>again open", None),
        ("<think>a</think>  \n", None),
        ("", None),
    ],
)
def test_the_summary_is_what_follows_the_last_thought(response, summary):
    assert part_read(response, "summary") == summary


def test_a_model_of_the_whole_response_sees_the_reasoning():
    assert part_read("<think>hm</think>answer", "response") == "<think>hm</think>answer"
    assert part_read(" \n", "response") is None


def test_a_text_is_the_question_in_its_template_the_part_read_and_the_end():
    ids = Encoder(Characters(), "tiny_zero", "summary")("1+1", "<think>hm</think> 2")
    assert ids is not None
    assert decode(ids) == "Q:1+1=?A:2"


@pytest.mark.parametrize("reads", ["summary", "response"])
@pytest.mark.parametrize("name", ["r1", "r1_zero"])
def test_a_reward_model_reads_the_same_tokens_in_training_as_in_rl(name, reads, tmp_path):
    """Rows hold whole responses; a policy writes what its template has not opened."""
    tokenizer, shape = chat_tokenizer(), template(name)
    written = [
        shape.response("I ask", "please"),
        "<think>\nI ask</think>please",
        "<think>\nnever done",
        shape.response("", "at once") if shape.opened else "at once",
    ]
    rows = [{"prompt": f" why {n}?", "response": text, "safe": True} for n, text in enumerate(written)]
    path = write(tmp_path / "labels.jsonl", [*rows, {"prompt": "held", "response": "out", "safe": True}])
    kind, data = RewardModelConfig("pointwise", reads), DataConfig(path=path, template=name, eval_size=1)
    trained = {
        item.id: item.sequences[0]
        for item in read_preferences(data, kind, tokenizer, seed=1, max_length=999).train
    }

    class Asked(Lengths):
        async def call(self, method: str, sequences: list[tuple[int, ...]]) -> list[list[float]]:
            self.sequences = sequences
            return await super().call(method, sequences)

    from r1mega.stages.reward_server import RewardClient

    async def in_rl(rollout: Rollout, model: Any) -> Reward:
        async with Scorer(RewardConfig(weights={"safety": 1.0}), models={"safety": model}) as scorer:
            return await scorer.score(rollout)

    for number, row in enumerate(rows):
        group = Asked()
        model = RewardClient(group, Encoder(tokenizer, name, reads), 999)  # type: ignore[arg-type]
        prompt = Prompt("p", row["prompt"], "", "safety", shape(row["prompt"]), (1,))
        rollout = Rollout(prompt, 0, (), (), shape.completion(row["response"]), "stop", 0)
        reward = asyncio.run(in_rl(rollout, model))
        ids = trained.get(f"labels.jsonl:{number + 1}")
        if reads == "summary" and number == 2:
            assert (ids, reward.total, reward.verdicts) == (None, 0.0, {"safety": "no_summary"})
            continue
        assert group.sequences == [ids]
        assert ids.count(tokenizer.bos_token_id) == 1
        thoughts = tokenizer.decode(ids).split("why")[1].count("<think>")
        assert thoughts == (shape.opened or (reads == "response" and number < 3))


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = Characters()
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        Encoder(tokenizer, "plain", "summary")


# ---------------------------------------------------------------- formats


def test_every_format_of_a_pair_reads_alike(tmp_path):
    user, better, worse = (
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "because"},
        {"role": "assistant", "content": "dunno"},
    )
    rows = [
        {"prompt": "why?", "chosen": "because", "rejected": "dunno"},
        {"prompt": [user], "chosen": "because", "rejected": "dunno"},
        {"prompt": [user], "chosen": [better], "rejected": [worse]},
        {"chosen": [user, better], "rejected": [user, worse]},
        {
            "chosen": "\n\nHuman: why?\n\nAssistant: because",
            "rejected": "\n\nHuman: why?\n\nAssistant: dunno",
        },
    ]
    for row in rows:
        (example,) = read(write(tmp_path / "a.jsonl", [row, pair(9)])).train
        assert [decode(ids) for ids in example.sequences] == ["Q:why?=?A:because", "Q:why?=?A:dunno"]


def test_a_longer_talk_keeps_its_turns_apart(tmp_path):
    text = "\n\nHuman: a?\n\nAssistant: b\nmore\n\nHuman: c?\n\nAssistant: {}"
    row = {"chosen": text.format("good"), "rejected": text.format("bad")}
    (example,) = read(write(tmp_path / "a.jsonl.gz", [row, pair(9)])).train
    talk = "User: a?\n\nAssistant: b\nmore\n\nUser: c?"
    assert [decode(ids) for ids in example.sequences] == [f"Q:{talk}=?A:good", f"Q:{talk}=?A:bad"]
    assert question_of([("user", " only one ")]) == "only one"


def test_labelled_responses_carry_their_label(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response": "<think>t</think>r", "safe": i % 2 == 0, "votes": [1]}
        for i in range(4)
    ]
    result = read(write(tmp_path / "a.jsonl", rows), POINTWISE)
    assert [(decode(e.sequences[0]), e.label) for e in result.train] == [
        ("Q:q0=?A:<think>t</think>r", 1.0),
        ("Q:q1=?A:<think>t</think>r", 0.0),
        ("Q:q2=?A:<think>t</think>r", 1.0),
    ]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, PAIRWISE, "no column 'rejected'"),
        ({"chosen": "c", "rejected": "r"}, PAIRWISE, "no column 'prompt'"),
        ({"prompt": 5, "chosen": "c", "rejected": "r"}, PAIRWISE, "'prompt' is neither a text nor a list"),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, PAIRWISE, "'chosen' is 'None'"),
        (pair(1), POINTWISE, "tools/label_pairs.py"),
        ({"prompt": "p", "response": "r", "safe": "yes"}, POINTWISE, "'safe' is 'yes', not true or false"),
    ],
)
def test_a_row_that_is_no_example_is_refused_by_line(row, kind, message, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(0), row] if kind is PAIRWISE else [row, row])
    with pytest.raises(ConfigError, match=message) as error:
        read(path, kind)
    assert f"{path}:" in str(error.value)


def test_what_is_dropped_is_counted_by_reason(tmp_path):
    rows = [
        pair(0),
        pair(1, chosen="x" * 600),
        pair(2, chosen="<think>only thought"),
        pair(3, chosen="<think>a</think>same", rejected="<think>b</think> same"),
        pair(4, rejected="  "),
        pair(9),  # the held-out question
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: other\n\nAssistant: c"},
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
        pair(9, chosen="held out"),
    ]
    result = read(write(tmp_path / "a.jsonl", rows))
    assert (len(result.train), len(result.heldout)) == (1, 1)
    assert result.dropped == Counter(
        {
            "longer than sft.max_length": 1,
            "without a text to read": 1,
            "with identical responses": 1,
            "with an empty response": 1,
            "with a held-out prompt": 1,
            "with two different prompts": 1,
            "that do not end with the assistant": 1,
        }
    )


def test_a_held_out_file_is_used_and_an_empty_side_is_refused(tmp_path):
    train, heldout = (
        write(tmp_path / name, [pair(i), pair(i + 1)]) for i, name in ((0, "a.jsonl"), (5, "b.jsonl"))
    )
    result = read(train, eval_path=heldout, eval_size=0)
    assert (len(result.train), len(result.heldout)) == (2, 2)
    with pytest.raises(ConfigError, match=r"data\.eval_size=2 of 2 rows"):
        read(train, eval_size=2)
    with pytest.raises(ConfigError, match="no training example is left"):
        read(train, eval_path=heldout, max_length=5)
    with pytest.raises(ConfigError, match="the generated ones are generated:preferences"):
        read("generated:nothing")


# ---------------------------------------------------------------- generated and real data


def test_the_toy_pairs_follow_their_rule_and_hold_questions_out():
    train, heldout = (pair_rows(300, seed=1, heldout=side) for side in (False, True))
    assert train == pair_rows(300, seed=1, heldout=False)
    assert train != pair_rows(300, seed=2, heldout=False)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}

    def faults(response: str) -> int:
        sentences = (part_read(response, "summary") or "").split(". ")
        return 3 - len({s.rstrip(".") + "." for s in sentences} - set(RUDE))

    assert all(faults(row["chosen"]) < faults(row["rejected"]) for row in train + heldout)


def test_the_toy_labels_follow_their_rule_and_need_the_reasoning():
    rows = labelled_rows(400, seed=1, heldout=False)
    unsafe = [row["response"] for row in rows if not row["safe"]]
    assert 150 < len(unsafe) < 250
    assert all(any(secret in row["response"] for secret in SECRETS) != row["safe"] for row in rows)
    hidden = [r for r in unsafe if not any(s in (part_read(r, "summary") or "") for s in SECRETS)]
    assert 0.3 < len(hidden) / len(unsafe) < 0.7


def test_hh_rlhf_reads():
    path = SHARED / "data" / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is missing (R1MEGA_SHARED)")
    result = read(str(path), max_length=100_000, eval_size=500)
    assert len(result.train) + len(result.heldout) + sum(result.dropped.values()) == 2312
    assert sum(result.dropped.values()) < 120
    assert all("\n\nHuman:" not in decode(ids)[-200:] for e in result.train[:200] for ids in e.sequences)


def test_pairs_become_labels_only_by_the_tool(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [pair(i, judge="kept elsewhere") for i in range(3)])
    labels = tmp_path / "labels.jsonl"
    subprocess.run(
        [sys.executable, "tools/label_pairs.py", pairs, str(labels)], cwd=ROOT, check=True, env=_environment()
    )
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    assert [(row["response"], row["safe"], row["source"]["side"]) for row in rows[:2]] == [
        ("yes", True, "chosen"),
        ("no", False, "rejected"),
    ]
    assert len(read(str(labels), POINTWISE, eval_size=2).heldout) == 2


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


# ---------------------------------------------------------------- packing


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
)
def test_packing_keeps_pairs_together_and_marks_every_last_token(lengths, num_ranks, align):
    examples = [[list(range(100, 100 + a)), list(range(500, 500 + b))] for a, b in lengths]
    ranks = pack_whole(examples, num_ranks, tokens_per_chunk=48, align=align)
    assert len({len(chunks) for chunks in ranks}) == 1
    seen = []
    for chunk in (chunk for chunks in ranks for chunk in chunks):
        assert len(chunk.tokens_T) % align == 0
        bounds = chunk.cu_seqlens_S.tolist()
        texts = [chunk.tokens_T[a:b].tolist() for a, b in pairwise(bounds)]
        real = texts[:-1] if chunk.num_padding else texts
        assert real == [text for i in chunk.members for text in examples[i]]
        marked = chunk.loss_mask_T.nonzero().flatten().tolist()
        assert marked == [bound - 1 for bound in bounds[1 : len(real) + 1]]
        torch.testing.assert_close(chunk.token_weights_T, chunk.loss_mask_T / len(examples))
        seen += chunk.members
    assert sorted(seen) == list(range(len(examples)))


def test_labels_follow_their_responses_into_the_chunks():
    examples = [[[i] * (i + 1)] for i in range(7)]
    labels = [float(i % 2) for i in range(7)]
    for chunk in (c for chunks in pack_preferences(examples, labels, 2, 10) for c in chunks):
        firsts = chunk.packed.tokens_T[chunk.packed.loss_mask_T > 0]
        assert chunk.labels_N is not None
        assert chunk.labels_N.tolist() == [float(i % 2) for i in firsts.tolist()]


@pytest.mark.parametrize("examples", [[], [[[1], []]], [[[1] * 6, [1] * 6]]])
def test_nothing_empty_texts_and_pairs_longer_than_a_chunk_are_refused(examples):
    with pytest.raises(ValueError, match=r"\d"):
        pack_whole(examples, 1, tokens_per_chunk=10)


# ---------------------------------------------------------------- the client


class Lengths:
    """A group of one rank whose scores are lengths; it fails on a sequence that ends in 13."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    async def call(self, method: str, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        assert method == "score"
        self.batches.append(sum(map(len, sequences)))
        await asyncio.sleep(0.001)
        if any(ids[-2] == 13 + 10 for ids in sequences):
            raise RuntimeError("worker died")
        return [[float(len(ids)) for ids in sequences]]


def client(group: Lengths, tokens: int = 100) -> Any:
    from r1mega.stages.reward_server import RewardClient

    return RewardClient(group, Encoder(Characters(), "plain", "summary"), tokens)  # type: ignore[arg-type]


def test_coroutines_get_their_own_scores_in_few_batches():
    async def ask() -> list[float | None]:
        return await asyncio.gather(*(scorer.score("q", "x" * n) for n in range(30)))

    group = Lengths()
    scorer = client(group)
    assert asyncio.run(ask()) == [None, *(float(n + 2) for n in range(1, 30))]
    assert max(group.batches) <= 100
    assert len(group.batches) <= 7


def test_a_text_over_the_budget_is_scored_alone():
    group = Lengths()
    assert asyncio.run(client(group, tokens=5).score("q", "x" * 50)) == 52.0


def test_a_failing_server_fails_the_calls_that_waited_and_no_others():
    async def ask() -> list[Any]:
        bad = [scorer.score("q", "abc\r"), scorer.score("q", "ab\x0dZ")]
        first = await asyncio.gather(*bad, return_exceptions=True)
        return [*first, await scorer.score("q", "later")]

    group = Lengths()
    scorer = client(group)
    scorer._encode = lambda _, response: (*(ord(c) + 10 for c in response), EOS)
    first, second, later = asyncio.run(ask())
    assert isinstance(first, RuntimeError)
    assert isinstance(second, RuntimeError)
    assert later == 6.0


def test_a_cancelled_caller_does_not_hold_the_others_up():
    async def ask() -> float | None:
        cancelled = asyncio.create_task(scorer.score("q", "x"))
        other = asyncio.create_task(scorer.score("q", "xyz"))
        await asyncio.sleep(0)
        cancelled.cancel()
        return await other

    scorer = client(Lengths())
    assert asyncio.run(ask()) == 5.0


# ---------------------------------------------------------------- the stage's own checks


def test_steps_are_epochs_over_the_training_examples_and_every_epoch_has_each_once():
    from r1mega.stages.supervised import batches, with_steps

    config = with_steps(RunConfig(sft=SFTConfig(batch_size=4, num_epochs=2)), 12, "pairs")
    assert config.num_steps == 6
    assert with_steps(replace(config, num_steps=5), 12, "pairs").num_steps == 5
    seen = list(batches(range(12), config, first_step=0))
    assert sorted(item for batch in seen[:3] for item in batch) == list(range(12))
    assert list(batches(range(12), config, first_step=4)) == seen[4:]
    with pytest.raises(ConfigError, match="more than the 3 pairs"):
        with_steps(config, 3, "pairs")


# ---------------------------------------------------------------- the recipes


@pytest.mark.parametrize(
    ("name", "objective", "reads"),
    [("08_reward_helpful", "pairwise", "summary"), ("08_reward_safety", "pointwise", "response")],
)
def test_the_recipes_have_the_values_of_the_paper(name, objective, reads):
    """R1 section 3.1: batch 256, learning rate 6e-6, one epoch, at most 8,192 tokens, for both models."""
    config = load(ROOT / "configs" / "r1" / f"{name}.py")
    assert (config.reward_model.objective, config.reward_model.reads) == (objective, reads)
    assert (config.sft.batch_size, config.sft.max_length, config.sft.num_epochs) == (256, 8192, 1)
    assert (config.optimizer.lr, config.num_steps, config.stage) == (6e-6, 0, "reward_model")
    assert config.parallel.tokens_per_chunk >= 2 * config.sft.max_length
