"""Weights between Hugging Face checkpoints, Megatron's parameters and the rollout engines, by one table.

Import reads only this process's part of each tensor. Weights in fp8 with a scale for each block of 128 x 128, as
DeepSeek-V3's are, become numbers on the way in (r1mega_kernels.fp8_block). Export and sync gather whole tensors, one at a
time, in the table's order on every rank. Export is bit-exact to import.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from r1mega.models.hf_config import load_hf_config
from r1mega.models.hf_files import (
    MAX_SHARD_BYTES,
    SCALE,
    Slices,
    check_dtypes,
    check_scales,
    copy_small_files,
    dequantized,
    files_of,
    open_tensors,
    replace_directory,
    scratch_of,
    shard_name,
    span,
    write_config,
    write_index,
)
from r1mega.models.weight_table import Region, Weight, regions
from r1mega.parallel.mesh import Mesh, current_mesh
from r1mega.platforms import parameter_device

if TYPE_CHECKING:
    from r1mega.models.trunk import Trunk

__all__ = [
    "check_table",
    "draw",
    "export_hf",
    "fill_with_nan",
    "import_hf",
    "load_hf_config",
    "named_hf_tensors",
]

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers of old checkpoints that the config determines."""


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, without the names Megatron's DDP wrapper adds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name.removeprefix("module."): tensor.detach() for name, tensor in tensors.items()}


def check_table(model: Trunk) -> None:
    """Assert that the table names every parameter and nothing else."""
    named = {weight.parameter for weight in model.weight_table}
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= named, f"parameters without a name: {sorted(parameters - named)[:5]}"
    missing = named - set(tensors_of(model))
    assert not missing, f"names without a parameter: {sorted(missing)[:5]}"


def fill_with_nan(model: Trunk) -> None:
    """So that a forgotten import shows at once."""
    tensors = tensors_of(model)
    for weight in model.weight_table:
        tensors[weight.parameter].fill_(float("nan"))


def _held(model: Trunk, mesh: Mesh) -> Iterator[tuple[Weight, Region, Tensor]]:
    """Every HF tensor this process holds a part of: its row, the region, and the part itself (a view)."""
    tensors = tensors_of(model)
    for weight in model.weight_table:
        parameter = tensors[weight.parameter]
        for region in regions(weight, tuple(parameter.shape), mesh):
            yield weight, region, region.of(parameter)


