"""Reward models on their own: every layout and packing computes one thing, resuming, and the directory they leave."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import DEEPSEEK_V3, LLAMA, QWEN2, free_port

from r1mega.config import ModelConfig, OptimizerConfig, ParallelConfig, RewardModelConfig, RunConfig
from r1mega.data.score_packing import PreferenceBatch, pack_preferences

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "moe": {**DEEPSEEK_V3, "initializer_range": 0.15, "num_nextn_predict_layers": 1, "pad_token_id": 2},
    "qwen2": {**QWEN2, "initializer_range": 0.15, "eos_token_id": 1, "pad_token_id": 2},
    "llama": {**LLAMA, "initializer_range": 0.15, "eos_token_id": [1, 5], "pad_token_id": 2},
}
LAYOUTS: dict[str, tuple[str, ParallelConfig]] = {
    "tensor": ("moe", ParallelConfig(tensor=2)),
    "data": ("moe", ParallelConfig(data=2)),
    "expert": ("moe", ParallelConfig(data=2, expert=2)),
    "tensor and expert": ("moe", ParallelConfig(tensor=2, expert=2)),
    "dense, tensor": ("qwen2", ParallelConfig(tensor=2)),
    "dense, tensor without sequence_parallel": ("llama", ParallelConfig(tensor=2, sequence_parallel=False)),
}
SMALL, LARGE = 64, 512
"""Tokens per chunk: several chunks, or one."""
KINDS = ("pairwise", "pointwise")
END = 1
PORTS: list[int] = []
"""In a started process: a free port for each group it will join."""


def config_of(directory: Path, model: str = "moe", kind: str = "pairwise", **changes: Any) -> RunConfig:
    path = directory / model
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(MODELS[model]))
    base = RunConfig(
        stage="reward_model",
        platform="cpu",
        num_steps=10,
        model=ModelConfig(path=str(path), init="random", dtype="float32"),
        reward_model=RewardModelConfig(objective=kind),
        parallel=ParallelConfig(tokens_per_chunk=SMALL),
        optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1),
    )
    return dataclasses.replace(base, **changes)


def texts(seed: int, count: int, size: int = 1) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        [[*rng.integers(6, 96, int(rng.integers(2, 24))).tolist(), END] for _ in range(size)]
        for _ in range(count)
    ]


def chunks_of(config: RunConfig, seed: int) -> list[list[PreferenceBatch]]:
    """One global batch for every data rank: 7 pairs, or 7 labelled responses."""
    parallel, pairs = config.parallel, config.reward_model.objective == "pairwise"
    labels = None if pairs else [float(i % 3 == 0) for i in range(7)]
    examples = texts(seed, 7, 2 if pairs else 1)
    return pack_preferences(
        examples, labels, parallel.data, parallel.tokens_per_chunk, config.token_alignment
    )


def in_processes(size: int, function: Callable, *args: Any) -> None:
    ports = [free_port() for _ in range(2 * len(LAYOUTS) + 2)]
    mp.spawn(_enter, (size, ports, function, args), nprocs=size)


def _enter(rank: int, size: int, ports: list[int], function: Callable, args: tuple) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})
    PORTS.extend(ports)
    function(*args)


def trainer_of(config: RunConfig, head: bool = True) -> Any:
    """A trainer, with a head that says something; the process group of one before is left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(PORTS.pop())
    from r1mega.training.reward_trainer import RewardTrainer

    trainer = RewardTrainer(config)
    if head:
        weight = trainer.model.stages[-1].score.weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        trainer.optimizer.megatron.reload_model_params()
    return trainer


# ---------------------------------------------------------------- layouts


