"""A reward model through the command line: trained, killed and resumed, exported, and served to many coroutines."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import WholeRun, metrics_of, partial_files, r1mega, started, sums, whole_run, write_jsonl

pytestmark = pytest.mark.end_to_end

ARGUMENTS = (
    "run", "configs/tiny/reward_model_helpful.py", "parallel.data=1", "data.size=640", "data.eval_size=128",
    "sft.batch_size=16", "optimizer.lr=3e-3", "optimizer.warmup_steps=5", "checkpoint.every=10", "eval.every=20",
)  # fmt: skip
STEPS = 40


@pytest.fixture(scope="module")
def helpful(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """40 steps of 16 toy pairs from random weights."""
    return whole_run(ARGUMENTS, tmp_path_factory.mktemp("reward model"))


def test_held_out_accuracy_rises_above_chance_with_its_interval(helpful: WholeRun) -> None:
    results = json.loads((helpful.directory / "results.json").read_text())
    before, after = results["before"]["heldout"], results["after"]["heldout"]
    assert (results["finished"], results["steps"], results["chance"]) == (True, STEPS, 0.5)
    assert (before["accuracy"], before["n"]) == (0.5, 128), "a zero head calls every pair a tie"
    assert 0.5 < after["low"] < after["accuracy"] < after["high"] <= 1
    assert f"held-out accuracy {after['accuracy']:.1%} (95 % interval" in helpful.finished.out
    assert "above 50.0%" in helpful.finished.out
    lines = metrics_of(helpful.directory)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "accuracy", "margin", "score", "grad_norm", "tokens"} <= set(lines[0])
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "heldout_accuracy" in lines[19]
    assert partial_files(helpful.directory) == []


def test_a_killed_run_ends_as_an_uninterrupted_one(helpful: WholeRun, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = (*ARGUMENTS, f"dir={directory}")
    with started(*arguments, scratch=tmp_path) as run:
        run.wait_for(lambda: (directory / "checkpoints/step-00000020").exists())
        known = run.descendants()
        run.signal(signal.SIGKILL)
        run.assert_nothing_left(known)
    finished = r1mega(*arguments, scratch=tmp_path)
    assert finished.code == 0, finished.err
    assert f"resuming from {directory}/checkpoints/step-000000" in finished.out
    for name in ("loss", "accuracy", "margin", "grad_norm", "lr"):
        first, second = ([line[name] for line in metrics_of(path)] for path in (helpful.directory, directory))
        assert first == second, name
    weights = "hf/model-00001-of-00001.safetensors"
    assert (directory / weights).read_bytes() == (helpful.directory / weights).read_bytes()


def transformers_score(path: Path, question: str, response: str) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer(f"Q:{question}=?A:{response}")["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


def test_the_export_is_served_to_many_coroutines_in_few_batches(ray_cluster: None, helpful: WholeRun) -> None:
    from r1mega.config import ConfigError, ModelConfig, ParallelConfig, RunConfig
    from r1mega.stages.reward_server import RewardClient

    path = helpful.directory / "hf"
    kind, rude = "Keep it dry. Work slowly. Ask a friend.", "Keep it dry. That is dumb. Who cares."
    question = "How do I boil rice?"

    async def ask() -> tuple[list[Any], int]:
        run = RunConfig(platform="cpu", model=ModelConfig(dtype="float32"))
        with pytest.raises(ConfigError, match=r"reward_model\.json"):
            await RewardClient.start("configs/tiny/model", run)
        client = await RewardClient.start(path, run, ParallelConfig(data=2, tokens_per_chunk=512))
        try:
            texts = [kind, rude, f"<think>{rude}</think>{kind}", "<think>never ends"]
            filler = [f"{kind[: 3 + i]}" for i in range(40)]
            answers = await asyncio.gather(*(client.score(question, text) for text in texts + filler))
            return answers, client.batches
        finally:
            client.close()

    answers, batches = asyncio.run(ask())
    good, bad, thoughtful, nothing, *others = answers
    assert good == pytest.approx(transformers_score(path, question, kind), abs=1e-4)
    assert bad == pytest.approx(transformers_score(path, question, rude), abs=1e-4)
    assert good > bad
    assert thoughtful == pytest.approx(good, abs=1e-5), "the reasoning is not read"
    assert nothing is None
    assert all(isinstance(score, float) for score in others)
    assert 1 < batches < 12


def test_a_safety_model_trains_from_a_file_of_labels(tmp_path: Path) -> None:
    from r1mega.data.generated_preferences import labelled_rows

    rows = labelled_rows(240, seed=5, heldout=False) + labelled_rows(60, seed=5, heldout=True)
    data = write_jsonl(tmp_path / "labels.jsonl", [row | {"note": "kept"} for row in rows])
    config = "configs/tiny/reward_model_safety.py"
    changes = (
        "parallel.data=1",
        "sft.batch_size=16",
        "num_steps=4",
        "data.eval_size=60",
        "optimizer.warmup_steps=0",
    )
    directory = tmp_path / "run"
    finished = r1mega("run", config, f"data={data}", *changes, f"dir={directory}", scratch=tmp_path)
    assert finished.code == 0, finished.err
    assert "240 labelled responses to train on, 60 held out" in finished.out
    card = json.loads((directory / "hf/reward_model.json").read_text())
    assert card == {"objective": "pointwise", "reads": "response", "template": "tiny_zero"}
    results = json.loads((directory / "results.json").read_text())
    assert 0.5 <= results["chance"] < 0.7


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs the package bubblewrap")
def test_reinforcement_learning_routes_each_task_to_its_own_rewards(
    helpful: WholeRun, sft_run: WholeRun, tmp_path: Path
) -> None:
    """Math by rule, code in jails, chat by the reward model, in one run."""
    tests = {"stdin": ["1\n"], "stdout": ["1\n"]}
    rows: list[dict[str, Any]] = [{"question": "Say hello", "answer": None, "task": "chat"} for _ in range(4)]
    rows += [{"question": "Print it", "answer": tests, "task": "code"} for _ in range(4)]
    data = write_jsonl(tmp_path / "mixed.jsonl", rows + sums()[:8])
    directory = tmp_path / "run"
    changes = (
        "num_steps=2", "parallel.data=1", "rollout.engines=1", "grpo.group_size=4", "grpo.questions_per_step=6",
        "rollout.max_tokens=24", "data.eval_size=4", "optimizer.warmup_steps=0", "data.max_prompt_tokens=32",
        "rewards.cpu_seconds=0.2",
        f"rewards.helpful_model={helpful.directory / 'hf'}", "eval.every=1",
        'rewards.task_weights={"chat": {"helpful": 1.0, "format": 0.5}}',
    )  # fmt: skip
    finished = r1mega(
        "run", "configs/tiny/r1_zero.py", f"model={sft_run.directory / 'hf'}", f"data={data}", f"dir={directory}",
        *changes, scratch=tmp_path,
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert "starting the helpful reward model" in finished.out
    lines = metrics_of(directory)
    assert all(0 <= line["helpful"] <= 1 and "eval/sampled" in line for line in lines)
    counts = {
        name: sum(line.get(name, 0) for line in lines)
        for line in lines
        for name in line
        if "verdict/" in name
    }
    judged = sum(count for name, count in counts.items() if name.startswith("verdict/helpful:"))
    ruled = sum(count for name, count in counts.items() if name.startswith("verdict/accuracy:"))
    assert judged > 0
    assert judged + ruled == 2 * 24, "every output has exactly one of the two"
    assert any(name in counts for name in ("verdict/accuracy:no_code", "verdict/accuracy:truncated"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rewards.weights=accuracy:1,helpful:1", "the term 'helpful' needs rewards.helpful_model="),
        ("data.task=logic", "(task logic)"),
    ],
)
def test_a_sum_that_cannot_be_computed_is_one_line(
    sft_run: WholeRun, tmp_path: Path, change: str, words: str
) -> None:
    data = write_jsonl(tmp_path / "sums.jsonl", [row | {"answer": "{[("} for row in sums()[:20]])
    finished = r1mega(
        "run", "configs/tiny/r1_zero.py", f"model={sft_run.directory / 'hf'}", f"data={data}",
        f"dir={tmp_path / 'run'}", "data.eval_size=4", change, scratch=tmp_path,
    )  # fmt: skip
    assert finished.code == 2
    assert words in finished.err
    assert finished.err.count("\n") == 1
