"""`r1mega eval` without a model: files of generations and a scripted endpoint, graded, counted, continued, refused."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1mega import cli
from r1mega.bench.scripted_endpoint import Request, ScriptedEndpoint, completion
from r1mega.config import ConfigError, JudgeConfig, RewardConfig
from r1mega.data.chat import template
from r1mega.data.prompts import Row
from r1mega.data.suite_formats import Question
from r1mega.data.suites import SUITES
from r1mega.rewards import endpoint as endpoint_module
from r1mega.stages import evaluation
from r1mega.stages.console import Console
from r1mega.stages.evaluation_config import EvaluationConfig, load
from r1mega.stages.evaluation_grading import Grader, Output, followed_instructions, program
from r1mega.stages.evaluation_metrics import contest_metrics, suite_metrics
from r1mega.stages.evaluation_plan import plan_of
from r1mega.stages.evaluation_sources import check_model, fitting
from r1mega.stages.run_directory import write_json

DATA = Path(os.environ.get("R1MEGA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WORKER = RewardConfig(workers=1)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(folder: Path, suite: Path | str, generations: Path, **settings: Any) -> dict[str, Any]:
    config = EvaluationConfig(
        suites=(str(suite),), generations=str(generations), dir=str(folder), rewards=WORKER, **settings
    )
    return evaluation.run(config, Console(io.StringIO()))


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def maths(tmp_path: Path) -> Path:
    return write(tmp_path / "own.jsonl", [
        {"id": "half", "question": "What is one half?", "answer": "1/2"},
        {"id": "four", "question": "What is two and two?", "answer": "4"},
    ])  # fmt: skip


HALVES = ["\\boxed{0.5}", "\\boxed{2}", "\\boxed{\\frac{1}{2}}", "it is two \\boxed{2.0}", "no idea"]
FOURS = ["\\boxed{4}", "\\boxed{3}", "\\boxed{3}", "\\boxed{5}", "\\boxed{3"]


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write(tmp_path / "g.jsonl", [
        {"id": "half", "responses": HALVES}, {"id": "four", "responses": FOURS},
    ])  # fmt: skip


# ---------------------------------------------------------------- counting


def test_metrics_of_a_file_of_generations(maths: Path, answers: Path, tmp_path: Path) -> None:
    found = evaluate(tmp_path / "out", maths, answers)["suites"]["own"]
    assert (found["questions"], found["samples"], found["k"]) == (2, 10, 5)
    assert found["pass@1"] == pytest.approx((2 / 5 + 1 / 5) / 2)
    assert found["pass@2"] == pytest.approx(((1 - 3 / 10) + (1 - 6 / 10)) / 2)
    assert found["pass@5"] == 1.0
    # "0.5" and "1/2" vote together and tie with "2" and "2.0"; "3" wins with two votes of four
    assert found["cons@k"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["pass@1_interval"][0] < found["pass@1"] < found["pass@1_interval"][1]
    saved = rows(tmp_path / "out", "own")
    assert {row["verdict"] for row in saved} == {"equal", "unequal", "missing"}
    assert {row["prompt"] for row in saved} == {"What is one half?", "What is two and two?"}


def test_results_say_they_are_finished_and_where_they_come_from(
    maths: Path, answers: Path, tmp_path: Path
) -> None:
    evaluate(tmp_path / "out", maths, answers)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert results["finished"] is True
    assert "sha256" in lineage["inputs"]["generations"]
    assert "sha256" in lineage["inputs"]["suite own"]


def test_a_cut_answer_is_wrong_and_counted(maths: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", [
        {"id": "half", "response": "\\boxed{1/2}", "finish_reason": "length"}, {"id": "four", "response": "\\boxed{4}"},
    ])  # fmt: skip
    found = evaluate(tmp_path / "out", maths, file)["suites"]["own"]
    assert (found["pass@1"], found["truncated"]) == (0.5, 0.5)


def test_a_cut_answer_does_not_vote(maths: Path, tmp_path: Path) -> None:
    def sample(text: str, reason: str) -> dict[str, str]:
        return {"response": text, "finish_reason": reason}

    half = [sample("\\boxed{3}", "length")] * 3 + [sample("\\boxed{0.5}", "stop")] * 2
    rest = [sample("\\boxed{4}", "stop")] * 5
    folder = tmp_path / "out"
    for order in (half, half[::-1]):
        lines = [{"id": "half", **one} for one in order] + [{"id": "four", **one} for one in rest]
        found = evaluate(folder, maths, write(tmp_path / "g.jsonl", lines))["suites"]["own"]
        assert (found["cons@k"], found["pass@1"]) == (1.0, pytest.approx((2 / 5 + 1) / 2))
        shutil.rmtree(folder)


def test_what_eval_wrote_can_be_graded_again_without_a_disagreement(
    maths: Path, answers: Path, tmp_path: Path
) -> None:
    first = evaluate(tmp_path / "one", maths, answers)["suites"]["own"]
    again = evaluate(tmp_path / "two", maths, tmp_path / "one" / "generations" / "own.jsonl")["suites"]["own"]
    assert again["disagreements"] == 0
    assert again["pass@1"] == first["pass@1"] == pytest.approx(again["published_pass@1"])


def test_generations_behind_a_prompt_that_opened_the_reasoning_are_read_as_they_were_sampled(
    maths: Path, tmp_path: Path
) -> None:
    """As `r1mega eval` leaves them in R1's template: one that never closed it, one that did."""
    file = write(tmp_path / "g.jsonl", [
        {"id": "half", "prompt": template("r1")("half?"), "response": "so \\boxed{1/2}", "correct": False},
        {"id": "four", "prompt": template("r1")("four?"), "response": "so\n</think>\n\n\\boxed{4}", "correct": True},
    ])  # fmt: skip
    found = evaluate(tmp_path / "out", maths, file)["suites"]["own"]
    assert (found["disagreements"], found["pass@1"]) == (0, 0.5)