def loss_and_gradients(config: RunConfig) -> dict[str, Any]:
    trainer = trainer_of(config)
    from megatron.core.distributed import finalize_model_grads

    from r1mega.models.hf_weights import named_hf_tensors

    parts = trainer._accumulate(chunks_of(config, seed=5)[trainer.mesh.data_rank])
    loss = sum(part["loss"] for part in parts)
    finalize_model_grads(trainer.optimizer.wrapped)
    dist.all_reduce(loss, group=trainer.mesh.data_group)
    (model,) = trainer.model.stages
    gradients = named_hf_tensors(model, {name: p.main_grad for name, p in model.named_parameters()})
    result = {"loss": loss, "gradients": {name: gradient.clone() for name, gradient in gradients}}
    result["scores"] = trainer.score([text for (text,) in texts(9, 11)])
    trainer.close()
    return result


def one_process(directory: Path) -> None:
    for model in MODELS:
        for kind in KINDS:
            result = loss_and_gradients(config_of(directory, model, kind))
            torch.save(result, directory / f"{model} {kind}.pt")
    whole = ParallelConfig(tokens_per_chunk=LARGE)
    torch.save(loss_and_gradients(config_of(directory, parallel=whole)), directory / "one chunk.pt")


def two_processes(directory: Path) -> None:
    for name, (model, parallel) in LAYOUTS.items():
        parallel = dataclasses.replace(parallel, tokens_per_chunk=SMALL)
        for kind in KINDS if name in ("tensor", "data") else KINDS[:1]:
            result = loss_and_gradients(config_of(directory, model, kind, parallel=parallel))
            torch.save(result, directory / f"{name} {kind} {dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reward layouts")
    in_processes(1, one_process, directory)
    in_processes(2, two_processes, directory)
    return directory


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(result["loss"], expected["loss"], atol=1e-6, rtol=1e-6)
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (result["gradients"][name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"
    assert result["scores"] == pytest.approx(expected["scores"], abs=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_process_computes(layout, results):
    model = LAYOUTS[layout][0]
    for kind in KINDS if layout in ("tensor", "data") else KINDS[:1]:
        expected = torch.load(results / f"{model} {kind}.pt")
        assert "score.weight" in expected["gradients"]
        assert not any("lm_head" in name or "layers.3." in name for name in expected["gradients"])
        assert all(gradient.abs().max() > 0 for gradient in expected["gradients"].values())
        for rank in range(2):
            result = torch.load(results / f"{layout} {kind} {rank}.pt")
            assert_same(result, expected)


def test_packing_does_not_change_the_loss(results):
    assert_same(torch.load(results / "one chunk.pt"), torch.load(results / "moe pairwise.pt"))


# ---------------------------------------------------------------- resuming


def train(trainer: Any, first: int, last: int) -> list[tuple[float, float]]:
    seen = []
    for step in range(first, last):
        report = trainer.update(chunks_of(trainer.config, step)[trainer.mesh.data_rank], step)
        seen.append((report["totals"]["loss"], report["grad_norm"]))
    return seen


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    from r1mega.models.hf_weights import named_hf_tensors

    return {name: tensor.clone() for name, tensor in named_hf_tensors(trainer.model.stages)}


def straight(config: RunConfig, out: Path) -> None:
    trainer = trainer_of(config, head=False)
    seen = train(trainer, 0, 2)
    trainer.save(str(out / "checkpoints"), 2, {})
    seen += train(trainer, 2, 5)
    torch.save((seen, state_of(trainer)), out / f"straight {trainer.rank}.pt")


def resumed(config: RunConfig, out: Path) -> None:
    from r1mega.training import checkpoint

    trainer = trainer_of(config, head=False)
    (path,) = checkpoint.complete(out / "checkpoints")
    trainer.load(str(path))
    torch.save((train(trainer, 2, 5), state_of(trainer)), out / f"resumed {trainer.rank}.pt")


def test_resume_is_bit_identical_and_the_head_stays_float32(tmp_path):
    """bfloat16 with the distributed optimizer: the float32 head has states of its own among the others'."""
    parallel = ParallelConfig(data=2, distributed_optimizer=True, tokens_per_chunk=SMALL)
    config = config_of(tmp_path, parallel=parallel)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    in_processes(2, straight, config, tmp_path)
    in_processes(2, resumed, config, tmp_path)
    for rank in range(2):
        seen, weights = torch.load(tmp_path / f"straight {rank}.pt")
        seen_again, weights_again = torch.load(tmp_path / f"resumed {rank}.pt")
        assert seen[2:] == seen_again
        assert weights.keys() == weights_again.keys()
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
        head = weights["score.weight"]
        assert head.dtype is torch.float32
        assert not torch.equal(head, head.bfloat16().float()), "the head was rounded"


# ---------------------------------------------------------------- the directory it leaves


def export(directory: Path) -> None:
    for model in MODELS:
        trainer = trainer_of(config_of(directory, model))
        train(trainer, 0, 1)
        trainer.export(str(directory / f"{model} hf"))
        scores = trainer.score([text for (text,) in texts(4, 6)])
        trainer.close()
        again = trainer_of(read_from(config_of(directory), directory / f"{model} hf"), head=False)
        assert again.brought_head()
        result = {"ours": scores, "read back": again.score([text for (text,) in texts(4, 6)])}
        again.close()
        torch.save(result, directory / f"{model} scores.pt")


def read_from(config: RunConfig, path: Path) -> RunConfig:
    return dataclasses.replace(config, model=ModelConfig(path=str(path), dtype="float32"))


def padded(sequences: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [pad] * (longest - len(sequence)) for sequence in sequences])


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reward export")
    in_processes(1, export, directory)
    return directory


@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_the_same_scores_and_so_does_reading_back(model, exported):
    from transformers import AutoModelForSequenceClassification

    saved = torch.load(exported / f"{model} scores.pt")
    assert saved["read back"] == saved["ours"]
    theirs, loading = AutoModelForSequenceClassification.from_pretrained(
        exported / f"{model} hf", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert theirs.num_labels == 1
    sequences = [text for (text,) in texts(4, 6)]
    tokens = padded(sequences, theirs.config.pad_token_id)
    with torch.no_grad():
        scores = theirs.eval()(tokens, attention_mask=(tokens != 2).long()).logits
    assert scores.shape == (6, 1)
    assert max(map(abs, saved["ours"])) > 0.1
    assert scores.flatten().tolist() == pytest.approx(saved["ours"], abs=1e-5)


def from_a_language_model(directory: Path) -> None:
    """A policy's checkpoint (with its MTP layer and vocabulary head) becomes a reward model with a zero head."""
    config = config_of(directory)
    first = trainer_of(config)  # a mesh for the export
    from r1mega.models.hf_weights import export_hf, named_hf_tensors
    from r1mega.models.language_model import build_model

    policy = build_model(MODELS["moe"], config.model, config.parallel, seed=4)
    expected = {name: tensor.clone() for name, tensor in named_hf_tensors(policy)}
    export_hf(policy, directory / "policy", directory / "nothing")
    first.close()
    trainer = trainer_of(read_from(config, directory / "policy"), head=False)
    assert not trainer.brought_head()
    weights = state_of(trainer)
    assert set(weights) - set(expected) == {"score.weight"}
    assert all(torch.equal(weights[name], expected[name]) for name in weights if name != "score.weight")
    assert trainer.score([[5, 6, END], [7, END]]) == [0.0, 0.0]
    assert trainer.update(chunks_of(config, 0)[0], 0)["totals"]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert trainer.score([[5, 6, END]]) != [0.0]
    assert trainer.score([]) == []
    assert len(trainer.score([[6] * 200 + [END]])) == 1, (
        "longer than a chunk, and there is no limit at inference"
    )


def test_a_policy_becomes_a_reward_model_whose_head_starts_at_zero(tmp_path):
    in_processes(1, from_a_language_model, tmp_path)


def test_a_padding_token_that_ends_sequences_is_not_written():
    from r1mega import platforms

    platforms.CPU.prepare_megatron()
    from r1mega.models.heads import classification_config

    for end in (2, [2, 7]):
        config = classification_config(MODELS["qwen2"] | {"eos_token_id": end})
        assert "pad_token_id" not in config
    assert classification_config(MODELS["qwen2"])["pad_token_id"] == 2
    assert classification_config(MODELS["moe"])["num_nextn_predict_layers"] == 0
