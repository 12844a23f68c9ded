"""Suites: public formats are read, mistakes in a file are named with their row."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from r1mega.config import ConfigError
from r1mega.data.generations import by_question, questions_inside, read_generations
from r1mega.data.suite_formats import MGSM_INSTRUCTIONS, Question, gsm8k_final
from r1mega.data.suites import SUITES, named_suites, read_suite
from r1mega.rewards.choices import compare_choice, read_options
from r1mega.rewards.code_spec import parse_tests
from r1mega.rewards.math_answer import extract_answer, quick_compare

DATA = Path(os.environ.get("R1MEGA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(name: str, path: Path, **window: Any) -> list[Question]:
    ((suite, file),) = named_suites([f"{name}={path}"], "nowhere")
    return read_suite(suite, file, **window)


# ---------------------------------------------------------------- names


def test_suites_have_the_papers_numbers_of_samples() -> None:
    expected = {"aime2024": 64, "gpqa": 64, "math500": 16, "livecodebench": 8}
    assert {name: SUITES[name].k for name in expected} == expected


@pytest.mark.parametrize("name", ["chain", "bilingual", "small_talk"])
def test_generated_suites_need_no_file_and_have_questions_of_their_own(name: str) -> None:
    ((suite, path),) = named_suites([name], "nowhere", operations=3)
    questions = read_suite(suite, path)
    assert suite.name == name
    assert len({question.text for question in questions}) == len(questions) > 40


@pytest.mark.parametrize(
    "text, name", [("MATH-500", "math500"), ("AIME_2024", "aime2024"), ("generated:chain", "chain")]
)
def test_names_are_spelled_freely(text: str, name: str, tmp_path: Path) -> None:
    named = f"{text}={write(tmp_path / 'x.jsonl', [{}])}" if name != "chain" else text
    assert named_suites([named], ".")[0][0].name == name


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean gsm8k"):
        named_suites(["gsm8"], ".")


def test_a_missing_file_says_where_it_was_sought(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"math/math500.jsonl; name it with --suite math500=FILE"):
        named_suites(["math500"], str(tmp_path))


def test_a_suite_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        named_suites(["chain", "chain"], ".")


# ---------------------------------------------------------------- formats


def test_gsm8k_and_math_columns(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "so 2+3=<<2+3=5>>5\n#### 1,005"},
        {"problem": "p", "answer": "\\frac{1}{2}", "unique_id": "test/1"},
        {"Problem": "a", "Answer": 204, "ID": "2024-I-1"},
        {"problem": "s", "solution": "thus \\boxed{x^2}"},
    ]
    questions = read("math500", write(tmp_path / "m.jsonl", rows))
    assert [q.answer for q in questions] == ["1,005", "\\frac{1}{2}", "204", "x^2"]
    assert [q.id for q in questions] == ["m.jsonl:0", "test/1", "2024-I-1", "m.jsonl:3"]
    assert questions[0].text.endswith("put your final answer within \\boxed{}.")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("16-7 = <<16-7=9>>9 eggs\nA: 18", "18"),
        ("A: wrong place\n9 eggs\nA: 5,600 ", "5,600"),
        ("so it is 9\n#### 18", "18"),
        ("9\nA: -3.5\n", "-3.5"),
        ("A: 18\nand then more", None),
        ("no answer", None),
    ],
)
def test_gsm8k_solutions_end_in_their_answer(text: str, answer: str | None) -> None:
    assert extract_answer(gsm8k_final(text)) == answer


def test_mgsm_asks_in_its_own_language(tmp_path: Path) -> None:
    for language in ("de", "zh"):
        (tmp_path / f"mgsm_{language}.tsv").write_text(
            "eine Frage\t18\nnoch eine\t70,000\n", encoding="utf-8"
        )
    questions = read("mgsm", tmp_path)
    assert [q.id for q in questions] == ["mgsm_de:0", "mgsm_de:1", "mgsm_zh:0", "mgsm_zh:1"]
    assert all(q.text.endswith(MGSM_INSTRUCTIONS[q.language]) for q in questions)


def test_gpqa_shuffles_its_options_alike_every_time(tmp_path: Path) -> None:
    file = tmp_path / "gpqa.csv"
    head = "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
    file.write_text(head + "".join(f'r{i},"What, {i}?",right,wrong a,wrong b,wrong c\n' for i in range(30)))
    questions = read("gpqa", file)
    assert questions == read("gpqa", file)
    assert len({q.answer for q in questions}) == 4
    for q in questions:
        assert read_options(q.question)[q.answer] == "right"
        assert compare_choice(q.answer, f"So ...\nANSWER: {q.answer}", read_options(q.question)) == "equal"
    assert '"ANSWER: $LETTER"' in questions[0].text


def test_mmlu_in_its_three_forms(tmp_path: Path) -> None:
    csv = tmp_path / "mmlu.csv"
    csv.write_text('"Which, then?",one,two,three,four,C\n')
    (question,) = read("mmlu", csv)
    assert (question.answer, read_options(question.question)["C"]) == ("C", "three")
    rows = [
        {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3},
        {"question": "q", "options": list("abcdefghij"), "answer": "J", "answer_index": 9},
    ]
    assert [q.answer for q in read("mmlu_pro", write(tmp_path / "m.jsonl", rows))] == ["D", "J"]


def test_humaneval_reads_a_prompt_that_ends_at_its_signature(tmp_path: Path) -> None:
    row = {
        "task_id": "t/0", "prompt": "import math\ndef f(x):\n", "canonical_solution": "    return x",
        "test": "def check(candidate):\n    assert candidate(1) == 1", "entry_point": "f",
    }  # fmt: skip
    (question,) = read("humaneval", write(tmp_path / "h.jsonl", [row]))
    assert parse_tests(question.answer).entry_points == ("f",)
    assert question.before == row["prompt"]
    assert question.seconds == 3.0


def lcb_row(day: str, **more: Any) -> dict[str, Any]:
    private = json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}])
    return {
        "question_id": f"q{day}", "question_content": "Double it.", "contest_date": f"2024-08-{day}T00:00:00",
        "starter_code": "", "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(private))).decode(), "metadata": "{}",
    } | more  # fmt: skip


def test_livecodebench_window_and_packed_tests(tmp_path: Path) -> None:
    file = write(tmp_path / "lcb.jsonl", [lcb_row(day) for day in ("01", "10", "20")])
    assert [q.id for q in read("livecodebench", file, since="2024-08-10")] == ["q10", "q20"]
    assert [q.id for q in read("livecodebench", file, until="2024-08-10")] == ["q01", "q10"]
    assert parse_tests(read("livecodebench", file)[0].answer).cases == (("1\n", "2\n"), ("2\n", "4\n"))
    with pytest.raises(ConfigError, match="none of 3 questions"):
        read("livecodebench", file, since="2025-01-01")


def test_livecodebench_classes_are_called_as_functions(tmp_path: Path) -> None:
    cases = json.dumps([{"input": "[1, 2]\n3", "output": "3", "testtype": "functional"}])
    row = lcb_row(
        "01", starter_code="class Solution:\n    def last(self, a, b):\n        ", public_test_cases=cases,
        private_test_cases="", metadata=json.dumps({"func_name": "last"}),
    )  # fmt: skip
    (question,) = read("livecodebench", write(tmp_path / "l.jsonl", [row]))
    assert "Solution().last" in question.after


def test_packed_tests_run_no_code(tmp_path: Path) -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()
    with pytest.raises(ConfigError, match="only text is read"):
        read("livecodebench", write(tmp_path / "l.jsonl", [lcb_row("01", private_test_cases=packed)]))


def test_any_file_of_questions_is_a_suite(tmp_path: Path) -> None:
    rows = [
        {"question": "1 + 1", "answer": "2"},
        {"prompt": "B?", "answer": "B", "task": "choice"},
        {"question": "write", "answer": {"stdin": ["1"], "stdout": ["1"]}, "task": "code"},
        {"question": "why?", "answer": "because", "task": "general"},
    ]
    file = write(tmp_path / "own.jsonl", rows)
    ((suite, path),) = named_suites([str(file)], ".")
    questions = read_suite(suite, path)
    assert suite.name == "own"
    assert [q.task for q in questions] == ["math", "choice", "code", "judged"]
    assert questions[0].text == "1 + 1"


@pytest.mark.parametrize(
    "row, task, answer",
    [
        ({"task_id": "t/0", "prompt": "def f():\n", "test": "def check(c):\n    assert c()", "entry_point": "f"}, "code", ""),
        ({"task_id": 0, "text": "t", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}, "code", ""),
        (lcb_row("01"), "code", ""),
        ({"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "instructions", ""),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "choice", "B"),
        ({"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}, "math", "2"),
        ({"question": "q", "ground_truth": "A: 2", "m": {"solution": "A: 2", "is_correct": True}}, "math", "2"),
    ],
)  # fmt: skip
def test_a_file_named_alone_is_read_in_its_public_format(
    row: dict, task: str, answer: str, tmp_path: Path
) -> None:
    ((suite, path),) = named_suites([str(write(tmp_path / "own.jsonl", [row]))], ".")
    (question,) = read_suite(suite, path)
    assert (suite.name, suite.k, question.task) == ("own", 1, task)
    assert answer in ("", question.answer)
    assert (suite.final("A: 3") == "A: 3") is (task != "math")


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("gsm8k", {"question": "q"}, r"f.jsonl:2: no column 'answer'"),
        ("gsm8k", {"question": "q", "answer": ""}, r"f.jsonl:2: column 'answer' is ''"),
        ("gsm8k", {"question": "q", "answer": "text\n#### "}, r"f.jsonl:2: no final answer"),
        ("gsm8k", {"question": None, "answer": "1"}, r"f.jsonl:2: column 'question' is None"),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": 2}, r"f.jsonl:2: answer 2 is none of 2"),
        ("mmlu", {"question": "q", "choices": "ab", "answer": 1}, r"f.jsonl:2: column 'choices' is no list"),
        ("humaneval", {"task_id": "t", "prompt": "def f():\n"}, r"f.jsonl:2: no column 'test'"),
        ("mbpp", {"task_id": 1, "text": "t", "code": "x = 1", "test_list": []}, r"f.jsonl:2: column 'test_list'"),
        ("livecodebench", {"question_id": "x", "question_content": "c"}, r"f.jsonl:2: no test cases"),
        ("ifeval", {"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": [{}]}, r"f.jsonl:2: instruction 'a:b'"),
        ("chat", {"prompt": "p"}, r"f.jsonl:2: neither a reference"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(name: str, row: dict, words: str, tmp_path: Path) -> None:
    good: dict[str, dict[str, Any]] = {
        "gsm8k": {"question": "q0", "answer": "1"},
        "mmlu": {"question": "q0", "choices": ["a", "b"], "answer": 1},
        "humaneval": {"task_id": "t0", "prompt": "def f():\n", "test": "def check(c):\n    assert c()", "entry_point": "f"},
        "mbpp": {"task_id": 0, "text": "t", "code": "def f(): return 1", "test_list": ["assert f() == 1"]},
        "livecodebench": lcb_row("01"),
        "ifeval": {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"x": None}]},
        "chat": {"prompt": "p", "answer": "a"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=words) as raised:
        read(name, write(tmp_path / "f.jsonl", [good[name], row]))
    assert "\n" not in str(raised.value)


def test_two_questions_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "q", "answer": "1"}] * 2
    with pytest.raises(ConfigError, match="second question with id 'a'"):
        read("gsm8k", write(tmp_path / "f.jsonl", rows))


# ---------------------------------------------------------------- generations


def test_generations_are_found_by_id_and_by_text(tmp_path: Path) -> None:
    questions = read("gsm8k", write(tmp_path / "q.jsonl", [
        {"id": "a", "question": "How  many?", "answer": "1"}, {"id": "b", "question": "Why?", "answer": "2"},
    ]))  # fmt: skip
    file = write(tmp_path / "g.jsonl", [
        {"id": "b", "responses": ["x", "y"]}, {"question": "How many? ", "completion": "z", "finish_reason": "length"},
    ])  # fmt: skip
    found = by_question(read_generations(file), questions, file)[""]
    assert {id: [g.text for g in each] for id, each in found.items()} == {"b": ["x", "y"], "a": ["z"]}
    assert found["a"][0].finish_reason == "length"


def test_model_solutions_bring_their_questions_and_several_models(tmp_path: Path) -> None:
    row = {
        "question": "q", "ground_truth": "1 + 1 = <<1+1=2>>2\nA: 2",
        "small": {"solution": "A: 3", "is_correct": False}, "large": {"solution": "A: 2", "is_correct": True},
    }  # fmt: skip
    file = write(tmp_path / "s.jsonl", [row, row | {"question": "r"}])
    questions = questions_inside(file)
    assert [q.answer for q in questions] == ["2", "2"]
    variants = by_question(read_generations(file), questions, file)
    assert {name: [g.published for each in v.values() for g in each] for name, v in variants.items()} == {
        "small": [False, False], "large": [True, True],
    }  # fmt: skip


@pytest.mark.parametrize(
    "columns, verdict",
    [
        ({"passed": True}, True), ({"passed": False, "result": "timed out"}, False), ({"result": "passed"}, True),
        ({"result": "failed: name 'x': is not defined"}, False), ({"result": "timed out"}, False), ({"result": "42"}, None),
        ({"is_correct": "False"}, False), ({"is_correct": 1}, True), ({"correct": 0.0}, False), ({}, None),
    ],
)  # fmt: skip
def test_verdicts_are_read_as_files_write_them(columns: dict, verdict: bool | None, tmp_path: Path) -> None:
    (found,) = read_generations(write(tmp_path / "g.jsonl", [{"id": "a", "completion": "x"} | columns]))
    assert found.published is verdict


def test_a_verdict_that_is_none_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", [{"id": "a", "response": "x", "is_correct": "perhaps"}])
    with pytest.raises(ConfigError, match=r"g.jsonl:1: column 'is_correct' holds 'perhaps'"):
        read_generations(file)


@pytest.mark.parametrize(
    "response, right",
    [
        ("so\n#### 1,234", True), ("#### 1,234.00", True), ("#### $1,234", True), ("#### \\$1234", True),
        ("#### **1234**", True), ("####1234", True), ("#### 1234 eggs per day.", True), ("#### 1234.", True),
        ("#### 1234%", True), ("#### 1234:00", True), ("#### 1234<|endoftext|>", True), ("A: 1234<|endoftext|>\n", True),
        ("A: 1,234", True), ("A: $1,234.00", True), ("A: 1234 eggs a day.", True), ("<<2*617=1234>>1234\nA:1234\n", True),
        ("#### 1234\n\nQuestion: next?\n#### 7", True), ("#### 7\n#### 1234", False), ("#### -1234", False),
        ("#### 1,235", False), ("A: 1235", False), ("A: 1 234", False), ("The answer is 1234.", False), ("1234", False),
        ("<think>#### 7</think>#### 1234", True), ("<think>#### 1234</think>7", False),
        ("#### 1. First\n so \\boxed{1234}", True), ("#### 12345", False), ("#### ", False), ("#### none", False),
    ],
)  # fmt: skip
def test_gsm8k_reads_the_marked_number_whatever_stands_around_it(response: str, right: bool) -> None:
    said = extract_answer(SUITES["gsm8k"].final(response))
    assert (said is not None and quick_compare("1234", said) == "equal") is right


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", [" ", "\n", "\t", "</s> ", ",1", "####", "<<", "A: x ", "*", "1"])
def test_a_long_response_is_read_in_linear_time(part: str) -> None:
    for text in (
        part * 200_000,
        f"#### 1{part * 200_000}/2",
        f"A: 1{part * 200_000}x",
        f"####{part * 200_000}x",
    ):
        SUITES["gsm8k"].final(text)


def test_gsm8k_reads_fractions_whole() -> None:
    for gold, equal in (("0.5", True), ("1", False)):
        said = extract_answer(SUITES["gsm8k"].final("#### 1/2"))
        assert (quick_compare(gold, said or "") == "equal") is equal


def test_gsm8k_reads_numbers_below_zero() -> None:
    for response in ("#### -5", "#### -$5", "#### $-5.00", "A: -5"):
        assert quick_compare("-5", extract_answer(SUITES["gsm8k"].final(response)) or "") == "equal", response


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"id": "c", "response": "x"}], r"g.jsonl:1: 'c' is no question of the suite"),
        ([{"id": "a", "response": "x"}], r"no generation for 1 of 2 questions, the first is 'b'"),
        ([{"response": "x"}], r"g.jsonl:1: the row names no question"),
        ([{"id": "a"}], r"g.jsonl:1: no text"),
        ([{"id": "a", "response": 3}], r"g.jsonl:1: column 'response' holds '3'"),
        ([{"id": "a", "responses": ["x", "y"], "graded_list": [True]}], r"g.jsonl:1: 1 verdicts for 2 texts"),
    ],
)
def test_generations_that_do_not_fit_are_named(rows: list[dict], words: str, tmp_path: Path) -> None:
    questions = [Question(id, id, id, "1", "math") for id in ("a", "b")]
    file = write(tmp_path / "g.jsonl", rows)
    with pytest.raises(ConfigError, match=words):
        by_question(read_generations(file), questions, file)


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    "name, count",
    [("gsm8k", 1319), ("math500", 500), ("aime2024", 30), ("mgsm", 1500), ("humaneval", 164), ("mbpp", 500)],
)
def test_the_public_files_are_read_whole(name: str, count: int) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no data in {DATA}")
    ((suite, path),) = named_suites([name], str(DATA))
    assert len(read_suite(suite, path)) == count
