"""Every layout computes what one process computes: loss, the gradient of every parameter, and the weights.

Gradients go through Megatron's own DDP and finalize_model_grads and are gathered under their HF names, so a
parameter wrongly taken for dense, replicated or reduced shows up by name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import DEEPSEEK_V3, LLAMA, QWEN2, free_port, mesh_of, packed, process_group

from r1mega.config import ModelConfig, ParallelConfig

MOE = {**DEEPSEEK_V3, "initializer_range": 0.15, "num_nextn_predict_layers": 1}
DENSE = {**QWEN2, "initializer_range": 0.15}
MODELS: dict[str, dict[str, Any]] = {"moe": MOE, "qwen2": DENSE, "llama": {**LLAMA, "initializer_range": 0.15}}
LAYOUTS: dict[str, tuple[str, ParallelConfig]] = {
    "moe, tensor": ("moe", ParallelConfig(tensor=2)),
    "moe, tensor and expert": ("moe", ParallelConfig(tensor=2, expert=2)),
    "moe, tensor and expert_tensor": ("moe", ParallelConfig(tensor=2, expert_tensor=2)),
    "moe, data": ("moe", ParallelConfig(data=2)),
    "moe, data and expert": ("moe", ParallelConfig(data=2, expert=2)),
    "moe, data and expert_tensor": ("moe", ParallelConfig(data=2, expert_tensor=2)),
    "qwen2, tensor": ("qwen2", ParallelConfig(tensor=2)),
    "llama, tensor without sequence_parallel": ("llama", ParallelConfig(tensor=2, sequence_parallel=False)),
    "llama, data": ("llama", ParallelConfig(data=2)),
}
MTP_WEIGHT = 0.3


def training_step(config: dict[str, Any], parallel: ParallelConfig, data_rank: int) -> dict[str, Any]:
    """Two chunks shared over the data axis, one backward pass each; the loss and every gradient, whole."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from r1mega.models.hf_weights import named_hf_tensors
    from r1mega.models.language_model import build_model
    from r1mega.parallel.mesh import current_mesh

    has_mtp = bool(config.get("num_nextn_predict_layers"))
    options = ModelConfig(dtype="float32", init="random", mtp_loss_weight=MTP_WEIGHT if has_mtp else 0.0)
    model = build_model(config, options, parallel, seed=11).train()
    weights = {name: tensor.clone() for name, tensor in named_hf_tensors(model)}
    chunks = [packed([23, 9, 32], config["vocab_size"], seed=1), packed([40, 6, 1, 5], config["vocab_size"], seed=2)]
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    ddp = DistributedDataParallel(model.config, settings, model)
    ddp.zero_grad_buffer()
    loss = torch.zeros(())
    for chunk in chunks[data_rank :: parallel.data]:
        out = ddp(chunk)
        chunk_loss = -(chunk.token_weights_T * out.logprobs_T).sum()
        if out.mtp_loss_sum is not None:
            chunk_loss = chunk_loss + MTP_WEIGHT * out.mtp_loss_sum
        chunk_loss.backward()
        loss += chunk_loss.detach()
    finalize_model_grads([ddp], None)
    dist.all_reduce(loss, group=current_mesh().data_group)
    gradients = dict(named_hf_tensors(model, {name: p.main_grad for name, p in model.named_parameters()}))
    return {"loss": loss, "weights": weights, "gradients": {name: g.clone() for name, g in gradients.items()}}


def two_processes(rank: int, directory: str, port: int) -> None:
    from r1mega.parallel import mesh

    with process_group(rank, 2, port):
        for name, (model, parallel) in LAYOUTS.items():
            place = mesh.init_mesh(parallel, seed=1)
            torch.save(training_step(MODELS[model], parallel, place.data_rank), Path(directory) / f"{name} {rank}.pt")
            mesh.destroy_mesh()


def one_process(_rank: int, directory: str, port: int) -> None:
    with mesh_of(ParallelConfig(), 0, port):
        for name, config in MODELS.items():
            torch.save(training_step(config, ParallelConfig(), 0), Path(directory) / f"{name}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """All layouts in one pair of processes, and each model in one process."""
    directory = tmp_path_factory.mktemp("layouts")
    mp.spawn(one_process, (str(directory), free_port()), nprocs=1)
    mp.spawn(two_processes, (str(directory), free_port()), nprocs=2)
    return directory


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_process_computes(layout, results):
    expected = torch.load(results / f"{LAYOUTS[layout][0]}.pt")
    assert all(gradient.abs().max() > 0 for gradient in expected["gradients"].values())
    for rank in range(2):
        result = torch.load(results / f"{layout} {rank}.pt")
        torch.testing.assert_close(result["loss"], expected["loss"], atol=1e-6, rtol=1e-6)
        assert list(result["gradients"].keys() ^ expected["gradients"].keys()) == []
        for name, gradient in expected["gradients"].items():
            error = (result["gradients"][name] - gradient).abs().max() / gradient.abs().max()
            assert error < 2e-5, f"{name} on rank {rank}: relative error {error:.1e}"


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_named_tensors_are_bit_equal_in_every_layout(layout, results):
    expected = torch.load(results / f"{LAYOUTS[layout][0]}.pt")["weights"]
    first, second = (torch.load(results / f"{layout} {rank}.pt")["weights"] for rank in range(2))
    assert list(first) == list(second), "ranks disagree on the order"
    for result in (first, second):
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def export_in_a_layout(rank: int, directory: str, port: int) -> None:
    parallel = ParallelConfig(tensor=2, expert=2)
    with mesh_of(parallel, rank, port):
        from r1mega.models import hf_weights, language_model

        options = ModelConfig(dtype="float32")
        model = language_model.build_model(MOE, options, parallel, seed=0)
        hf_weights.import_hf(model, Path(directory) / "source")
        hf_weights.export_hf(model, Path(directory) / "export", Path(directory) / "source", max_shard_bytes=20_000)


def write_source(_rank: int, directory: str, port: int) -> None:
    with mesh_of(ParallelConfig(), 0, port):
        from r1mega.models import hf_weights, language_model

        options = ModelConfig(dtype="float32", init="random")
        model = language_model.build_model(MOE, options, ParallelConfig(), seed=5)
        hf_weights.export_hf(model, Path(directory) / "source", directory)


@pytest.mark.distributed
def test_a_checkpoint_survives_import_and_export_in_a_layout_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    mp.spawn(write_source, (str(tmp_path), free_port()), nprocs=1)
    mp.spawn(export_in_a_layout, (str(tmp_path), free_port()), nprocs=2)
    source, export = (
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("source", "export")
    )
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 2
    assert source.keys() == export.keys()
    assert all(torch.equal(source[name], export[name]) for name in source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]


def test_the_layouts_cover_every_supported_axis():
    used = {field.name for field in dataclasses.fields(ParallelConfig) for _, layout in LAYOUTS.values()
            if getattr(layout, field.name) != field.default}
    assert {"tensor", "data", "expert", "expert_tensor", "sequence_parallel"} <= used