def test_a_published_verdict_that_is_wrong_is_counted(maths: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", [
        {"id": "half", "response": "\\boxed{2}", "is_correct": True},
        {"id": "four", "response": "\\boxed{4}", "is_correct": True},
    ])  # fmt: skip
    found = evaluate(tmp_path / "out", maths, file)["suites"]["own"]
    assert (found["published_pass@1"], found["disagreements"]) == (1.0, 1)


def test_language_consistency_is_measured_where_there_are_words(tmp_path: Path) -> None:
    (tmp_path / "mgsm_de.tsv").write_text("Wie viele Eier legen die Enten am Tag?\t18\n", encoding="utf-8")
    german = "<think>Die Enten legen jeden Tag achtzehn Eier.</think> \\boxed{18}"
    english = "<think>The ducks lay eighteen eggs each day, and that is all.</think> \\boxed{18}"
    file = write(
        tmp_path / "g.jsonl",
        [{"id": "mgsm_de:0", "responses": [german, english, "<think>9+9=18</think> 18"]}],
    )
    found = evaluate(tmp_path / "out", f"mgsm_de={tmp_path / 'mgsm_de.tsv'}", file)["suites"]["mgsm_de"]
    assert found["language_consistency"] == pytest.approx(0.5, abs=0.1)


def test_choices_vote_by_their_letter(tmp_path: Path) -> None:
    suite = write(
        tmp_path / "mmlu.jsonl", [{"id": "x", "question": "Q", "choices": ["p", "q", "r"], "answer": "B"}]
    )
    texts = ["ANSWER: B", "so ...\nANSWER: (B)", "ANSWER: C", "**ANSWER: C**", "ANSWER: B."]
    found = evaluate(
        tmp_path / "out", f"mmlu={suite}", write(tmp_path / "g.jsonl", [{"id": "x", "responses": texts}])
    )
    assert found["suites"]["mmlu"]["pass@1"] == pytest.approx(3 / 5)
    assert found["suites"]["mmlu"]["cons@k"] == 1.0


def test_instructions_are_read_in_the_summary_alone(tmp_path: Path) -> None:
    suite = write(tmp_path / "ifeval.jsonl", [{
        "key": 7, "prompt": "p", "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {"num_words": None}],
    }])  # fmt: skip
    texts = ["<think>well, one, two</think><<Title>>\nText", "<<Title>> one, two", "plain"]
    found = evaluate(
        tmp_path / "out", f"ifeval={suite}", write(tmp_path / "g.jsonl", [{"key": 7, "responses": texts}])
    )
    metrics = found["suites"]["ifeval"]
    assert metrics["pass@1"] == pytest.approx(1 / 3)
    assert metrics["instructions_strict"] == pytest.approx(4 / 6)
    assert followed_instructions("a, b", '[["punctuation:no_comma", {}]]') == {
        "strict": [False],
        "loose": [False],
    }


