"""The trainer's mesh: which axes divide the model and the data, and this process's place on them.

Ranks follow Megatron-core's order, tensor innermost, then context, then data, then pipeline:
rank = ((pipeline_rank * data + data_rank) * context + context_rank) * tensor + tensor_rank. Experts have a mesh of their
own over the processes of one pipeline rank: expert_tensor innermost, then expert, then the expert's data axis. V3
trained with PP16 x EP64 x ZeRO-1, without a tensor and a context axis.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config import ParallelConfig
from r1mega.platforms import has_tags


@dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    pipeline_rank: int
    pipeline_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    expert_data_rank: int
    expert_data_size: int
    tensor_group: Any
    context_group: Any
    data_group: Any
    pipeline_group: Any
    expert_group: Any
    expert_tensor_group: Any
    expert_data_group: Any

    def channel(self, sender: int, receiver: int) -> Any:
        """The process group for messages from one pipeline rank to a neighbour.

        Where messages have no tags (GPUs) their order is all that tells them apart, so there each direction of each pair
        has a communicator of its own.
        """
        return _channels.get((sender, receiver), self.pipeline_group)


_channels: dict[tuple[int, int], Any] = {}
"""(sending, receiving pipeline rank) -> process group, of this process's pipeline."""


def _make_channels(pipeline_group: Any) -> None:
    """In the same order in all ranks: each call waits for the other member."""
    _channels.clear()
    size = pipeline_group.size()
    if size == 1 or has_tags(pipeline_group):
        return
    ranks = dist.get_process_group_ranks(pipeline_group)
    neighbours = {pair for r in range(size) for pair in ((r, (r + 1) % size), ((r + 1) % size, r))}
    for sender, receiver in sorted(neighbours):
        if pipeline_group.rank() in (sender, receiver):
            members = [ranks[sender], ranks[receiver]]
            _channels[sender, receiver] = dist.new_group(members, use_local_synchronization=True)


LARGEST = 4096
"""Size of an axis that advice goes up to."""
Problem = tuple[str, str]
"""(the field to change, what is wrong with it)"""


def check_mesh(parallel: ParallelConfig, hf_config: dict[str, Any] | None) -> None:
    """Refuse a layout that is impossible, silently wrong or not supported yet, before any process starts.

    Raises ValueError naming the field as the config writes it and the nearest legal choice. `hf_config` (a
    config.json) adds the checks that need the model's shape; None leaves them out.
    """
    for field, problem in _problems(parallel, hf_config):
        best = _nearest(parallel, hf_config, field)
        raise ValueError(f"{problem}; the nearest legal choice is parallel.{field}={best}")


def _nearest(parallel: ParallelConfig, hf_config: dict[str, Any] | None, field: str) -> int | str:
    """The value with which the layout is possible; if other fields are wrong too, with which this one no longer is."""
    value = getattr(parallel, field)
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, str):
        return str(getattr(ParallelConfig(), field))
    choices = sorted(
        range(field != "expert_replicas", min(2 * max(value, 1), LARGEST) + 1),
        key=lambda choice: (abs(choice - value), choice),
    )
    wrong = {choice: _wrong_fields(_with(parallel, {field: choice}), hf_config) for choice in choices}
    return min(choices, key=lambda choice: (bool(wrong[choice]), field in wrong[choice]))


def _with(parallel: ParallelConfig, sizes: dict[str, Any]) -> ParallelConfig:
    return replace(parallel, **sizes)


def _wrong_fields(parallel: ParallelConfig, hf_config: dict[str, Any] | None) -> set[str]:
    return {field for field, _ in _problems(parallel, hf_config)}


def _problems(parallel: ParallelConfig, hf_config: dict[str, Any] | None) -> Iterator[Problem]:
    sizes = [
        field.name for field in fields(parallel) if field.type == "int" and field.name != "expert_replicas"
    ]
    too_small = [name for name in sizes if getattr(parallel, name) < 1]
    for name in too_small:
        yield name, f"parallel.{name}={getattr(parallel, name)}: every axis has at least one rank"
    parallel = _with(parallel, dict.fromkeys(too_small, 1))
    yield from _pipeline_problems(parallel, hf_config["num_hidden_layers"] if hf_config else None)
    processes = parallel.tensor * parallel.context * parallel.data
    if processes % (parallel.expert * parallel.expert_tensor):
        yield (
            "expert_tensor" if processes % parallel.expert_tensor else "expert",
            (
                f"parallel.expert={parallel.expert} * parallel.expert_tensor={parallel.expert_tensor}: they must divide"
                f" parallel.tensor * parallel.context * parallel.data = {processes}"
            ),
        )
    if parallel.expert_replicas and parallel.expert == 1:
        yield (
            "expert_replicas",
            (
                f"parallel.expert_replicas={parallel.expert_replicas} with parallel.expert=1: one rank has all experts,"
                " and a copy would relieve nobody"
            ),
        )
    if hf_config is not None:
        yield from _model_problems(parallel, hf_config)


