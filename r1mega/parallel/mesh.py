"""The trainer's mesh: which axes divide the model and the data, and this process's place on them.

Ranks follow Megatron-core's order, tensor innermost, then data: rank = data_rank * tensor + tensor_rank.
Experts have a mesh of their own over the same processes: expert_tensor innermost, then expert, then the
expert's data axis. V3 trained with PP16 x EP64 x ZeRO-1 and no tensor axis; here the axes tensor, expert,
expert_tensor and data are supported, the others refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    expert_data_rank: int
    expert_data_size: int
    tensor_group: Any
    data_group: Any
    expert_group: Any
    expert_tensor_group: Any
    expert_data_group: Any


def _nearest(size: int, legal: list[int]) -> str:
    best = min(legal, key=lambda candidate: (abs(candidate - size), candidate))
    return f"the nearest legal choice is {best}"


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def check_mesh(parallel: ParallelConfig, hf_config: dict[str, Any] | None) -> None:
    """Refuse a layout that is impossible, silently wrong or not supported yet, before any process starts.

    Raises ValueError naming the field as the config writes it and the nearest legal choice. `hf_config` (a
    config.json) adds the checks that need the model's shape; None leaves them out.
    """
    for field in fields(parallel):
        value = getattr(parallel, field.name)
        if not isinstance(value, bool) and value < 1:
            raise ValueError(f"parallel.{field.name}={value}: every axis has at least one rank")
    if parallel.virtual_pipeline > 1:
        raise ValueError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}: Megatron's interleaved schedule is silently"
            " wrong without overlapped point-to-point communication; take parallel.virtual_pipeline=1"
        )
    if parallel.context > 1 and hf_config is not None and _mtp_depth(hf_config):
        raise ValueError(
            f"parallel.context={parallel.context} with a multi-token-prediction layer"
            f" (num_nextn_predict_layers={_mtp_depth(hf_config)}) gives wrong losses; take parallel.context=1"
        )
    for name in ("pipeline", "context"):
        if getattr(parallel, name) > 1:
            raise ValueError(
                f"parallel.{name}={getattr(parallel, name)}: not supported yet, only tensor, expert and data"
                f" axes are; take parallel.{name}=1"
            )
    processes = parallel.tensor * parallel.data
    expert_processes = parallel.expert * parallel.expert_tensor
    if processes % expert_processes:
        legal = [d for d in _divisors(processes) if processes % (d * parallel.expert_tensor) == 0]
        advice = f"; {_nearest(parallel.expert, legal)}" if legal else f"; take a divisor of {processes}"
        raise ValueError(
            f"parallel.expert={parallel.expert} times parallel.expert_tensor={parallel.expert_tensor} must divide"
            f" parallel.tensor * parallel.data = {processes}{advice}"
        )
    if hf_config is not None:
        _check_model(parallel, hf_config)


def _mtp_depth(hf_config: dict[str, Any]) -> int:
    return hf_config.get("num_nextn_predict_layers") or 0


def _check_model(parallel: ParallelConfig, hf: dict[str, Any]) -> None:
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
    if _mtp_depth(hf):
        sizes["hidden_size"] = hf["hidden_size"]
    for name, size in sizes.items():
        if size % parallel.tensor:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} does not divide {name}={size};"
                f" {_nearest(parallel.tensor, _divisors(*sizes.values()))}"
            )
    if not experts:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                raise ValueError(
                    f"parallel.{name}={getattr(parallel, name)}: the model ({hf['model_type']}) has no experts;"
                    f" take parallel.{name}=1"
                )
        return
    if experts % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide n_routed_experts={experts};"
            f" {_nearest(parallel.expert, _divisors(experts))}"
        )
    if hf["moe_intermediate_size"] % parallel.expert_tensor:
        raise ValueError(
            f"parallel.expert_tensor={parallel.expert_tensor} does not divide"
            f" moe_intermediate_size={hf['moe_intermediate_size']};"
            f" {_nearest(parallel.expert_tensor, _divisors(hf['moe_intermediate_size']))}"
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} with experts needs parallel.sequence_parallel=true:"
            " without it every tensor rank would route every token"
        )


def init_mesh(parallel: ParallelConfig, *, seed: int = 1) -> Mesh:
    """Divide the default process group into the axes and seed the random states of each.

    torch.distributed must be initialised, with tensor * data processes, and the platform must have prepared
    Megatron.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    check_mesh(parallel, None)
    expected = parallel.tensor * parallel.data
    if dist.get_world_size() != expected:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} * parallel.data={parallel.data} needs {expected} processes,"
            f" but {dist.get_world_size()} run"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    return current_mesh()


def current_mesh() -> Mesh:
    """The mesh that `init_mesh` made, as this process sees it."""
    from megatron.core import parallel_state

    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
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
    """Forget the mesh; the default process group stays."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