@pytest.mark.parametrize(
    ("suite", "task", "answer"),
    [
        ("ifeval", "instructions", '[["punctuation:no_comma", {}]]'),
        ("gpqa", "choice", "A"),
        ("gsm8k", "math", "7"),
        ("chat", "judged", "seven"),
        ("chat", "compared", "seven"),
    ],
)
def test_reasoning_that_the_prompt_opened_and_nobody_closed_is_never_graded(
    suite: str, task: str, answer: str
) -> None:
    """In R1's template; and what is kept is what the model wrote."""
    question = Question("q", "3 + 4?", "3 + 4?", answer, task)
    chain = "It is A or #### 7 \\boxed{7}"

    async def grade(text: str) -> dict[str, Any]:
        async def outputs() -> Any:
            yield Output(question, 0, template("r1")("3 + 4?"), text, "stop")

        async with Grader(WORKER, JudgeConfig(), 1) as grader:
            (row,) = [row async for row in grader.rows(SUITES[suite], outputs())]
        return row

    row = asyncio.run(grade(chain))
    assert (row["value"], row["response"], row["answer"]) == (0.0, chain, None)
    if task == "instructions":
        assert row["strict"] == [False]
    if task in ("choice", "math"):
        ending = "A" if task == "choice" else "#### 7"
        assert asyncio.run(grade(f"{chain}\n</think>\n\n{ending}"))["value"] == 1.0


def test_a_suite_with_different_numbers_of_samples_takes_the_smallest_for_pass_at_k() -> None:
    row = {
        "finish_reason": "stop", "repetition": "ok", "response": "x", "verdict": "equal", "value": 1.0, "correct": True
    }  # fmt: skip
    wrong = row | {"value": 0.0, "correct": False}
    found = suite_metrics([[row, wrong, wrong], [row, wrong]], None)
    assert found["k"] == 2
    assert found["pass@1"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["pass@2"] == pytest.approx((2 / 3 + 1) / 2)


# ---------------------------------------------------------------- code


@pytest.mark.parametrize(
    "text, is_completion, whole",
    [
        ("    return 1", True, "def f():\n    return 1"),
        ("```python\ndef f(): return 1\n```", False, "def f(): return 1\n"),
        ("```python\n    return 1\n```", False, "def f():\n    return 1\n"),
        ("<think>```python\nno\n```</think>\ndef f(): return 1", False, "def f(): return 1\n"),
        ("    return 1", False, "def f():\n    return 1\n"),
        ("```text\nno\n```", False, None),
    ],
)
def test_a_program_is_found(text: str, is_completion: bool, whole: str | None) -> None:
    question = Question("t", "", "", "{}", "code", before="def f():\n")
    assert program(Output(question, 0, "", text, "stop", is_completion=is_completion)) == whole
    if not is_completion:
        reasoned = "</think>" in text
        assert program(Output(question, 0, "<think>\n", text, "stop")) == (whole if reasoned else None)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_humaneval_samples_get_the_verdicts_of_its_harness(tmp_path: Path) -> None:
    problem = {
        "task_id": "own/0", "prompt": "def two():\n", "canonical_solution": "    return 2",
        "test": "def check(candidate):\n    assert candidate() == 2", "entry_point": "two",
    }  # fmt: skip
    samples = [
        ("    return 2", True), ("  return 2", True), ("\treturn 2", True), ("    return 3", False),
        ("    return input('number')", False), ("    import time\n    time.sleep(60)\n    return 2", False),
        ("return 2", False), ("    import subprocess\n    subprocess.check_output('rm -rf tmp')", False),
        ("    while True:\n        pass", False), ("    exit()", False), ("    raise SystemExit(0)", False),
        ("    raise KeyboardInterrupt", False), ("    import os\n    os._exit(0)", False), ("    raise BaseException", False),
        ("    import sys\n    sys.stdin.read()\n    return 2", False), ("    yield 2", False), ("    return (", False),
        ("    return 2.0", True), ("    return 2\n\ndef check(candidate):\n    assert False", True),
        ("    return 2\n\nif __name__ == '__main__':\n    two(input())", True), ("    return 2\nprint('done')", True),
        ("    return 2\ninput()", False), ("    pass\n\ndef two():\n    return 2\n", True),
        ("    return 2\n```\nThat is it.", False),
        ("```python\ndef two():\n    return 2\n```", False), ("def two():\n    return 2\n", False),
        ("    return three()\n\ndef three():\n    return 2", True), ("", False), ("    return 1 / 0", False),
    ]  # fmt: skip
    file = write(
        tmp_path / "s.jsonl", [{"task_id": "own/0", "completion": c, "passed": p} for c, p in samples]
    )
    suite = f"humaneval={write(tmp_path / 'p.jsonl', [problem])}"
    found = evaluate(tmp_path / "out", suite, file)["suites"]["humaneval"]
    assert found["disagreements"] == 0
    assert found["pass@1"] == pytest.approx(sum(passed for _, passed in samples) / len(samples))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason=f"no HumanEval in {DATA}")
