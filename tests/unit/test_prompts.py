"""Reading data: known formats, held-out rows, plain errors, streams that resume, documents with masks."""

from __future__ import annotations

import gzip
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoConfig, AutoTokenizer

from r1mega.config import ConfigError, DataConfig
from r1mega.data.chat import TEMPLATES, template
from r1mega.data.documents import read_documents
from r1mega.data.prompts import PromptStream, final_answer, read_prompts
from r1mega.samples import Prompt

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("R1MEGA_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "configs/tiny/model")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is {i}?", "answer": f"it is clear.\n#### {i}"} for i in range(count)]


# ---------------------------------------------------------------- tokenizer and templates


@pytest.mark.parametrize("name", ["model", "model_mtp"])
def test_the_tiny_tokenizer_goes_there_and_back(name: str) -> None:
    directory = ROOT / "configs/tiny" / name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    assert len(tokenizer) == config.vocab_size == 128
    assert (config.num_nextn_predict_layers == 1) == (name == "model_mtp")
    text = "Q:3+4*2-9=?A:<think>3+4=7; it |\n</think><answer>5</answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert len(tokenizer(tag)["input_ids"]) == 1
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_the_r1_zero_template_is_the_papers_paragraph() -> None:
    text = TEMPLATES["r1_zero"]("What is {question}?")
    assert text == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is {question}?. Assistant:"
    )
    assert TEMPLATES["tiny_zero"]("3+4") == "Q:3+4=?A:"


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'data.template="r1zero".*did you mean "r1_zero"'):
        template("r1zero")


# ---------------------------------------------------------------- formats


def test_gsm8k_and_math_columns_are_found_by_themselves(tmp_path: Path, tokenizer: Any) -> None:
    rows: dict[str, list[Any]] = {
        "gsm8k": [{"question": "q", "answer": "6 * 3 = 18\n#### 18"}],
        "math": [{"problem": "q", "answer": "\\frac{1}{2}", "difficulty": 3.0}],
        "solutions": [
            {"problem": "q", "solution": "so $\\boxed{\\frac{1}{2}}$ it is \\boxed{\\frac{3}{4}}."}
        ],
    }
    wanted = {"gsm8k": "18", "math": "\\frac{1}{2}", "solutions": "\\frac{3}{4}"}
    for name, items in rows.items():
        data = DataConfig(path=write(tmp_path / f"{name}.jsonl", items), eval_size=0)
        (prompt,) = read_prompts(data, tokenizer, seed=1).train
        assert prompt.answer == wanted[name]
        assert prompt.id == f"{name}.jsonl:0"
        assert prompt.task == "math"
        assert prompt.text == TEMPLATES["r1_zero"]("q")
        assert list(prompt.token_ids) == tokenizer(prompt.text)["input_ids"]


def test_all_file_kinds_hold_the_same_prompts(tmp_path: Path, tokenizer: Any) -> None:
    rows = questions(20)
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    seen = []
    for name in ("a.jsonl", "a.json", "lines.json", "a.jsonl.gz", "a.parquet"):
        prompts = read_prompts(DataConfig(path=str(tmp_path / name), eval_size=5), tokenizer, seed=1)
        seen.append([(p.question, p.answer) for p in prompts.train + prompts.heldout])
    assert all(s == seen[0] for s in seen)
    assert len(seen[0]) == 20


