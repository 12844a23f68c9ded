"""The report of a pipeline: what its stages left is on the page, what is damaged is named, nothing becomes markup."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import ATTACK, browser, embedded

from r1mega import cli
from r1mega.config import ConfigError, GRPOConfig, RewardConfig, RunConfig
from r1mega.data.manifest import Manifest
from r1mega.overrides import to_dict
from r1mega.pipeline_folder import QUESTIONS, PipelineFolder
from r1mega.pipeline_report import table, together, write_pipeline_report
from r1mega.stages import evaluation
from r1mega.stages.console import Console
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.pipeline_state import Record, State
from r1mega.stages.run_directory import write_json
from r1mega.training.metrics import Recorder

QUESTION = "How many are {} and 2 <img>?"
RIGHT = "<think>I add two to {} and say what I get.</think>\n\nIt is \\boxed{{{}}}."
LENGTHS = {"dev1": 20.0, "dev2": 30.0, "dev2_mixed": 40.0}


def train(folder: Path, language: float, stage: str = "rl") -> None:
    """What a training run of 12 steps leaves."""
    with Recorder(folder) as recorder:
        for step in range(1, 13):
            terms = {"accuracy": step / 12, "language": language, "reward": step / 6, "eval/sampled": 0.5}
            watched = {"words/wait": 0.5, "words/but": 0.25, "reflective_words": 0.75, "aha": 0.125}
            others = watched | {
                "response_length": LENGTHS[folder.name],
                "max_tokens": 64 if step < 7 else 128,
            }
            recorder.log(step, {"nll": 3.0 / step} if stage == "sft" else terms | others)
    ends = {} if stage == "sft" else {
        when: {kind: {"accuracy": value, "format": 0.9, "n": 64} for kind in ("sampled", "greedy")}
        for when, value in (("before", 0.25), ("after", 0.75))
    }  # fmt: skip
    write_json(folder / "results.json", {"finished": True, "steps": 12} | ends)


def evaluate(folder: Path, suite: Path, right: int) -> None:
    """Answers of a model that is right in the first `right` questions, graded by the evaluation itself."""
    generations = folder.parent / f"{folder.name}.jsonl"
    questions = [json.loads(line) for line in suite.read_text().splitlines()]
    rows = []
    for n, question in enumerate(questions):
        first, second = (RIGHT.format(n, answer) for answer in (question["answer"], -1))
        rows.append({"id": question["id"], "responses": [first, first if n < right else second]})
    generations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluationConfig(
        suites=(str(suite),), generations=str(generations), dir=str(folder), rewards=RewardConfig(workers=1)
    )
    evaluation.run(config, Console(io.StringIO()))
    generations.unlink()


def record(command: str, config: dict[str, Any], sources: dict[str, str], **more: Any) -> Record:
    return Record(
        status="finished", command=command, config=config, sources=sources, attempts=1, wall_seconds=90.0,
        cpu_seconds=120.0, tokens=4500, **more,
    )  # fmt: skip


def settings(stage: str, language: float = 0.0) -> dict[str, Any]:
    weights = {"accuracy": 1.0, "language": language}
    return to_dict(
        RunConfig(stage=stage, grpo=GRPOConfig(group_size=5), rewards=RewardConfig(weights=weights))
    )


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline's folder, written by what writes it in earnest."""
    handler = signal.getsignal(signal.SIGTERM)
    dir = tmp_path_factory.mktemp("pipelines") / "small"
    with State(dir, "small", f"Small {ATTACK}") as state:
        state.records = {
            "data": record("data", {}, {}, title=ATTACK),
            "dev1": record("run", settings("sft"), {"data.path": "data/data.jsonl"}),
            "dev2": record("run", settings("rl", 1.0), {"model.path": "dev1/hf"}, title="with the reward"),
            "dev2_mixed": record("run", settings("rl"), {"model.path": "dev1/hf"}),
            "eval_dev2": record("eval", {}, {"model": "dev2/hf"}),
            "eval_dev1": record("eval", {}, {"model": "dev1/hf"}),
        }
        state.save()
    manifest = Manifest()
    row = {"task": "math", "tokens": 30, "response": RIGHT, "lineage": {"round": 1, "source": "zero"}}
    for _ in range(3):
        manifest.add(row)
    manifest.dropped["language:mixed"] = 7
    (dir / "data").mkdir()
    write_json(dir / "data/manifest.json", manifest.as_dict())
    train(dir / "dev1", 0.0, "sft")
    train(dir / "dev2", 0.9)
    train(dir / "dev2_mixed", 0.3)
    suite = dir.parent / "sums.jsonl"
    suite.write_text("".join(
        json.dumps({"id": f"q{n}", "question": QUESTION.format(n), "answer": str(n + 2)}) + "\n" for n in range(12)
    ))  # fmt: skip
    evaluate(dir / "eval_dev1", suite, right=3)
    evaluate(dir / "eval_dev2", suite, right=12)
    signal.signal(signal.SIGTERM, handler)
    return dir