@pytest.mark.parametrize("right", [True, False])
def test_humaneval_gold_is_all_right_and_a_constant_all_wrong(right: bool, tmp_path: Path) -> None:
    with gzip.open(DATA / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    file = write(tmp_path / "s.jsonl", [
        {"task_id": p["task_id"], "completion": p["canonical_solution"] if right else "    return None"} for p in problems
    ])  # fmt: skip
    found = evaluate(tmp_path / "out", "humaneval", file, data=str(DATA))["suites"]["humaneval"]
    assert (found["questions"], found["pass@1"]) == (164, float(right))


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"no GSM8K in {DATA}")
def test_gsm8k_gold_is_all_right_and_one_more_all_wrong(tmp_path: Path) -> None:
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[::5]
    solved = []
    for row in map(json.loads, lines):
        steps, answer = row["answer"].rsplit("#### ", 1)
        number = int(answer.replace(",", ""))
        solved.append({
            "question": row["question"], "ground_truth": f"{steps}A: {answer}",
            "right": {"solution": f"{steps}A: {number}", "is_correct": True},
            "wrong": {"solution": f"{steps}A: {number + 1}", "is_correct": False},
        })  # fmt: skip
    suite = tmp_path / "fifth.jsonl"
    suite.write_text("\n".join(lines), encoding="utf-8")
    found = evaluate(tmp_path / "out", f"gsm8k={suite}", write(tmp_path / "s.jsonl", solved))["suites"]
    assert {name: (m["questions"], m["pass@1"], m["disagreements"]) for name, m in found.items()} == {
        "gsm8k-right": (264, 1.0, 0), "gsm8k-wrong": (264, 0.0, 0),
    }  # fmt: skip


def test_model_solutions_are_graded_by_the_references_they_bring(tmp_path: Path) -> None:
    """Also where the suite's own file is there, of which they hold a part."""
    (tmp_path / "gsm8k").mkdir()
    write(
        tmp_path / "gsm8k" / "test.jsonl",
        [{"question": "q", "answer": "#### 3"}, {"question": "r", "answer": "#### 4"}],
    )
    file = write(tmp_path / "s.jsonl", [
        {"question": "q", "ground_truth": "so\n#### 2", "small": {"solution": "A: 2", "is_correct": True}},
    ])  # fmt: skip
    found = evaluate(tmp_path / "out", "gsm8k", file, data=str(tmp_path))["suites"]["gsm8k-small"]
    assert (found["questions"], found["pass@1"], found["disagreements"]) == (1, 1.0, 0)


