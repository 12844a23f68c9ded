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
MODELS: dict[str, dict[str, Any]] = {
    "moe": MOE,
    "qwen2": DENSE,
    "llama": {**LLAMA, "initializer_range": 0.15},
}
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
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from r1mega.models.hf_weights import named_hf_tensors
    from r1mega.models.language_model import build_model
    from r1mega.parallel.mesh import current_mesh

    has_mtp = bool(config.get("num_nextn_predict_layers"))
    options = ModelConfig(dtype="float32", init="random", mtp_loss_weight=MTP_WEIGHT if has_mtp else 0.0)
    model = build_model(config, options, parallel, seed=11).train()
    weights = {name: tensor.clone() for name, tensor in named_hf_tensors(model)}
    chunks = [
        packed([23, 9, 32], config["vocab_size"], seed=1),
        packed([40, 6, 1, 5], config["vocab_size"], seed=2),
    ]
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


def sharded_state(model) -> dict[str, Any]:
    from megatron.core import parallel_state

    return model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group()})


def one_process(_rank: int, directory: Path, port: int) -> None:
    """Every model's training step, an exported model and a sharded checkpoint, as the layouts should have them."""
    with mesh_of(ParallelConfig(), 0, port):
        from megatron.core import dist_checkpointing

        from r1mega.models.hf_weights import export_hf
        from r1mega.models.language_model import build_model

        for name, config in MODELS.items():
            torch.save(training_step(config, ParallelConfig(), 0), directory / f"{name}.pt")
        options = ModelConfig(dtype="float32", init="random")
        model = build_model(MOE, options, ParallelConfig(), seed=11)
        export_hf(model, directory / "source", directory / "no tokenizer")
        (directory / "sharded").mkdir()
        dist_checkpointing.save(sharded_state(model), str(directory / "sharded"))


def two_processes(rank: int, directory: Path, port: int) -> None:
    with process_group(rank, 2, port):
        from megatron.core import dist_checkpointing

        from r1mega.models.hf_weights import export_hf, import_hf, named_hf_tensors
        from r1mega.models.language_model import build_model
        from r1mega.parallel import mesh

        for name, (model_name, parallel) in LAYOUTS.items():
            place = mesh.init_mesh(parallel, seed=1)
            result = training_step(MODELS[model_name], parallel, place.data_rank)
            if model_name == "moe":
                model = build_model(MOE, ModelConfig(dtype="float32"), parallel, seed=0)
                model.load_state_dict(
                    dist_checkpointing.load(sharded_state(model), str(directory / "sharded"))
                )
                result["resharded"] = {key: tensor.clone() for key, tensor in named_hf_tensors(model)}
                model = build_model(MOE, ModelConfig(dtype="float32"), parallel, seed=0)
                import_hf(model, directory / "source")
                export_hf(model, directory / f"{name} export", directory / "source", max_shard_bytes=20_000)
            torch.save(result, directory / f"{name} {rank}.pt")
            mesh.destroy_mesh()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """All layouts in one pair of processes, and each model in one process."""
    directory = tmp_path_factory.mktemp("layouts")
    mp.spawn(one_process, (directory, free_port()), nprocs=1)
    mp.spawn(two_processes, (directory, free_port()), nprocs=2)
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


MOE_LAYOUTS = [name for name, (model, _) in LAYOUTS.items() if model == "moe"]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_a_sharded_checkpoint_of_one_process_loads_in_every_layout(layout, results):
    expected = torch.load(results / "moe.pt")["weights"]
    for rank in range(2):
        resharded = torch.load(results / f"{layout} {rank}.pt")["resharded"]
        assert resharded.keys() == expected.keys()
        assert all(torch.equal(resharded[name], tensor) for name, tensor in expected.items())


@pytest.mark.distributed
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_import_then_export_is_bit_exact_in_every_layout(layout, results):
    from safetensors.torch import load_file

    source, export = (
        {
            name: tensor
            for file in (results / folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("source", f"{layout} export")
    )
    assert len(list((results / f"{layout} export").glob("*.safetensors"))) > 2
    assert source.keys() == export.keys()
    assert all(torch.equal(source[name], export[name]) for name in source)
    assert [path.name for path in results.iterdir() if path.name.startswith(".")] == []


def test_the_layouts_cover_every_supported_axis():
    used = {
        field.name
        for field in dataclasses.fields(ParallelConfig)
        for _, layout in LAYOUTS.values()
        if getattr(layout, field.name) != field.default
    }
    assert {"tensor", "data", "expert", "expert_tensor", "sequence_parallel"} <= used