def test_configured_columns_win(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": "no", "answer": "no", "frage": "yes", "zahl": 7}])
    data = DataConfig(path=path, question_field="frage", answer_field="zahl", eval_size=0)
    (prompt,) = read_prompts(data, tokenizer, seed=1).train
    assert (prompt.question, prompt.answer) == ("yes", "7")


@pytest.mark.skipif(not (SHARED / "data/gsm8k").exists(), reason=f"no shared data at {SHARED}")
def test_the_published_files_are_read_whole(tokenizer: Any) -> None:
    for path, count in (
        (SHARED / "data/gsm8k/test.jsonl", 1319),
        (SHARED / "data/math/math500.jsonl", 500),
        (SHARED / "data/math/aime2024.jsonl", 30),
    ):
        prompts = read_prompts(
            DataConfig(path=str(path), eval_size=10, max_prompt_tokens=10**6), tokenizer, seed=1
        )
        assert len(prompts.train) + len(prompts.heldout) + prompts.duplicates == count


# ---------------------------------------------------------------- splits


def test_the_last_rows_are_held_out_and_their_questions_leave_training(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = questions(30)
    rows[3] = {"question": " what  is 29?", "answer": "#### 29"}  # repeats the last row but for spaces
    data = DataConfig(path=write(tmp_path / "x.jsonl", rows), eval_size=10)
    prompts = read_prompts(data, tokenizer, seed=1)
    assert [p.answer for p in prompts.heldout] == [str(i) for i in range(20, 30)]
    assert len(prompts.train) == 19
    assert prompts.duplicates == 1
    assert not {" ".join(p.question.split()) for p in prompts.train} & {p.question for p in prompts.heldout}


def test_a_held_out_file_leaves_every_other_row_to_training(tmp_path: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "train.jsonl", questions(30))
    heldout = write(tmp_path / "test.jsonl", questions(40)[25:])
    prompts = read_prompts(DataConfig(path=train, eval_path=heldout, eval_size=0), tokenizer, seed=1)
    assert (len(prompts.train), len(prompts.heldout), prompts.duplicates) == (25, 15, 5)
    prompts = read_prompts(DataConfig(path=train, eval_path=heldout, eval_size=4), tokenizer, seed=1)
    assert (len(prompts.train), len(prompts.heldout)) == (26, 4)


def test_what_overlaps_a_named_evaluation_set_leaves_training(tmp_path: Path, tokenizer: Any) -> None:
    shared = "one two three four five six seven eight nine ten"
    rows = [
        {"question": f"so {shared}?", "answer": "1"},
        {"question": shared.rpartition(" ")[0], "answer": "1"},
        *questions(5),
    ]
    train = write(tmp_path / "train.jsonl", rows)
    heldout = write(tmp_path / "test.jsonl", [{"question": f"Now {shared} eleven", "answer": "2"}])
    prompts = read_prompts(DataConfig(path=train, eval_path=heldout), tokenizer, seed=1)
    assert (len(prompts.train), prompts.duplicates) == (6, 1)
    assert not [prompt for prompt in prompts.train if "ten" in prompt.question]


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "x" * length, "answer": "1"} for length in (5, 50, 500)]
    path = write(tmp_path / "x.jsonl", rows)
    data = DataConfig(path=path, eval_size=0, max_prompt_tokens=100, template="plain")
    prompts = read_prompts(data, tokenizer, seed=1)
    assert ([len(p.token_ids) for p in prompts.train], prompts.dropped) == ([5, 50], 1)
    with pytest.raises(ValueError, match=r"longer than data.max_prompt_tokens=4"):
        read_prompts(
            DataConfig(path=path, eval_size=0, max_prompt_tokens=4, template="plain"), tokenizer, seed=1
        )


def test_generated_prompts_repeat_with_the_seed_and_do_not_overlap(tokenizer: Any) -> None:
    data = DataConfig(path="generated:chain", template="tiny_zero", size=300, eval_size=50, operations=3)
    first = read_prompts(data, tokenizer, seed=4)
    assert first == read_prompts(data, tokenizer, seed=4)
    assert first.train != read_prompts(data, tokenizer, seed=5).train
    assert (len(first.train), len(first.heldout)) == (300, 50)
    assert first.train[0].text == f"Q:{first.train[0].question}=?A:"
    assert not {p.id for p in first.train} & {p.id for p in first.heldout}


# ---------------------------------------------------------------- mistakes


