"""A reward model through the command line: trained, killed and resumed, exported, and served to many coroutines."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import WholeRun, metrics_of, partial_files, r1mega, started, whole_run, write_jsonl

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


def test_the_export_is_served_to_many_coroutines_in_few_batches(helpful: WholeRun) -> None:
    from r1mega import cluster
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

    with cluster.start(RunConfig()):
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