@pytest.fixture
def pipeline(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "small"))


def cells(page: str, card: str, row: str) -> list[str]:
    """The texts of the row that begins with `row`, in the table under the heading `card`."""
    inside = page.split(f">{card}</h", 1)[1]
    (found,) = re.findall(rf"<tr[^>]*><th>{re.escape(row)}</th>(.*?)</tr>", inside.split("</table>")[0])
    return [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in found.split("</td>")[:-1]]


def problems(page: str) -> list[str]:
    return re.findall(r"<li>(.*?)</li>", page)


def test_the_page_holds_every_stage(pipeline: Path) -> None:
    path = write_pipeline_report(pipeline)
    page = path.read_text()
    assert path == pipeline / "report.html"
    assert problems(page) == []
    value, interval, _, cons, best, form, language, readable, *_, questions, k = cells(
        page, "Evaluated on sums", "dev1"
    )
    assert (value, cons, best, questions, k) == ("62.5%", "62.5%", "100.0%", "12", "2")
    assert re.fullmatch(r"\d+\.\d% to \d+\.\d%", interval)
    assert (form, language, readable) == ("100.0%", "100.0%", "100.0%")
    assert cells(page, "Evaluated on sums", "dev2")[0] == "100.0%"
    own = "Measured by the stages themselves"
    assert cells(page, own, "dev2")[1:6] == ["12", "25.0% → 75.0%", "25.0% → 75.0%", "90.0%", "90.0%"]
    assert cells(page, own, "dev1")[-1] == "1.22 → 0.327"  # means of 3 / step over steps 1 to 6 and 7 to 12
    assert cells(page, "data", "Math") == ["3", "1.0", "30.0", "3"]
    assert cells(page, "data", "Total") == ["3", "1.0", "30.0", "3"]
    assert "Dropped: language:mixed 7." in page
    assert cells(page, "Cost", "dev2")[:6] == ["rl", "finished", "1", "90 s", "2.0 min", "4,500"]
    assert cells(page, "Cost", "Total")[3:6] == ["9.0 min", "12.0 min", "27,000"]
    assert not [entry.name for entry in pipeline.iterdir() if entry.name.startswith(".report")]


def test_an_ablation_shares_its_picture_and_names_the_difference(pipeline: Path) -> None:
    (group,) = embedded(write_pipeline_report(pipeline).read_text())["groups"]
    assert group["title"] == "dev2 against dev2_mixed"
    assert group["note"] == "They differ in rewards.weights.language 1.0 / 0.0."
    columns = group["metrics"]
    assert columns["step"] == list(range(13))
    assert (columns["dev2/language"][1], columns["dev2_mixed/language"][1]) == (0.9, 0.3)
    assert columns["dev2/reflective_words"] == [None] + [0.75] * 12
    assert columns["dev2_mixed/response_length"] == [None] + [40.0] * 12
    assert columns["dev2/eval/sampled"] == [0.25] + [0.5] * 12, "before the first step too"


def test_language_mixing_is_charted_also_where_language_is_no_term() -> None:
    rows = [
        {"step": 1, "accuracy": 0.5, "language_mixing": 0.25},
        {"step": 2, "language_mixing": 0.5, "language": 0.1},
    ]
    assert together({"zero": rows})["zero/language"] == [0.75, 0.5]
    assert together({"old": [{"step": 1, "language": 0.1}]})["old/language"] == [0.1]


