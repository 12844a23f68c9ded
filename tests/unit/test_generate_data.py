"""The data stage around its sampler: scripted texts stand in shards as if sampled; all that follows is real."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import ScriptedEndpoint, completion, error, in_turn, verdict

from r1mega import cli, overrides
from r1mega.config import DataConfig, JudgeConfig, ModelConfig, RewardConfig, RolloutConfig
from r1mega.data.recipes import ColdStart, GenerateData, RejectionSampling
from r1mega.samples import Prompt
from r1mega.stages.console import Console
from r1mega.stages.generate_data import Generation
from r1mega.stages.run_directory import RunDirectory

TINY = Path(__file__).parents[2] / "configs/tiny/model"


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """What every config here has: a model that is never loaded, five questions, two samples of each."""
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model/model.safetensors").touch()
    questions = [{"question": f"{n} + {n}", "answer": str(2 * n)} for n in range(5)]
    return {
        "dir": str(tmp_path / "out"),
        "platform": "cpu",
        "samples": 2,
        "shard_size": 2,
        "model": ModelConfig(path=str(tmp_path / "model"), dtype="float32"),
        "data": DataConfig(
            path=write(tmp_path / "q.jsonl", *questions), template="tiny_zero", max_prompt_tokens=64
        ),
        "rollout": RolloutConfig(max_tokens=((0, 64),)),
        "rewards": RewardConfig(weights={"accuracy": 1.0}, workers=1),
    }


def answer(prompt: Prompt, index: int) -> str:
    """The first sample is right, the second is not."""
    return f"<think>we try {prompt.question}</think><answer>{prompt.answer if index == 0 else 'x'}</answer>"


def sample(config: GenerateData, text: Callable[[Prompt, int], str] = answer) -> None:
    """Write every shard of samples."""

    async def make(prompts: Any) -> list[dict[str, Any]]:
        return [
            {"prompt": p.id, "index": i, "text": text(p, i), "tokens": 9, "finish_reason": "stop"}
            for p in prompts
            for i in range(config.samples)
        ]

    with RunDirectory(Path(config.dir), config) as directory:
        for work in Generation(config, directory, Console(io.StringIO())).works:
            for shard in work.samples:
                asyncio.run(shard.rows(make))


def r1mega_data(config: GenerateData, tmp_path: Path, *more: str) -> int:
    file = tmp_path / "config.py"
    file.write_text(overrides.to_python(config))
    return cli.main(["data", str(file), *more])


def test_rejection_sampling_leaves_right_rows_a_manifest_and_their_lineage(
    tmp_path: Path, settings: Any
) -> None:
    evaluation = write(tmp_path / "eval.jsonl", {"question": "3 + 3", "answer": "6"})
    general = write(tmp_path / "general.jsonl", {"question": "hello", "response": "Hi!"})
    config = RejectionSampling(**settings, general=general, decontaminate=(evaluation,))
    sample(config)
    assert r1mega_data(config, tmp_path) == 0
    out = tmp_path / "out"
    rows = read(out / "data.jsonl")
    assert [row["question"] for row in rows] == ["0 + 0", "1 + 1", "2 + 2", "4 + 4", "hello"]
    assert rows[1]["response"] == "<think>we try 1 + 1</think><answer>2</answer>"
    assert rows[1]["lineage"]["model"].startswith(f"{tmp_path}/model sha256:")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["dropped"] == {"accuracy:unequal": 4, "prompts: contaminated": 1}
    assert manifest["sources"] == {"rejection_sampling": 4, "general": 1}
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] is True
    assert results["tokens"] == 4 * 2 * 9, "of all samples, dropped ones too"
    inputs = json.loads((out / "lineage.json").read_text())["inputs"]
    assert set(inputs) == {"model.path", "data.path", "decontaminate.0", "general"}
    before = (out / "data.jsonl").stat().st_mtime_ns
    assert r1mega_data(config, tmp_path) == 0
    assert (out / "data.jsonl").stat().st_mtime_ns == before


def test_the_cold_start_rewrites_checks_again_and_counts(tmp_path: Path, settings: Any) -> None:
    config = ColdStart(**settings, rewriting="rules", template="tiny_chat", size=3)
    sample(config)
    assert r1mega_data(config, tmp_path) == 0
    rows = read(tmp_path / "out/data.jsonl")
    assert [row["response"] for row in rows] == [
        f"<think>I try {n} + {n}</think>\\boxed{{{2 * n}}}" for n in range(3)
    ]
    assert {(row["lineage"]["rewriter"], row["lineage"]["source"]) for row in rows} == {("rules", "r1_zero")}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["dropped"]["size"] == 2
    assert manifest["first_person"]["before"] == {"I": 0, "we": 5, "share": 0.0}
    assert manifest["first_person"]["after"] == {"I": 5, "we": 0, "share": 1.0}


def test_rows_of_people_come_first_and_the_sources_share_the_rest(tmp_path: Path, settings: Any) -> None:
    """Each source has per_prompt of its own, people have no limit, and of two equal rows theirs stays."""
    written = [
        {"id": n, "question": "1 + 1", "response": f"<think>I {verb}</think>\\boxed{{2}}", "answer": "2"}
        for n, verb in enumerate(("add", "count", "try 1 + 1"))
    ]
    (tmp_path / "direct.txt").write_text("Think: {question}<think>\n")
    config = ColdStart(
        **settings, sources=("direct", "r1_zero", "human"), human=write(tmp_path / "people.jsonl", *written),
        direct=str(tmp_path / "direct.txt"), rewriting="rules", template="tiny_chat", per_prompt=1, size=7,
    )  # fmt: skip

    def text(prompt: Prompt, index: int) -> str:
        if prompt.text.endswith("<think>\n"):
            return f"I am asked {prompt.question}\n</think>\n\n\\boxed{{{prompt.answer}}}"
        return answer(prompt, index)

    sample(config, text)
    assert r1mega_data(config, tmp_path) == 0
    rows = read(tmp_path / "out/data.jsonl")
    assert [(row["lineage"]["source"], row["question"]) for row in rows] == [
        *[("human", "1 + 1")] * 3,
        ("direct", "0 + 0"), ("direct", "1 + 1"),
        ("r1_zero", "0 + 0"), ("r1_zero", "2 + 2"),
    ]  # fmt: skip
    dropped = json.loads((tmp_path / "out/manifest.json").read_text())["dropped"]
    assert (dropped["duplicate"], dropped["size"], dropped["per_prompt"]) == (1, 5, 5)


def test_a_rewriting_that_changes_the_answer_is_dropped(tmp_path: Path, settings: Any) -> None:
    def rewrite(request: Any) -> Any:
        right = "4" if "2 + 2" in request.text else "5"
        return completion(f"<think>\nI add.\n</think>\n\n\\boxed{{{right}}}")

    with ScriptedEndpoint(rewrite) as server:
        config = ColdStart(**settings, rewriter=JudgeConfig(url=server.url, model="v3"), template="tiny_chat")
        sample(config)
        assert r1mega_data(config, tmp_path) == 0
    (row,) = read(tmp_path / "out/data.jsonl")
    assert (row["question"], row["lineage"]["rewriter"]) == ("2 + 2", f"v3 at {server.url}")
    dropped = json.loads((tmp_path / "out/manifest.json").read_text())["dropped"]
    assert dropped["rewritten accuracy:unequal"] == 4


@pytest.mark.parametrize("who", ["judge", "rewriter"])
def test_an_endpoint_that_is_down_stops_the_stage_by_name_and_the_same_command_goes_on(
    tmp_path: Path, settings: Any, who: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("r1mega.rewards.endpoint.MAX_TRIES", 1)
    down = False

    def script(request: Any) -> Any:
        if down:
            return error(503, "starting")
        return verdict("correct") if who == "judge" else completion("<think>\nI add.\n</think>\n\n\\boxed{4}")

    with ScriptedEndpoint(script) as server:
        endpoint = JudgeConfig(url=server.url, model="v3")
        if who == "judge":
            data = replace(settings["data"], task="essay")
            config: Any = RejectionSampling(**(settings | {"data": data}), judge=endpoint)
        else:
            config = ColdStart(**settings, rewriter=endpoint, template="tiny_chat")
        sample(config)
        down = True
        assert r1mega_data(config, tmp_path) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith(f"r1mega: {server.url}, model v3: no ")
        assert message.endswith("start the server or correct its url, and the same command goes on")
        assert "\n" not in message
        out = tmp_path / "out"
        assert not (out / "data.jsonl").exists()
        assert not list(out.rglob(".writing-*"))
        down = False
        assert r1mega_data(config, tmp_path) == 0
    rows = read(out / "data.jsonl")
    assert len(rows) == (10 if who == "judge" else 1)
    assert (rows[0]["lineage"]["judge"] is not None) == (who == "judge")


def test_what_people_wrote_is_read_before_anything_is_sampled(
    tmp_path: Path, settings: Any, capsys: pytest.CaptureFixture
) -> None:
    bad = write(
        tmp_path / "human.jsonl", {"question": "2 + 2", "response": "<think>never closed", "answer": "4"}
    )
    for human, words in (
        ("nowhere.jsonl", "human=nowhere.jsonl: no such file"),
        (bad, "jsonl:1: the response's tags"),
    ):
        config = ColdStart(
            **settings, sources=("r1_zero", "human"), human=human, rewriting="none", template="tiny_chat"
        )
        assert r1mega_data(config, tmp_path) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out/samples").exists()


def test_thoughts_of_general_rows_are_written_once(tmp_path: Path, settings: Any) -> None:
    general = write(
        tmp_path / "general.jsonl",
        {"question": "hello", "response": "Hi!", "task": "writing"},
        {"question": "Please write about the sea.", "response": "Blue.", "task": "writing"},
    )
    with ScriptedEndpoint(in_turn(completion("It is big."))) as server:
        rewriter = JudgeConfig(url=server.url, model="v3")
        config = RejectionSampling(**settings, general=general, reasoned=("writing",), rewriter=rewriter)
        sample(config)
        assert r1mega_data(config, tmp_path) == 0
        assert len(server.requests) == 1
    rows = [row for row in read(tmp_path / "out/data.jsonl") if row["task"] == "writing"]
    assert [row["response"] for row in rows] == ["Hi!", "<think>It is big.</think><answer>Blue.</answer>"]


def test_people_review_edit_and_are_checked(
    tmp_path: Path, settings: Any, capsys: pytest.CaptureFixture
) -> None:
    config = ColdStart(**settings, rewriting="rules", template="tiny_chat", review="files")
    sample(config)

    def passed(name: str, edited: str = "") -> None:
        file = tmp_path / "out/review" / f"{name}.jsonl"
        lines = [line | {"verdict": "keep"} for line in read(file)]
        if edited:
            lines[0] |= {"verdict": "edit", "edited": edited}
        write(file, *lines)

    assert r1mega_data(config, tmp_path) == 2
    assert "5 of 5 rows wait for review" in capsys.readouterr().err
    passed("pass1", edited="<think>I doubt it.</think>\\boxed{1}")
    assert r1mega_data(config, tmp_path) == 2
    passed("pass2")
    assert r1mega_data(config, tmp_path) == 2
    assert (
        "row r1_zero/q.jsonl:0#0: what people wrote does not give the answer '0'" in capsys.readouterr().err
    )
    assert not (tmp_path / "out/data.jsonl").exists()
    passed("pass2", edited="<think>I see it.</think>\\boxed{0}")
    assert r1mega_data(config, tmp_path) == 0
    rows = read(tmp_path / "out/data.jsonl")
    assert rows[0]["response"] == "<think>I see it.</think>\\boxed{0}"
    assert [row["lineage"]["source"] for row in rows] == ["human", *["r1_zero"] * 4]


def test_inputs_that_cannot_be_used_end_in_one_line(
    tmp_path: Path, settings: Any, capsys: pytest.CaptureFixture
) -> None:
    bad = write(
        tmp_path / "bad.jsonl", {"question": "1 + 1", "answer": "2"}, {"question": "2 + 2", "answer": None}
    )
    cases = {
        r"bad.jsonl:2: no answer, and task 'math' is judged by one": {
            "data": replace(settings["data"], path=bad)
        },
        "nowhere: no such file": {"data": replace(settings["data"], path="nowhere")},
        "no tokenizer directory at nowhere": {"model": ModelConfig(path="nowhere")},
        "decontaminate=nowhere: no such file": {"decontaminate": ("nowhere",)},
        "general=nowhere: no such file": {"general": "nowhere"},
        "the term 'helpful' is no yes or no": {"rewards": RewardConfig(weights={"helpful": 1.0})},
        "rewards.weights: no term 'acuracy'": {"rewards": RewardConfig(weights={"acuracy": 1.0})},
        "no rule knows the right answer of task 'essay'": {"data": replace(settings["data"], task="essay")},
        "need 1064 positions, the model has": {"rollout": RolloutConfig(max_tokens=((0, 1000),))},
        "none of 5 prompts is left": {"data": replace(settings["data"], max_prompt_tokens=3)},
    }
    for message, change in cases.items():
        assert r1mega_data(RejectionSampling(**(settings | change)), tmp_path) == 2, message
        said = capsys.readouterr().err.strip()
        assert message in said
        assert "\n" not in said
    assert not list((tmp_path / "out").glob("[a-z]*"))


def test_show_prints_the_settings_and_starts_nothing(
    tmp_path: Path, settings: Any, capsys: pytest.CaptureFixture
) -> None:
    assert (
        r1mega_data(
            RejectionSampling(**settings), tmp_path, "--show", "samples=16", "filters=format,code_block"
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "samples=16" in shown
    assert "filters=format,code_block" in shown
    assert not (tmp_path / "out").exists()
    assert r1mega_data(RejectionSampling(**settings), tmp_path, "--show", "sampels=16") == 2
    assert "did you mean 'samples'?" in capsys.readouterr().err


def test_another_seed_does_not_go_on_in_the_same_directory(
    tmp_path: Path, settings: Any, capsys: pytest.CaptureFixture
) -> None:
    config = RejectionSampling(**settings)
    sample(config)
    assert r1mega_data(config, tmp_path) == 0
    (tmp_path / "out/results.json").unlink()
    assert r1mega_data(replace(config, seed=2), tmp_path) == 2
    assert "holds a run with seed=1, now 2" in capsys.readouterr().err
