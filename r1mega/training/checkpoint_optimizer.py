"""Adam's state in one form for every layout: for each model parameter its moments, and its fp32 master if it is half.

Megatron stores the optimizers with and without sharding over data ranks in two formats that cannot read each
other. Here both become tensors of the model parameter's own shape, placed as the model's sharded state places the
parameter, so that any layout reads any other's. Nothing else need be kept: learning rate and weight decay are
functions of step and config, and Adam's step count is one number.

The distributed optimizer gathers its shards for a save (Megatron's "fully_reshardable" exchange): each data rank
holds, in host memory, the whole state of its tensor and pipeline shard meanwhile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(parts: list[Any], model_state: Any, *, loading: bool) -> dict[str, Any]:
    """Sharded tensors of every parameter of `parts` (Megatron's dense and expert optimizers).

    model_state: the model's sharded state, which holds the parameters themselves. Where `loading`, the tensors are
    only where to load to; `restore` then takes the result.
    """
    places = _places(model_state)
    state = {}
    for index, part in enumerate(parts):
        if getattr(part, "is_stub_optimizer", False):
            continue
        _create_state(part)
        whole = _distributed if hasattr(part, "gbuf_ranges") else _local
        state[str(index)] = whole(part, model_state, places, loading)
    return state


def step_count(parts: list[Any]) -> int:
    """Adam's number of updates, the same for every parameter."""
    counts = set()
    for part in parts:
        if getattr(part, "is_stub_optimizer", False):
            continue
        counts |= {int(state["step"]) for state in part.optimizer.state.values() if "step" in state}
        counts |= {int(group["step"]) for group in part.optimizer.param_groups if "step" in group}
    assert len(counts) <= 1, f"parameters disagree on Adam's step: {counts}"
    return counts.pop() if counts else 0


def restore(parts: list[Any], state: dict[str, Any], step: int) -> None:
    """Put loaded tensors into the optimizers; the model's parameters have been loaded before."""
    for index, part in enumerate(parts):
        if getattr(part, "is_stub_optimizer", False):
            continue
        loaded = state[str(index)]
        if hasattr(part, "gbuf_ranges"):
            _restore_distributed(part, loaded)
        else:
            for number, (_, main) in enumerate(_parameters(part)):
                tensors = loaded[str(number)]
                if "fp32_param" in tensors:
                    _copy(main, tensors["fp32_param"])
                for name in MOMENTS:
                    _copy(part.optimizer.state[main][name], tensors[name])
        _set_step(part, step)


def _set_step(part: Any, step: int) -> None:
    if isinstance(part.optimizer, torch.optim.Adam):
        for tensors in part.optimizer.state.values():
            tensors["step"] = torch.tensor(float(step))  # one of its own: Adam counts it up in place
    else:  # Apex and Transformer Engine keep it in the group
        for group in part.optimizer.param_groups:
            group["step"] = step


def _create_state(part: Any) -> None:
    """Zero moments where no update has been made yet."""
    inner = part.optimizer
    if not isinstance(inner, torch.optim.Adam):
        part.init_state_fn(inner, part.config)
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                zeros = {name: torch.zeros_like(parameter.data) for name in MOMENTS}
                inner.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _places(model_state: Any) -> dict[int, Any]:
    """id of each parameter -> its sharded tensor, or the factory of several."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    values = nested_values(model_state)
    return {id(v.data): v for v in values if isinstance(v, ShardedTensor | ShardedTensorFactory)}


def _parameters(part: Any) -> list[tuple[Any, Any]]:
    """(the model's parameter, the fp32 one that Adam updates): the same where the model's is fp32."""
    if not hasattr(part, "float16_groups"):
        return [(p, p) for group in part.optimizer.param_groups for p in group["params"]]
    halves = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
    pairs = [pair for models, mains in halves for pair in zip(models, mains, strict=True)]
    return pairs + [(p, p) for group in part.fp32_from_fp32_groups for p in group]


def _local(part: Any, _model_state: Any, places: dict[int, Any], _loading: bool) -> dict[str, Any]:
    """Without sharding over data ranks: every state tensor has the parameter's shape already."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    state = {}
    for number, (parameter, main) in enumerate(_parameters(part)):
        tensors = {name: part.optimizer.state[main][name] for name in MOMENTS}
        if main is not parameter:
            tensors["fp32_param"] = main
        state[str(number)] = {
            name: make_sharded_optimizer_tensor(places[id(parameter)], tensor.data, f"optimizer.state.{name}")
            for name, tensor in tensors.items()
        }
    return state


def _distributed(
    part: Any, model_state: Any, _places: dict[int, Any], loading: bool
) -> dict[str, dict[str, Any]]:
    """With it: gathered and cut to parameters by Megatron, under the names that `_local` gives."""
    whole = part.sharded_param_state_fully_reshardable(model_state, loading, METADATA)
    state = {}
    for number, parameter in enumerate(_in_buffer_order(part)):
        tensors = whole[number]
        master = tensors.pop("param")
        if parameter.dtype is not torch.float32:
            key = master.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.", 1)
            tensors["fp32_param"] = replace(master, key=key)
        state[str(number)] = tensors
    return state


def _restore_distributed(part: Any, loaded: dict[str, dict[str, Tensor]]) -> None:
    whole: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(_in_buffer_order(part)):
        tensors = dict(loaded[str(number)])
        tensors["param"] = tensors.pop("fp32_param", parameter.detach())
        whole[number] = tensors
    part.load_parameter_state_from_fully_reshardable(whole)


def _in_buffer_order(part: Any) -> list[Any]:
    """The parameters as sharded_param_state_fully_reshardable numbers them (distrib_optimizer.py:1480)."""
    return [parameter for buffer in part.buffers for parameter in buffer.param_index_map]


def _copy(target: Tensor, source: Tensor) -> None:
    if target.data_ptr() != source.data_ptr():  # loaded in place otherwise
        target.data.copy_(source)