def test_runs_of_different_length_share_one_axis() -> None:
    long = [{"step": step, "accuracy": float(step)} for step in range(1, 3001)]
    columns = together({"long": long, "short": [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": 0.7}]})
    assert columns["step"][:2] == [2, 4]
    assert len(columns["step"]) == 1500
    assert columns["long/accuracy"][:2] == [1.5, 3.5]
    assert columns["short/accuracy"][:2] == [0.6, None]


def test_stages_answer_the_same_questions(pipeline: Path) -> None:
    entries = embedded(write_pipeline_report(pipeline).read_text())["answers"]
    assert len(entries) == QUESTIONS
    assert len({entry["question"] for entry in entries}) == QUESTIONS
    for entry in entries:
        assert [answer["stage"] for answer in entry["answers"]] == ["dev1", "dev2"]
        assert all(answer["correct"] for answer in entry["answers"])
        assert entry["question"].startswith("How many are")


def test_of_stages_that_were_asked_differently_the_common_questions_are_shown(pipeline: Path) -> None:
    file = pipeline / "eval_dev1/generations/sums.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = {f"q{n}" for n in (2, 5, 11)}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["id"] in kept))
    entries = embedded(write_pipeline_report(pipeline).read_text())["answers"]
    assert [[answer["stage"] for answer in entry["answers"]] for entry in entries] == [["dev1", "dev2"]] * 3
    for entry in entries:
        texts = [answer["response"] for answer in entry["answers"]]
        assert len({text.split("</think>")[0] for text in texts}) == 1, "of one question"
        assert all(entry["question"].split()[3] in text for text in texts)


def test_stages_stand_in_columns_as_in_the_papers_table(pipeline: Path) -> None:
    page = write_pipeline_report(pipeline).read_text()
    heads = re.findall(r"<th>(.*?)</th>", page.split(">Stage by stage</h3>")[1].split("</thead>")[0])
    assert heads == ["", "dev1", "dev2"]
    assert cells(page, "Stage by stage", "sums, pass@1") == ["62.5%", "100.0%"]
    assert cells(page, "Stage by stage", "sums, language consistency") == ["100.0%", "100.0%"]


def test_each_suite_has_rows_of_its_own_and_hides_no_other(pipeline: Path) -> None:
    """Format rises in one suite and is nil in another: their mean is nowhere."""
    for stage in ("dev1", "dev2"):
        folder = pipeline / f"eval_{stage}"
        rows = [json.loads(line) for line in (folder / "generations/sums.jsonl").read_text().splitlines()]
        if stage == "dev1":
            (folder / "generations/sums.jsonl").write_text(
                "".join(json.dumps(row | {"response": "no tags"}) + "\n" for row in rows)
            )
        (folder / "generations/talk.jsonl").write_text(
            "".join(json.dumps(row | {"response": "I do not think"}) + "\n" for row in rows)
        )
        results = json.loads((folder / "results.json").read_text())
        sums = results["suites"]["sums"]
        results["suites"]["talk"] = {k: v for k, v in sums.items() if k != "language_consistency"} | {
            "truncated": 0.5
        }
        write_json(folder / "results.json", results)
    page = write_pipeline_report(pipeline).read_text()
    assert cells(page, "Stage by stage", "sums, format") == ["0.0%", "100.0%"]
    assert cells(page, "Stage by stage", "talk, format") == ["0.0%", "0.0%"]
    assert cells(page, "Stage by stage", "talk, cut") == ["50.0%", "50.0%"]
    assert "talk, language consistency" not in page, "no row without a value"


def test_the_end_of_the_pipeline_heads_the_page_not_a_control_that_ran_last(pipeline: Path) -> None:
    with State(pipeline, "small", "Small") as state:
        state.records |= {
            "alone": record("run", settings("sft"), {"data.path": "data/data.jsonl"}),
            "eval_alone": record("eval", {}, {"model": "alone/hf"}),
        }
        state.save()
    shutil.copytree(pipeline / "dev1", pipeline / "alone")
    shutil.copytree(pipeline / "eval_dev1", pipeline / "eval_alone")
    page = write_pipeline_report(pipeline).read_text()
    assert "dev2 on sums, pass@1" in page
    assert "alone on sums, pass@1" not in page


def test_gpu_time_stands_beside_cpu_time_where_gpus_were_held(pipeline: Path) -> None:
    assert "GPU time" not in write_pipeline_report(pipeline).read_text()
    with State(pipeline, "small", "Small") as state:
        state.records["dev2"].gpu_seconds = 16 * 90.0
        state.save()
    page = write_pipeline_report(pipeline).read_text()
    assert cells(page, "Cost", "dev2")[3:7] == ["90 s", "2.0 min", "24.0 min", "4,500"]
    assert cells(page, "Cost", "dev1")[3:7] == ["90 s", "2.0 min", "—", "4,500"]
    assert cells(page, "Cost", "Total")[3:7] == ["9.0 min", "12.0 min", "24.0 min", "27,000"]


def test_the_papers_numbers_are_the_papers(pipeline: Path) -> None:
    page = write_pipeline_report(pipeline).read_text()
    stages = cells(page, "The paper&#x27;s stages", "AIME 2024, pass@1 (%)")
    assert stages == ["77.9", "59.0", "74.0", "78.1", "79.8"]
    assert cells(page, "The paper&#x27;s stages", "Codeforces, rating")[-1] == "2,029"
    assert cells(page, "The paper&#x27;s data for Dev-3", "Total") == ["804,745", "1.0", "5,355.3"]
    assert "not measured here" in page


def test_nothing_leaves_the_page_and_no_text_becomes_markup(pipeline: Path) -> None:
    page = write_pipeline_report(pipeline).read_text()
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "http" not in page.replace("http-equiv", "")
    ours = page.replace(html.escape(ATTACK), "")
    assert not re.search(r"src=|href=|url\(|@import|<link|fetch\(|XMLHttpRequest", ours)
    assert table(["<b>"], [["<i>", "<u>"]]).count("&lt;") == 3


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("dev1/results.json", '{"finished": tr', "dev1/results.json cannot be read"),
        ("dev1/results.json", "[1]", "dev1/results.json cannot be read: a list and not an object"),
        ("dev2/metrics.jsonl", '{"stop": 1}\n', "dev2/metrics.jsonl cannot be read: no 'step'"),
        ("dev2/metrics.jsonl", None, "dev2/metrics.jsonl is missing, though dev2 is finished"),
        ("data/manifest.json", None, "data/manifest.json is missing, though data is finished"),
        ("eval_dev2/results.json", None, "eval_dev2/results.json is missing, though eval_dev2 is finished"),
        ("eval_dev2/generations/sums.jsonl", '{"id": 1}\n', "eval_dev2/generations/sums.jsonl cannot be read"),
        ("eval_dev2/generations/sums.jsonl", "\0\n", "eval_dev2/generations/sums.jsonl cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_or_missing_file_is_named_and_the_rest_is_shown(
    pipeline: Path, file: str, text: str | None, said: str
) -> None:
    (pipeline / file).unlink() if text is None else (pipeline / file).write_text(text)
    page = write_pipeline_report(pipeline).read_text()
    (problem,) = problems(page)
    assert html.unescape(problem).startswith(said)
    assert cells(page, "Evaluated on sums", "dev1")[0] == "62.5%"
    assert cells(page, "Cost", "Total")[5] == "27,000"


def test_a_half_done_pipeline_is_reported_as_far_as_it_is(pipeline: Path) -> None:
    for name in ("dev2_mixed", "eval_dev1", "eval_dev2"):
        shutil.rmtree(pipeline / name)
    results = json.loads((pipeline / "dev2/results.json").read_text())
    write_json(pipeline / "dev2/results.json", {"before": results["before"]})
    with (pipeline / "dev2/metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "acc')  # the stage is writing
    with State(pipeline, "small", "Small") as state:
        for name in ("dev2_mixed", "eval_dev1", "eval_dev2"):
            del state.records[name]
        state.records["dev2"].status = "running"
        state.save()
    page = write_pipeline_report(pipeline).read_text()
    assert problems(page) == []
    assert cells(page, "Measured by the stages themselves", "dev2")[2] == "25.0% → …"
    assert ">2 of 3<" in page  # stages finished
    assert cells(page, "Cost", "dev2")[1] == "running, or stopped"
    assert embedded(page)["groups"][0]["metrics"]["step"] == list(range(13))
    assert "No stage has been evaluated yet." in page


def test_a_failed_stage_says_why_and_an_alarm_is_repeated(pipeline: Path) -> None:
    with State(pipeline, "small", "Small") as state:
        state.records["eval_dev1"].status, state.records["eval_dev1"].message = (
            "failed",
            "exit code 1: <no> memory",
        )
        state.save()
    results = json.loads((pipeline / "dev2/results.json").read_text())
    write_json(pipeline / "dev2/results.json", results | {"alarms": ["the helpful reward looks hacked"]})
    page = write_pipeline_report(pipeline).read_text()
    assert problems(page) == [
        "eval_dev1 failed: exit code 1: &lt;no&gt; memory",
        "dev2: the helpful reward looks hacked",
    ]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"stages": [1]}', '{"stages": {"a": 1}}', '{"stages": {"a": {"tokens": "x"}}}']
)
def test_a_damaged_pipeline_json_is_one_line(pipeline: Path, text: str) -> None:
    (pipeline / "pipeline.json").write_text(text)
    with pytest.raises(ConfigError, match=r"pipeline\.json"):
        PipelineFolder(pipeline)


def test_the_command_takes_pipelines_and_runs(
    pipeline: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["report", str(pipeline)]) == 0
    assert capsys.readouterr().out.strip() == str(pipeline / "report.html")
    (pipeline / "dev1/config.json").write_text(json.dumps(settings("sft")))
    assert cli.main(["report", str(pipeline / "dev1")]) == 0
    assert "r1mega run" in (pipeline / "dev1/report.html").read_text()
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nor of a pipeline" in line


PIPELINE = """
from r1mega.stages.command import CommandStage
from r1mega.stages.graph import Pipeline, Stage

pipeline = Pipeline(stages=(Stage("only", CommandStage(argv=("touch", "{out}/made"), makes=("made",))),))
"""


def test_a_pipeline_ends_with_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (root, root / "kernels"))))
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    assert cli.main(["pipeline", str(tmp_path), f"dir={tmp_path / 'run'}"]) == 0
    assert str(tmp_path / "run/report.html") in capsys.readouterr().out
    assert cells((tmp_path / "run/report.html").read_text(), "Cost", "only")[:3] == [
        "command",
        "finished",
        "1",
    ]


