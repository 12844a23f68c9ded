"""Supervised fine-tuning from a file of prompts and completions, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import metrics_of, partial_files, succeeded
from conftest import WholeRun

pytestmark = pytest.mark.end_to_end


def test_the_loss_falls(sft_run: WholeRun) -> None:
    losses = [line["loss"] for line in metrics_of(sft_run.directory)]
    assert len(losses) == 30
    assert losses[0] > 4.0, "random weights know nothing of 128 tokens: log 128 = 4.85"
    assert losses[-1] < losses[0] / 3


def test_a_run_leaves_its_lineage_results_and_checkpoints_and_nothing_half_written(sft_run: WholeRun) -> None:
    directory = sft_run.directory
    assert json.loads((directory / "results.json").read_text()) == {"finished": True, "steps": 30}
    lineage = json.loads((directory / "lineage.json").read_text())
    assert {"torch", "megatron-core"} <= set(lineage["versions"])
    assert set(lineage["inputs"]) == {"model", "data"}
    saved = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert saved == ["step-00000010", "step-00000020", "step-00000030"]
    assert partial_files(directory) == []
    assert sft_run.finished.err == ""


def test_the_export_writes_the_taught_format_in_transformers(sft_run: WholeRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = sft_run.directory / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("Q:3+4=?A:", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert text.startswith("<think>"), text
    assert "</think><answer>" in text


def test_a_run_that_lost_its_last_steps_repeats_them(sft_run: WholeRun, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(sft_run.directory, directory)
    for lost in ("checkpoints/step-00000020", "checkpoints/step-00000030", "hf"):
        shutil.rmtree(directory / lost)
    (directory / "results.json").unlink()
    resumed = succeeded(*sft_run.arguments, f"dir={directory}", scratch=tmp_path)
    assert f"resuming from {directory}/checkpoints/step-00000010 (step 10)" in resumed.out
    first, second = metrics_of(sft_run.directory), metrics_of(directory)
    assert [line["step"] for line in second] == list(range(1, 31))
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [line[name] for line in second] == [line[name] for line in first], name
    assert (directory / "hf/model-00001-of-00001.safetensors").read_bytes() == (
        sft_run.directory / "hf/model-00001-of-00001.safetensors"
    ).read_bytes()