def failing(tmp_path: Path, content: str, **settings: Any) -> DataConfig:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    return DataConfig(path=str(path), eval_size=0, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": "b"\n', r"bad.jsonl:2: not JSON"),
        ('{"frage": "a", "zahl": "1"}\n', r"columns are frage, zahl;.*set data.question_field="),
        ('{"question": "a", "answer": "1"}\n\n{"question": "b"}\n', r"bad.jsonl:3: no column 'answer'"),
        ('{"question": "a", "answer": [1]}\n', r"bad.jsonl:1: column 'answer' is \[1\]"),
        ('{"question": "a", "answer": null}\n', r"none of 1 training prompts is left \(1 have no answer"),
        ('{"question": "a", "answer": "so ####  "}\n', r"bad.jsonl:1: no final answer in column 'answer'"),
        ('{"problem": "a", "solution": "so 5"}\n', r"bad.jsonl:1: no final answer in column 'solution'"),
        ("[1, 2]\n", r"bad.jsonl row 1: int instead of an object"),
        ("", r"has no rows"),
        ("\n\n", r"has no rows"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(
    tmp_path: Path, tokenizer: Any, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(failing(tmp_path, content), tokenizer, seed=1)


def test_bad_paths_and_sizes_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "x.jsonl", questions(3))
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.parquet").write_text("x")
    (tmp_path / "x.jsonl.gz").write_text("x")
    cases = [
        (DataConfig(path=str(tmp_path / "none.jsonl")), FileNotFoundError, "data.path=.*no such file"),
        (DataConfig(path=path, eval_path="nowhere.jsonl"), FileNotFoundError, "data.eval_path=nowhere"),
        (DataConfig(path=str(tmp_path / "x.txt")), ValueError, "not a .jsonl"),
        (DataConfig(path=str(tmp_path)), ValueError, "not a .jsonl"),
        (DataConfig(path=str(tmp_path / "x.parquet")), ValueError, "not a parquet file"),
        (DataConfig(path=str(tmp_path / "x.jsonl.gz")), ValueError, "not readable"),
        (DataConfig(path=path, eval_size=3), ValueError, "data.eval_size=3 leaves nothing of 3 rows"),
        (DataConfig(path=""), ValueError, "data.path is empty"),
        (DataConfig(path="generated:chains"), ValueError, "generated:chain"),
    ]
    for data, error, message in cases:
        with pytest.raises(error, match=message):
            read_prompts(data, tokenizer, seed=1)


def test_final_answers_are_taken_from_known_marks() -> None:
    assert final_answer("1 + 1 = 2 #### 1,002 ", "f:1", "answer") == "1,002"
    assert final_answer("thus \\boxed{\\sqrt{2}}.", "f:1", "answer") == "\\sqrt{2}"
    assert final_answer(" x+1 ", "f:1", "answer") == "x+1"


# ---------------------------------------------------------------- stream


def prompts_named(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"q{i}", "a", "math", f"q{i}", (i,)) for i in range(count)]


def test_each_epoch_holds_each_prompt_exactly_once() -> None:
    stream = PromptStream(prompts_named(17), seed=random.randrange(1000))
    epochs = [[p.id for p in stream.take(17)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"p{i}" for i in range(17))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_stream_goes_on_where_it_was_left() -> None:
    seed = random.randrange(1000)
    whole = [p.id for p in PromptStream(prompts_named(10), seed).take(47)]
    for cut in (0, 3, 10, 29):
        stream = PromptStream(prompts_named(10), seed)
        taken = [p.id for p in stream.take(cut)]
        state = json.loads(json.dumps(stream.state()))
        resumed = PromptStream(prompts_named(10), seed).restore(state)
        assert taken + [p.id for p in resumed.take(47 - cut)] == whole


def test_another_data_set_or_seed_does_not_resume() -> None:
    state = PromptStream(prompts_named(10), 1).state()
    with pytest.raises(ValueError, match="seed=1, this run 2"):
        PromptStream(prompts_named(10), 2).restore(state)
    with pytest.raises(ValueError, match="prompts=10, this run 11"):
        PromptStream(prompts_named(11), 1).restore(state)
    changed = prompts_named(10)[::-1]
    with pytest.raises(ValueError, match="fingerprint"):
        PromptStream(changed, 1).restore(state)
    with pytest.raises(ValueError, match="no prompts"):
        PromptStream([], 1)


# ---------------------------------------------------------------- documents


def test_documents_train_on_the_completion_and_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "sft.jsonl", [{"prompt": "hi", "completion": "you<answer>"}])
    data = DataConfig(path=path, template="plain")
    (document,) = read_documents(data, tokenizer, seed=1).train
    assert tokenizer.decode(document.token_ids) == "hiyou<answer><eos>"
    assert document.loss_mask == (0, 0, 1, 1, 1, 1, 1)
    (document,) = read_documents(data, tokenizer, seed=1, loss_on="all").train
    assert document.loss_mask == (0, 1, 1, 1, 1, 1, 1)


def test_base_documents_fit_the_tiny_tokenizer_and_mask_their_question(tokenizer: Any) -> None:
    data = DataConfig(path="generated:chain-base", template="tiny_zero", size=500, operations=4)
    documents = read_documents(data, tokenizer, seed=2)
    assert len(documents.train) == 500
    for document in documents.train:
        assert tokenizer.unk_token_id not in document.token_ids
        assert document.token_ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(document.token_ids)
        untrained = document.loss_mask.count(0)
        assert untrained == (len("Q:1 + 1 + 1 + 1 + 1=?A:") if text.startswith("Q:") else 1)
    assert documents == read_documents(data, tokenizer, seed=2)


def test_documents_over_the_limit_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b" * n} for n in (3, 30)]
    data = DataConfig(path=write(tmp_path / "sft.jsonl", rows), template="plain")
    documents = read_documents(data, tokenizer, seed=1, max_length=10)
    assert (len(documents.train), documents.dropped) == (1, 1)
    with pytest.raises(ValueError, match=r"sft.max_length=2"):
        read_documents(data, tokenizer, seed=1, max_length=2)
    with pytest.raises(ValueError, match=r'sft.loss_on="answer"'):
        read_documents(data, tokenizer, seed=1, loss_on="answer")


def test_rows_carry_their_task_and_its_reference(tmp_path, tokenizer):
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"question": "1 + 1?", "answer": "so #### 2"},
        {"question": "Write f.", "answer": {"asserts": ["assert f(1) == 2"]}, "task": "code"},
        {"question": "Pick.", "answer": "C", "task": "choice"},
        {"question": "Hello", "answer": None, "task": "general"},
        {"question": "2 + 2?", "answer": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(DataConfig(path=str(path), eval_size=0), tokenizer, seed=1)
    assert [(prompt.task, prompt.answer) for prompt in found.train] == [
        ("math", "2"),
        ("code", '{"asserts": ["assert f(1) == 2"]}'),
        ("choice", "C"),
        ("general", ""),
    ]
    assert found.unanswered == 1


def test_questions_alone_serve_a_task_without_a_rule(tmp_path, tokenizer):
    path = tmp_path / "general.jsonl"
    path.write_text('{"prompt": "Hello"}\n{"prompt": "Sing."}\n')
    config = DataConfig(path=str(path), eval_size=0, task="general")
    assert [prompt.question for prompt in read_prompts(config, tokenizer, seed=1).train] == ["Hello", "Sing."]
    with pytest.raises(ConfigError, match="columns are prompt"):
        read_prompts(replace(config, task="math"), tokenizer, seed=1)