PROBE = """<script>
document.getElementById("theme").click();
document.querySelectorAll("details")[1].open = true;
charts[0].svg.dispatchEvent(new PointerEvent("pointermove", { clientX: 200, clientY: 60, bubbles: true }));
document.getElementById("smoothing").value = 0.5;
document.getElementById("smoothing").dispatchEvent(new Event("input"));
document.title = "charts " + charts.length + ", questions " + document.querySelectorAll("details").length
  + ", " + getComputedStyle(document.querySelector(".graph text")).fill
  + ", " + getComputedStyle(document.querySelector(".abreast pre")).whiteSpace
  + (document.querySelector(".abreast pre").textContent.includes(".</think>\\n\\nIt is") ? " with lines" : "")
  + ", " + [...document.querySelectorAll("text")].filter((text) => text.textContent.startsWith("limit")).length + " limits";
</script></body>"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_the_page_without_errors(pipeline: Path, tmp_path: Path, theme: str) -> None:
    program = browser()
    path = write_pipeline_report(pipeline)
    other = {"light": "dark", "dark": "light"}[theme]
    path.write_text(path.read_text().replace("</body>", f"<script>setTheme('{other}')</script>{PROBE}"))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run"
    )
    command = [program, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    colour = {"light": "rgb(29, 33, 41)", "dark": "rgb(237, 240, 245)"}[theme]
    assert (
        f"<title>charts 8, questions {QUESTIONS}, {colour}, pre-wrap with lines, 3 limits</title>"
        in done.stdout
    )
    dom = done.stdout.split("</main>")[0]
    assert "&lt;img&gt;" in dom
    assert "<img" not in dom
