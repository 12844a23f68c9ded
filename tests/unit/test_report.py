"""The HTML report: complete, self-contained, safe against what a model writes, and alive in a browser."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from r1mega.config import GRPOConfig, ModelConfig, RunConfig
from r1mega.overrides import to_dict
from r1mega.report import MAX_TEXT, learning_curve_svg, merge_steps, running_mean, spread, thin, write_report

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> {{data}} & \u2028"


def sample(step, response="<think>2</think><answer>4</answer>", verdict="equal"):
    return {
        "step": step, "prompt_id": f"p{step}", "index": 0, "question": "2 + 2?", "answer": "4", "response": response,
        "response_length": 9, "finish_reason": "stop", "weight_version": step, "reward": 2.0,
        "terms": {"accuracy": 1.0, "format": 1.0}, "verdicts": {"accuracy": verdict, "format": "ok"},
    }  # fmt: skip


def metric(step):
    names = (
        "reward accuracy format response_length truncated kl entropy clip_fraction grad_norm loss lr "
        "logprob_mismatch_mean logprob_mismatch_max zero_std_groups tokens_per_second samples_per_second "
        "max_tokens aha reflective_words language language_mixing value_loss explained_variance returns "
        "peak_memory_gib time/generate time/score time/pack time/train time/sync time/step verdict/equal words/wait"
    )
    row = {"step": step, "time": 1e9 + step} | dict.fromkeys(names.split(), 0.01 * step)
    row["max_tokens"] = 64 if step < 20 else 128 if step < 50 else 256
    return row | ({"eval/sampled": 0.1, "eval/greedy": 0.2} if step % 5 == 0 else {})


def write_run(path, num_steps=12, samples=(), results=None):
    path.mkdir(exist_ok=True)
    config = RunConfig(num_steps=99, model=ModelConfig(path=ATTACK), grpo=GRPOConfig(group_size=5))
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(metric(step)) + "\n" for step in range(num_steps)))
    if samples:
        (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    if results:
        (path / "results.json").write_text(json.dumps(results))
    return path


RESULTS = {
    "before": {"sampled": {"accuracy": 0.213, "n": 512, "ci": [0.18, 0.25]}, "greedy": {"accuracy": 0.25}},
    "after": {"sampled": {"accuracy": 0.871, "n": 512, "ci": 0.03}, "greedy": {"accuracy": 0.9}},
    "chance": 0.1,
}


def embedded(page):
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert text
    return json.loads(text[1])


def test_the_report_holds_the_run(tmp_path):
    run = write_run(tmp_path / "my_run", samples=[sample(3), sample(4, verdict="unequal")], results=RESULTS)
    (run / "lineage.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "hardware": {"cores": 2}}))
    path = write_report(run)
    page = path.read_text()
    data = embedded(page)
    assert path == run / "report.html"
    assert "my_run" in page
    assert data["metrics"]["step"] == list(range(12))
    assert data["metrics"]["eval/sampled"] == [0.1, *[None] * 4, 0.1, *[None] * 4, 0.1, 0.871], (
        "and after the end"
    )
    assert [line["step"] for line in data["samples"]] == [3, 4]
    assert data["chance"] == 0.1
    for words in (
        "21.3% →",
        "87.1%",
        "grpo.group_size",
        "versions.torch",
        "2.13.0",
        "last step 11, 99 planned",
    ):
        assert words in page
    assert not [entry.name for entry in run.iterdir() if entry.name.startswith(".")]


def test_the_report_asks_for_nothing_outside_itself(tmp_path):
    page = write_report(write_run(tmp_path, samples=[sample(1)])).read_text()
    assert "http://" not in page
    assert "https://" not in page
    ours = page.replace(html.escape(ATTACK), "")
    assert not re.search(r"src=|href=|url\(|@import|<link|fetch\(|XMLHttpRequest", ours)
    assert "default-src 'none'" in page


def test_text_of_models_and_configs_never_becomes_markup(tmp_path):
    lines = [
        sample(1, response=ATTACK) | {"question": ATTACK, "prompt_id": ATTACK, "verdicts": {ATTACK: ATTACK}}
    ]
    run = write_run(tmp_path, samples=lines)
    (run / "lineage.json").write_text(json.dumps({ATTACK: ATTACK}))
    page = write_report(run).read_text()
    assert page.count("<script") == 2
    assert "<img" not in page
    assert embedded(page)["samples"][0]["response"] == ATTACK
    assert "&lt;/script&gt;" in page


def test_a_run_without_optional_files_still_has_a_report(tmp_path):
    page = write_report(write_run(tmp_path, num_steps=0)).read_text()
    assert embedded(page)["samples"] == []


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_directory_that_is_no_run_is_named(tmp_path, name):
    (write_run(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        write_report(tmp_path)


def test_long_runs_and_texts_are_thinned(tmp_path):
    rows = [{"step": step, "x": float(step), "rare": 1.0 if step == 5 else None} for step in range(1000)]
    assert len(thin(rows, 300)) == 250
    assert thin(rows, 300)[1] == {"step": 7, "x": 5.5, "rare": 1.0}
    assert thin(rows, 1000) == rows
    samples = [sample(step, response="x" * (MAX_TEXT + 50)) for step in range(700)]
    data = embedded(write_report(write_run(tmp_path, samples=samples)).read_text())
    assert data["num_samples"] == 700
    assert len(data["samples"]) == 600
    assert data["samples"][-1]["step"] == 699
    assert "[… 50 characters left out …]" in data["samples"][0]["response"]
    assert spread(samples[:3], 3) == samples[:3]


def test_two_lines_of_one_step_become_one_row():
    assert merge_steps([{"step": 1, "a": 1}, {"step": 0, "a": 0}, {"step": 1, "b": 2}]) == [
        {"step": 0, "a": 0},
        {"step": 1, "a": 1, "b": 2},
    ]


def test_the_learning_curve_is_a_well_formed_picture():
    text = learning_curve_svg([metric(step) for step in range(20)], title="a < b & c")
    root = ElementTree.fromstring(text)
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}polyline")) == 4
    assert len(root.findall(f"{tag}circle")) == 2 * 4 + 2
    assert "a < b & c" in [node.text for node in root.iter(f"{tag}text")]
    assert "prefers-color-scheme:dark" in text
    assert text.count("http") == 1
    ElementTree.fromstring(learning_curve_svg([]))


def test_the_running_mean_of_a_constant_is_the_constant():
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)


def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no browser: install the package chromium to render the report")


PROBE = """<script>
document.querySelector("details").open = true;
charts[0].svg.dispatchEvent(new PointerEvent("pointermove", { clientX: 200, clientY: 60, bubbles: true }));
document.getElementById("filter-verdict").value = "not equal";
document.getElementById("filter-verdict").dispatchEvent(new Event("input"));
document.title = "rows " + document.querySelectorAll("details").length;
document.getElementById("filter-verdict").value = "";
document.getElementById("filter-verdict").dispatchEvent(new Event("input"));
document.querySelector("details").open = true;
document.getElementById("smoothing").value = 0.9;
document.getElementById("smoothing").dispatchEvent(new Event("input"));
document.getElementById("theme").click();
</script></body>"""


@pytest.mark.parametrize("num_steps", [1, 60])
def test_a_browser_draws_the_report_without_errors(tmp_path, num_steps):
    program = browser()
    samples = [sample(0, response=ATTACK), sample(1, verdict="unequal"), sample(2, verdict="timeout")]
    path = write_report(write_run(tmp_path / "run", num_steps, samples, RESULTS))
    path.write_text(path.read_text().replace("</body>", PROBE))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run"
    )
    command = [program, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>rows 2</title>" in done.stdout
    dom = done.stdout.split("</main>")[0]
    assert dom.count("<figure") == 29
    assert dom.count("<path") >= 25
    assert "The paper: R1-Zero, AIME 2024 pass@1" in dom
    assert dom.count('class="cursor"') == 27, "the pointer's step marks every chart but the paper's two"
    assert dom.count("limit ") == (4 if num_steps == 60 else 0) + 2, (
        "two changes of the length limit in two charts, and the paper's one in its two"
    )
    assert not re.search(r"NaN|undefined|Infinity", dom)
    assert "&lt;img src=x" in dom
    assert "<img" not in dom