def _pipeline_problems(parallel: ParallelConfig, layers: int | None) -> Iterator[Problem]:
    """The stages that parallel.schedule makes, and the layers that fill them."""
    chunks, interleaved = parallel.virtual_pipeline, parallel.schedule == "interleaved"
    if interleaved and parallel.pipeline > 1 and chunks < 2:
        yield (
            "virtual_pipeline",
            'parallel.schedule="interleaved" with parallel.virtual_pipeline=1: each rank needs at least two stages',
        )
    if chunks > 1 and (not interleaved or parallel.pipeline == 1):
        yield (
            "virtual_pipeline",
            (
                f'parallel.virtual_pipeline={chunks}: only a pipeline under parallel.schedule="interleaved" divides'
                " its ranks so"
            ),
        )
    stages = num_stages(parallel)
    if layers is not None and stages > layers + 2:  # the first and the last may have none
        yield (
            "virtual_pipeline" if interleaved and chunks > 2 else "pipeline",
            (
                f"parallel.pipeline={parallel.pipeline} makes {stages} stages ({stages // parallel.pipeline} in each rank)"
                f" of {layers} layers"
            ),
        )


def num_stages(parallel: ParallelConfig) -> int:
    """Stages of the pipeline, in all ranks."""
    if parallel.pipeline == 1:
        return 1
    return parallel.pipeline * {"interleaved": parallel.virtual_pipeline, "1f1b": 1, "zb1p": 1}.get(
        parallel.schedule, 2
    )


def _model_problems(parallel: ParallelConfig, hf: dict[str, Any]) -> Iterator[Problem]:
    """The divisions of the model's dims over the axes."""
    experts = hf.get("n_routed_experts")
    over_tensor = ["num_attention_heads", "vocab_size", "intermediate_size"]
    if not experts and hf.get("num_key_value_heads"):
        over_tensor.append("num_key_value_heads")  # MLA has no key-value heads of its own
    sizes = {name: hf[name] for name in over_tensor if hf.get(name)}
    if experts and hf.get("n_shared_experts"):
        sizes["n_shared_experts * moe_intermediate_size"] = (
            hf["n_shared_experts"] * hf["moe_intermediate_size"]
        )
    if hf.get("num_nextn_predict_layers"):
        sizes["hidden_size"] = hf["hidden_size"]
    for name, size in sizes.items():
        if size % parallel.tensor:
            yield "tensor", f"parallel.tensor={parallel.tensor} does not divide {name}={size}"
    divided = {"expert": "n_routed_experts", "expert_tensor": "moe_intermediate_size"}
    for field, name in divided.items():
        ranks = getattr(parallel, field)
        if not experts and ranks > 1:
            yield field, f"parallel.{field}={ranks}: the model ({hf['model_type']}) has no experts"
        elif experts and hf[name] % ranks:
            yield field, f"parallel.{field}={ranks} does not divide {name}={hf[name]}"
    if not experts and parallel.dispatcher != ParallelConfig().dispatcher:
        yield (
            "dispatcher",
            f"parallel.dispatcher={parallel.dispatcher}: the model ({hf['model_type']}) has no experts",
        )
    if experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        yield (
            "sequence_parallel",
            (
                f"parallel.tensor={parallel.tensor} with experts and parallel.sequence_parallel=false: every tensor rank"
                " would route every token"
            ),
        )


def init_mesh(parallel: ParallelConfig, *, seed: int = 1, timeout_seconds: float = 600.0) -> Mesh:
    """Divide the default process group into the axes and seed the random states of each.

    A collective over an axis that waits longer than the timeout fails.

    torch.distributed must be initialised, with tensor * context * data * pipeline processes, and the platform must
    have prepared Megatron.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    check_mesh(parallel, None)
    expected = parallel.tensor * parallel.context * parallel.data * parallel.pipeline
    if dist.get_world_size() != expected:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} * parallel.context={parallel.context} * parallel.data={parallel.data} *"
            f" parallel.pipeline={parallel.pipeline} needs {expected} processes, but {dist.get_world_size()} run"
        )

    def first(ranks: list[int], _split: int | None = None) -> list[int]:
        return ranks[:1]  # gradients of shared embeddings are summed by pipeline.py, not by Megatron

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        get_embedding_ranks=first,
        get_position_embedding_ranks=first,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=timeout_seconds / 60,  # type: ignore[arg-type]
    )
    _make_channels(parallel_state.get_pipeline_model_parallel_group())
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    return current_mesh()


def current_mesh() -> Mesh:
    """The mesh that `init_mesh` made, as this process sees it."""
    from megatron.core import parallel_state

    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_group(),
        "expert_data": parallel_state.get_expert_data_parallel_group(),
    }
    places = {
        **{f"{axis}_rank": group.rank() for axis, group in groups.items()},
        **{f"{axis}_size": group.size() for axis, group in groups.items()},
        **{f"{axis}_group": group for axis, group in groups.items()},
    }
    return Mesh(rank=dist.get_rank(), world_size=dist.get_world_size(), **places)


def destroy_mesh() -> None:
    """Forget the mesh and close its process groups, whose threads poll as long as a model holds them; the default one stays."""
    from megatron.core import parallel_state

    _, *groups = parallel_state._global_process_group_list or [None]
    for group in (*groups, *_channels.values()):
        dist.destroy_process_group(group)
    _channels.clear()
    parallel_state.destroy_model_parallel()
    gc.collect()  # models are full of cycles