# ---------------------------------------------------------------- an endpoint, chat


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow one another at once."""
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 0.01)


def ask(folder: Path, suite: Path | str, url: str, *more: str) -> int:
    return cli.main([
        "eval", "--suite", str(suite), "--endpoint", url, "--endpoint-model", "m", "--dir", str(folder),
        "--max-tokens", "50", "rewards.workers=1", *more,
    ])  # fmt: skip


def test_an_endpoint_is_sampled_k_times_and_more_samples_can_follow(maths: Path, tmp_path: Path) -> None:
    with ScriptedEndpoint(lambda request: completion("\\boxed{4}")) as server:
        assert ask(tmp_path / "out", maths, server.url, "--k", "2") == 0
        assert len(server.requests) == 4
        sent = server.requests[0].body
        assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0.6, 0.95, 50)
        assert ask(tmp_path / "out", maths, server.url, "--k", "3") == 0
        assert len(server.requests) == 6
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["suites"]["own"]
    assert (found["k"], found["pass@1"]) == (3, 0.5)
    assert results["tokens"] == sum(row["tokens"] for row in rows(tmp_path / "out", "own")) > 0


def test_a_torn_last_line_is_dropped_and_asked_again(maths: Path, tmp_path: Path) -> None:
    with ScriptedEndpoint(lambda request: completion("\\boxed{4}")) as server:
        assert ask(tmp_path / "out", maths, server.url, "--k", "2") == 0
        file = tmp_path / "out" / "generations" / "own.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        assert ask(tmp_path / "out", maths, server.url, "--k", "2") == 0
        assert len(server.requests) == 5
    assert len({(row["id"], row["index"]) for row in rows(tmp_path / "out", "own")}) == 4


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    suite = write(
        tmp_path / "many.jsonl", [{"id": f"q{i}", "question": str(i), "answer": "4"} for i in range(60)]
    )
    file = tmp_path / "out" / "generations" / "many.jsonl"
    answer = replace(completion("\\boxed{4}"), delay=0.2)
    with ScriptedEndpoint(lambda request: answer) as server:
        command = [
            sys.executable, "-m", "r1mega", "eval", "--suite", str(suite), "--endpoint", server.url, "--endpoint-model",
            "m", "--dir", str(tmp_path / "out"), "endpoint.concurrency=2", "rewards.workers=1",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (file.exists() and file.read_bytes().count(b"\n") > 5):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        there = file.read_bytes().count(b"\n")
        asked = len(server.requests)
        assert 5 < there < 60
        assert ask(tmp_path / "out", suite, server.url, "--max-tokens", "32768") == 0
        assert len(server.requests) - asked == 60 - there
    assert len({row["id"] for row in rows(tmp_path / "out", "many")}) == 60


def test_samples_made_otherwise_are_not_mixed(
    maths: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with ScriptedEndpoint(lambda request: completion("\\boxed{4}")) as server:
        assert ask(tmp_path / "out", maths, server.url) == 0
        assert ask(tmp_path / "out", maths, server.url, "--temperature", "1") == 2
    assert "holds samples of own with temperature=0.6, now 1.0" in capsys.readouterr().err


def test_a_window_of_dates_is_for_the_suites_that_have_them(maths: Path, tmp_path: Path) -> None:
    coding = write(tmp_path / "coding.jsonl", [
        {"question_id": f"q{day}", "question_content": "Double it.", "contest_date": f"2024-08-{day}T00:00:00",
         "starter_code": "", "public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]',
         "private_test_cases": "[]", "metadata": "{}"}
        for day in ("01", "10", "20")
    ])  # fmt: skip
    config = EvaluationConfig(
        suites=(f"math500={maths}", f"livecodebench={coding}"), since="2024-08-10",
        endpoint=JudgeConfig(url="http://127.0.0.1:9/v1", model="m"),
    )  # fmt: skip
    asked = {job.name: [question.id for question in job.questions] for job in plan_of(config).jobs}
    assert asked == {"math500": ["half", "four"], "livecodebench": ["q10", "q20"]}
    with pytest.raises(ConfigError, match="has no dates"):
        plan_of(replace(config, suites=(f"math500={maths}",)))


def test_verdicts_of_two_judges_or_two_limits_are_not_mixed(
    maths: Path, answers: Path, tmp_path: Path
) -> None:
    chat = write(tmp_path / "chat.jsonl", [{"id": "c", "prompt": "Capital?", "reference": "Paris"}])
    file = write(tmp_path / "chats.jsonl", [{"id": "c", "response": "It is Paris."}])
    reply = '{"analysis": "same", "correctness": "correct"}'
    folder = tmp_path / "out"
    with ScriptedEndpoint(lambda request: completion(reply)) as server:

        def judged(model: str) -> dict[str, Any]:
            judge = JudgeConfig(url=server.url, model=model)
            return evaluate(folder, f"chat={chat}", file, judge=judge)["suites"]["chat"]["settings"]

        assert judged("A")["judge.model"] == "A"
        with pytest.raises(ConfigError, match=r"samples of chat with judge\.model=A, now B"):
            judged("B")
        stored = json.loads((folder / "evaluation.json").read_text())
        assert stored["chat"]["judge.model"] == "A"
        del stored["chat"]["judge.model"]  # a folder of before
        write_json(folder / "evaluation.json", stored)
        with pytest.raises(ConfigError, match=r"judge\.model=\(not recorded\), now A"):
            judged("A")
    found = evaluate(tmp_path / "maths", maths, answers)["suites"]["own"]["settings"]
    assert "judge.model" not in found, "nothing there was judged"
    with pytest.raises(ConfigError, match=r"rewards\.cpu_seconds=2\.0, now 9\.0"):
        evaluation.run(
            EvaluationConfig(
                suites=(str(maths),), generations=str(answers), dir=str(tmp_path / "maths"),
                rewards=RewardConfig(workers=1, cpu_seconds=9.0),
            ),
            Console(io.StringIO()),
        )  # fmt: skip


@pytest.mark.usefixtures("_quick")
def test_an_endpoint_that_is_down_ends_in_one_line(
    maths: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with ScriptedEndpoint(lambda request: completion("")) as server:
        url = server.url
    assert ask(tmp_path / "out", maths, url) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "the endpoint gives no answer" in lines[0]
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_decoding_check_decodes_greedily_once(maths: Path, tmp_path: Path) -> None:
    loop = "and then again we see that it is so, " * 60
    with ScriptedEndpoint(
        lambda request: completion(loop if request.body["temperature"] == 0 else "\\boxed{4}")
    ) as server:
        assert ask(tmp_path / "out", maths, server.url, "--decoding-check", "--k", "2") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["own"]["decoding_check"]
    assert (found["greedy"]["repetitive"], found["sampled"]["repetitive"]) == (1.0, 0.0)


def test_chat_is_judged_on_the_summary_alone(tmp_path: Path) -> None:
    suite = write(tmp_path / "chat.jsonl", [{"id": "c", "prompt": "Capital?", "reference": "Paris"}])
    file = write(
        tmp_path / "g.jsonl", [{"id": "c", "response": "<think>secret thoughts</think>It is Paris."}]
    )
    with ScriptedEndpoint(
        lambda request: completion('{"analysis": "same", "correctness": "correct"}')
    ) as server:
        config = EvaluationConfig(
            suites=(f"chat={suite}",), generations=str(file), dir=str(tmp_path / "out"), rewards=WORKER
        )
        config = replace(config, judge=replace(config.judge, url=server.url, model="j"))
        found = evaluation.run(config, Console(io.StringIO()))["suites"]["chat"]
        read = server.requests[0].body["messages"][0]["content"]
    assert found["pass@1"] == 1.0
    assert "It is Paris." in read
    assert "secret" not in read


def test_a_comparison_with_a_baseline_counts_wins_whatever_the_order(tmp_path: Path) -> None:
    suite = write(
        tmp_path / "chat.jsonl", [{"id": "c", "instruction": "Tell.", "output": "the baseline's words"}]
    )
    file = write(tmp_path / "g.jsonl", [{"id": "c", "response": "the better words"}])

    def judge(request: Request) -> Any:
        text = request.body["messages"][0]["content"]
        first = text.index("the better") < text.index("the baseline")
        return completion(json.dumps({"analysis": "", "label": "A>B" if first else "B>A"}))

    with ScriptedEndpoint(judge) as server:
        config = EvaluationConfig(
            suites=(f"chat={suite}",), generations=str(file), dir=str(tmp_path / "out"), rewards=WORKER
        )
        config = replace(config, judge=replace(config.judge, url=server.url, model="j"))
        found = evaluation.run(config, Console(io.StringIO()))["suites"]["chat"]
    assert found["verdicts"] == {"win": 1}


# ---------------------------------------------------------------- contests


def test_a_rating_comes_from_contests(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    problems = [{"rating": 1000 + 100 * i, "solved": i < 8} for i in range(16)]
    file = write(
        tmp_path / "c.jsonl",
        [{"contest": "1", "problems": problems}, {"rank": 2, "opponents": [1500, 1600, 1700]}],
    )
    assert cli.main(["eval", "--contests", str(file), "--dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["codeforces"]
    assert found["rating"] == pytest.approx(1750, abs=1)
    assert (found["problems"], found["solved"], found["contests"]) == (16, 8, 2)
    assert "codeforces: rating from problems 1750" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ranks, words, bounded",
    [
        ((1, 2), "rating from ranks 1", False),
        ((1,), "rating from ranks 5000 or more (a bound: all won)", True),
        ((1, 1), "rating from ranks 5000 or more (a bound: all won)", True),
        ((4,), "rating from ranks -1000 or less (a bound: all lost)", True),
        ((1, 4), "rating from ranks 1600\n", False),
    ],
)
def test_first_and_last_places_count_and_a_bound_is_told(
    ranks: tuple[int, ...], words: str, bounded: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(tmp_path / "c.jsonl", [{"rank": rank, "opponents": [1500, 1600, 1700]} for rank in ranks])
    assert cli.main(["eval", "--contests", str(file), "--dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["codeforces"]
    assert (found["ranks"], found["rank_bounded"]) == (len(ranks), bounded)
    assert words in capsys.readouterr().out


def test_a_first_place_raises_the_rating() -> None:
    def rated(*ranks: int) -> float:
        rows = [Row("c:1", 0, {"rank": rank, "opponents": [1500, 1600, 1700]}) for rank in ranks]
        return contest_metrics(rows)["rank_rating"]

    assert rated(1, 2) > rated(2) > rated(4, 2)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"problems": [{"rating": 1500}]}, "no 'solved'"),
        ({"problems": [{"rating": "x", "solved": True}]}, "rating 'x' is no number"),
        ({"rank": 5, "opponents": [1500]}, "must lie in 1..2"),
        ({"contest": 1}, "not the result of a contest"),
    ],
)
def test_a_bad_contest_is_named(row: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=f"c:3: .*{words}"):
        contest_metrics([Row("c:3", 2, row)])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "chain"], "one of a model directory, --endpoint and --generations is needed, none given"),
        (["MODEL", "--generations", "g", "--suite", "chain"], "model and generations given"),
        (["MODEL"], "nothing to evaluate"),
        (["MODEL", "--suite", "gsm9k"], "did you mean gsm8k"),
        (["nowhere", "--suite", "chain"], "no model directory nowhere"),
        (["MODEL", "--suite", "chain"], "holds no weights"),
        (["MODEL", "--suite", "chain", "--top-p", "2"], "top_p=2.0 is out of range"),
        (["MODEL", "--suite", "chain", "--template", "tiny_zer"], "did you mean \"tiny_zero\""),
        (["MODEL", "--suite", "chain", "rollout.temperature=0.7"], "set temperature="),
        (["MODEL", "--suite", "chain", "judge.ulr=x"], "did you mean 'judge.url'"),
        (["MODEL", "--suite", "chain", "--since", "2024-01-01"], "has no dates"),
        (["--suite", "chain", "--endpoint", "http://127.0.0.1:9/v1"], "needs --endpoint-model"),
        (["--suite", "chain", "--endpoint", "127.0.0.1", "--endpoint-model", "m"], "endpoint.url=127.0.0.1"),
        (["--suite", "chain", "--generations", "nowhere.jsonl"], "generations=nowhere.jsonl: no such file"),
        (["--contests", "nowhere.jsonl"], "contests=nowhere.jsonl: no such file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_no_results(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    assert cli.main(["eval", *given, "--dir", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_suite_without_generations_for_a_question_writes_nothing(maths: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no generation for 1 of 2"):
        evaluate(tmp_path / "out", maths, write(tmp_path / "g.jsonl", [{"id": "half", "response": "x"}]))
    assert not (tmp_path / "out").exists()


def test_a_chat_suite_without_a_judge_is_refused(tmp_path: Path) -> None:
    suite = write(tmp_path / "chat.jsonl", [{"id": "c", "prompt": "p", "reference": "r"}])
    file = write(tmp_path / "g.jsonl", [{"id": "c", "response": "x"}])
    with pytest.raises(ConfigError, match=r"set judge\.url="):
        evaluate(tmp_path / "out", f"chat={suite}", file)


def test_responses_are_shortened_to_the_models_positions() -> None:
    assert fitting(32768, 100, 4096, "m") == 3996
    assert fitting(1000, 100, 4096, "m") == 1000
    assert fitting(32768, 100, None, "m") == 32768
    with pytest.raises(ConfigError, match="the longest prompt has 5000 tokens"):
        fitting(10, 5000, 4096, "m")


def test_a_model_directory_is_described(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="is not JSON"):
        check_model(str(tmp_path))


def test_a_config_file_and_the_command_line_add_up(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text(
        "from r1mega.stages.evaluation_config import EvaluationConfig\nconfig = EvaluationConfig(model='m', k=4, limit=3)\n"
    )
    config = load(str(file), ["rollout.engines=2", "suites=chain,gsm8k"], k=8, limit=None)
    assert (config.model, config.k, config.limit, config.rollout.engines) == ("m", 8, 3, 2)
    assert config.suites == ("chain", "gsm8k")