def draw(model: Trunk, mesh: Mesh, std: float, seed: int) -> None:
    """Random weights: normal with `std`, norms 1, biases 0. Each HF tensor has a seed of its own, made of its
    name and `seed`, so every layout draws the same model."""
    for weight, region, part in _held(model, mesh):
        if weight.constant is not None:
            part.fill_(weight.constant)
            continue
        digest = hashlib.sha256(f"{seed} {region.hf_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        whole = torch.empty(region.hf_shape).normal_(0.0, std, generator=generator)
        part.copy_(whole.narrow(region.dim, region.start, region.length).reshape(part.shape))


# ---------------------------------------------------------------- import


def import_hf(
    model: Trunk, path: str | Path, *, unread: tuple[str, ...] = (), may_lack: tuple[str, ...] = ()
) -> list[str]:
    """Fill the model from the safetensors in `path`, converting dtypes to the model's. A fp8 tensor X needs X_scale_inv.

    unread: prefixes of tensors that the directory may have and this model has no use for.
    may_lack: tensors that the directory need not have; absent ones are set to their row's constant, and
    their names returned.
    Raises FileNotFoundError without weights there; ValueError, before anything is read, when tensors are
    missing, unexpected, of another shape, or fp8 without fitting scales, with how many and the first names.
    """
    path = Path(path)
    files = files_of(path)
    absent = [name for name in may_lack if name not in files]
    _check_names(path, files, model, unread, absent)
    held = [item for item in _held(model, current_mesh()) if item[1].hf_name not in absent]
    slices, scales = open_tensors(path, files, [region.hf_name for _, region, _ in held])
    check_dtypes(path, slices)
    _check_shapes(path, slices, [region for _, region, _ in held])
    check_scales(path, slices, scales, model.hf_config.get("quantization_config") or {})
    for _, region, part in held:
        read = slices[region.hf_name]
        if region.hf_name in scales:
            dtype = torch.bfloat16 if part.dtype == torch.bfloat16 else torch.float32
            whole = dequantized(
                path, region.hf_name, read, scales[region.hf_name], region.dim, region.start, region.length,
                part.device, dtype,
            )  # fmt: skip
        else:
            whole = span(read, region.dim, region.start, region.start + region.length)
        part.copy_(whole.reshape(part.shape))
    for weight, region, part in _held(model, current_mesh()):
        if region.hf_name in absent:
            assert weight.constant is not None, f"{region.hf_name} has no value to start from"
            part.fill_(weight.constant)
    return absent


def _check_names(
    path: Path, files: dict[str, Path], model: Trunk, unread: tuple[str, ...], absent: list[str]
) -> None:
    experts = range(model.hf_config.get("n_routed_experts") or 0)
    expected: set[str] = set()
    allowed: set[str] = {"lm_head.weight"} if model.hf_config.get("tie_word_embeddings") else set()
    for weight in model.all_weights:
        allowed.update(weight.copies)
        for name in weight.hf:
            expected.update([name.format(expert=e) for e in experts] if "{expert}" in name else [name])
    allowed.update(name + SCALE for name in expected | allowed)
    found = {name for name in files if not name.endswith(IGNORED_SUFFIXES) and not name.startswith(unread)}
    problems = []
    missing = expected - found - set(absent)
    for what, names in (("missing", missing), ("unexpected", found - expected - allowed)):
        if names:
            problems.append(f"{len(names)} {what} tensors, first {min(names)}")
    if problems:
        advice = ""
        mtp = f"model.layers.{model.hf_config['num_hidden_layers']}."
        if any(name.startswith(mtp) for name in missing):
            advice = "; a checkpoint without its MTP layer needs num_nextn_predict_layers 0 in config.json"
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}{advice}")


def _check_shapes(path: Path, slices: Slices, held: list[Region]) -> None:
    wrong = []
    for region in held:
        shape = tuple(slices[region.hf_name].get_shape())
        if shape != region.hf_shape:
            wrong.append(f"{region.hf_name} is {list(shape)}, not {list(region.hf_shape)}")
    if wrong:
        raise ValueError(
            f"{path} does not fit its config.json: {len(wrong)} misshaped tensors, first {min(wrong)}"
        )


# ---------------------------------------------------------------- export and sync


Stages: TypeAlias = "Trunk | Sequence[Trunk]"
"""A model, or the stages of a pipeline that lie in this process."""


def named_hf_tensors(
    model: Stages, tensors: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, whole, under its HF name, in the same order on every rank.

    `tensors` replaces the model's own (of each stage its own) by others of their names and shapes (gradients,
    optimizer state); names it lacks, on every rank alike, are left out.

    A collective over the tensor, expert, expert_tensor and pipeline axes: every rank must exhaust it. Tensors are
    contiguous, have the model's dtype (the router's correction bias and a scalar head float32) and may share the parameters'
    memory: copy what must outlive the next optimizer step.
    """
    mesh = current_mesh()
    stages = stages_of(model)
    given = [tensors] if isinstance(tensors, Mapping) else tensors or [tensors_of(s) for s in stages]
    mine = {
        stage.name_in_model(name): tensor.detach()
        for stage, held in zip(stages, given, strict=True)
        for name, tensor in held.items()
        if name != stage.copy_of_embedding
    }
    homes = _homes(mine, mesh)
    for weight in stages[0].all_weights:
        if weight.parameter not in homes:
            continue
        home, shape, dtype = homes[weight.parameter]
        if home == mesh.pipeline_rank:
            named = _gathered(weight, mine[weight.parameter], stages[0], mesh)
        else:
            named = _blank(weight, shape, dtype, stages[0], mesh)
        for name, whole in named:
            if mesh.pipeline_size > 1:
                dist.broadcast(whole, group=mesh.pipeline_group, group_src=home)
            yield name, whole
            for copy in weight.copies:
                yield copy, whole


def stages_of(model: Stages) -> list[Trunk]:
    return [model] if isinstance(model, torch.nn.Module) else list(model)


Home = tuple[int, tuple[int, ...], torch.dtype]


def _homes(mine: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Home]:
    """Parameter -> (pipeline rank, shape, dtype) of what lies there."""
    own = {name: (mesh.pipeline_rank, tuple(t.shape), t.dtype) for name, t in mine.items()}
    if mesh.pipeline_size == 1:
        return own
    everywhere: list[Any] = [None] * mesh.pipeline_size
    dist.all_gather_object(everywhere, own, group=mesh.pipeline_group)
    return {name: home for rank in everywhere for name, home in rank.items()}


def _gathered(weight: Weight, parameter: Tensor, model: Trunk, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    for region in regions(weight, tuple(parameter.shape), mesh):
        whole = _whole(region.of(parameter).reshape(region.shape), region, mesh)
        if not weight.kind.startswith("expert") or mesh.expert_size == 1:
            yield region.hf_name, whole
        else:
            yield from zip(_expert_names(region, model, mesh), _gather(whole, mesh.expert_group), strict=True)


def _blank(
    weight: Weight, shape: tuple[int, ...], dtype: torch.dtype, model: Trunk, mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Memory for what `_gathered` yields in another pipeline rank, which has a parameter of this shape."""
    for region in regions(weight, shape, mesh):
        spread = weight.kind.startswith("expert") and mesh.expert_size > 1
        for name in _expert_names(region, model, mesh) if spread else [region.hf_name]:
            yield name, torch.empty(region.hf_shape, dtype=dtype, device=parameter_device())


