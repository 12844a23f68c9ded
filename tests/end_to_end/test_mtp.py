"""The multi-token-prediction layer from base training to drafting in the engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import completions, metrics_of, succeeded, sums, write_jsonl
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.end_to_end

MTP = "model.layers.4."
"""The tiny model has 4 layers; the MTP layer is the next one."""


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "hf/model-00001-of-00001.safetensors")


def moved(before: dict[str, Tensor], after: dict[str, Tensor], own: bool) -> list[str]:
    """Names of tensors that differ: the MTP layer's own, or all the others."""
    assert before.keys() == after.keys()
    shared = ("embed_tokens", "shared_head.head")
    names = [name for name in before if name.startswith(MTP) == own]
    return [n for n in names if not any(s in n for s in shared) and not torch.equal(before[n], after[n])]


def test_mtp_learns_drafts_and_keeps_the_gates(tmp_path: Path) -> None:
    base, rl = tmp_path / "base", tmp_path / "rl"
    data = write_jsonl(tmp_path / "completions.jsonl", completions(seed=1))
    questions = write_jsonl(tmp_path / "sums.jsonl", sums())
    train = (
        "run", "configs/tiny/base_mtp.py", f"data={data}", f"dir={base}", "parallel.data=1",
        "sft.batch_size=16", "optimizer.lr=5e-3", "optimizer.warmup_steps=3", "num_steps=30",
    )  # fmt: skip
    succeeded(*train, scratch=tmp_path)
    mtp_losses = [line["mtp_loss"] for line in metrics_of(base)]
    assert mtp_losses[-1] < 0.7 * mtp_losses[0]

    succeeded(
        "run", "configs/tiny/r1_zero_mtp.py", f"model={base / 'hf'}", f"data={questions}", f"dir={rl}",
        "num_steps=3", "parallel.data=1", "rollout.engines=1", "grpo.group_size=4",
        "grpo.questions_per_step=8", "rollout.max_tokens=40", "data.eval_size=8", "optimizer.warmup_steps=0",
        "rewards.cpu_seconds=0.2", "grpo.routing_replay=true",
        scratch=tmp_path,
    )  # fmt: skip
    lines = metrics_of(rl)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["logprob_mismatch_max"] for line in lines) < 1e-5
    assert lines[0]["format"] > 0.3, "the engine writes what the base was taught"
    before, after = weights(base), weights(rl)
    assert len(moved(before, after, own=True)) > 10
    assert len(moved(before, after, own=False)) > 40