def _expert_names(region: Region, model: Trunk, mesh: Mesh) -> list[str]:
    """Of the same region in every expert rank."""
    here = int(region.hf_name.split(".experts.")[1].split(".")[0])
    per_rank = model.hf_config["n_routed_experts"] // mesh.expert_size
    return [
        region.hf_name.replace(
            f".experts.{here}.", f".experts.{here + (rank - mesh.expert_rank) * per_rank}."
        )
        for rank in range(mesh.expert_size)
    ]


def _whole(part: Tensor, region: Region, mesh: Mesh) -> Tensor:
    if region.axis is None or getattr(mesh, f"{region.axis}_size") == 1:
        return part.contiguous()
    return torch.cat(_gather(part, getattr(mesh, f"{region.axis}_group")), dim=region.dim)


def _gather(part: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def export_hf(
    model: Stages, path: str | Path, source_dir: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a Hugging Face model directory that transformers and vLLM load; a collective, rank 0 writes.

    Weights in shards of at most `max_shard_bytes` (a larger tensor alone), an index, config.json (the
    source's, with the dtype written and what vLLM needs), and the source's other small files (tokenizer,
    generation config). Everything is written beside `path` and renamed onto it.
    """
    path = Path(path)
    writer = dist.get_rank() == 0
    scratch = None
    if writer:
        scratch = scratch_of(path)
        shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
        scratch.mkdir(parents=True)
    try:
        _write_shards(named_hf_tensors(model), scratch, max_shard_bytes)
        if scratch is not None:
            _write_config(stages_of(model)[0], scratch)
            copy_small_files(Path(source_dir), scratch)
            replace_directory(scratch, path)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    dist.barrier()


def _write_shards(named: Iterator[tuple[str, Tensor]], scratch: Path | None, max_shard_bytes: int) -> None:
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        if scratch is not None and shard:
            save_file(shard, scratch / f"part-{len(shards):05d}", metadata={"format": "pt"})
            shards.append(list(shard))
        shard, size = {}, 0

    for name, tensor in named:
        if scratch is None:
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor.cpu().clone()  # copies of one tensor may not share memory in a file
        size, total = size + nbytes, total + nbytes
    flush()
    if scratch is None:
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = shard_name(i, len(shards))
        os.replace(scratch / f"part-{i:05d}", scratch / file)
        weight_map.update(dict.fromkeys(names, file))
    write_index(scratch, weight_map, total)


def _write_config(model: Trunk, scratch: Path) -> None:
    config = {name: value for name, value in model.hf_config.items() if name != "quantization_config"}
    if config["model_type"] == "deepseek_v3":  # vLLM asks for them, transformers does not write them
        config["topk_method"], config["scoring_func"] = "noaux_tc", "sigmoid"
    write_config(scratch, config, model.config.params_dtype)
