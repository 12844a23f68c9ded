"""CUDA and CPU: the only place that names a device or a backend, and that adapts Megatron-core.

Everyone else receives a `Platform` and asks it. `prepare_megatron()` comes before the first import of
megatron.core. On CPU, Megatron-core runs through its own code: its modules see a torch whose `cuda` is the
CPU, and a few Megatron symbols that need Transformer Engine, Apex or a GPU are replaced. On CUDA only the
replacements that correct numbers stay. Every patch says why it is there; line numbers are megatron-core
0.16.1's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Platform:
    name: str
    """"cpu" | "cuda"."""
    device: str
    """torch's device type."""
    collectives: str
    """torch.distributed's backend."""

    def device_of(self, local_rank: int) -> torch.device:
        """The device of the `local_rank`-th process of this machine."""
        return torch.device(self.device, local_rank) if self.name == "cuda" else torch.device(self.device)

    def set_threads(self, num_threads: int) -> None:
        """Bound the threads of one operation."""
        torch.set_num_threads(num_threads)

    def prepare_megatron(self) -> None:
        """Make megatron-core importable and correct here; calling it again does nothing."""
        _prepare_megatron(self.name)

    def init_process_group(
        self, rank: int, world_size: int, master_addr: str, master_port: int, timeout_seconds: float = 600.0
    ) -> None:
        """Join the default process group; a collective that waits longer than the timeout fails."""
        dist.init_process_group(
            self.collectives,
            init_method=f"tcp://{master_addr}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def join_group(
        self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float
    ) -> dist.ProcessGroup:
        """A process group of its own, beside the default one: its members meet at `store` (weight sync)."""
        timeout = timedelta(seconds=timeout_seconds)
        group = dist.ProcessGroup(store, rank, world_size)
        backend: Any
        if self.name == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            backend = dist.ProcessGroupNCCL(store, rank, world_size, options)
            kind = dist.ProcessGroup.BackendType.NCCL
        else:
            backend = dist.ProcessGroupGloo(store, rank, world_size, timeout)
            kind = dist.ProcessGroup.BackendType.GLOO
        backend._set_sequence_number_for_group()
        group._set_default_backend(kind)
        group._register_backend(torch.device(self.device), kind, backend)
        return group

    def peak_memory_bytes(self) -> int:
        """Peak device memory of this process (CPU: its peak resident set)."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def synchronize(self) -> None:
        """Wait for the device; a CPU never lags."""
        if self.name == "cuda":
            torch.cuda.synchronize()


CPU = Platform(name="cpu", device="cpu", collectives="gloo")
CUDA = Platform(name="cuda", device="cuda", collectives="nccl")


def detect(name: str = "auto") -> Platform:
    """The platform called `name`; "auto" takes CUDA where a GPU answers.

    Raises ValueError for an unknown name, and for "cuda" on a machine without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f'platform={name!r} is unknown: take "auto", "cpu" or "cuda"')
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError('platform="cuda", but torch sees no GPU here: take platform="cpu" or "auto"')
    return CUDA if name == "cuda" or (name == "auto" and has_gpu) else CPU


def is_collective_failure(error: Exception) -> bool:
    """Whether a collective or a message broke or ran out of time: a peer is gone or did not come.

    gloo raises plain RuntimeErrors that name its source files.
    """
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


def has_tags(group: dist.ProcessGroup) -> bool:
    """Whether messages of one group are told apart by their tags; NCCL knows only their order."""
    return dist.get_backend(group) != CUDA.collectives


def has_transformer_engine() -> bool:
    """Whether Megatron-core will find Transformer Engine."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_streams() -> bool:
    """Whether communication can go on behind computation, once Megatron is prepared."""
    return _prepared == "cuda"


def stream_event() -> Any:
    """What orders work on two streams; nothing on a CPU."""
    return torch.cuda.Event() if has_streams() else _Event()


def keep_for_this_stream(*tensors: Tensor) -> None:
    """The memory of tensors made on another stream is not given away before the current stream has done with them, also
    where they are dropped earlier; nothing on a CPU."""
    if has_streams():
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream())


class DuplicatedLinear(torch.nn.Module):
    """A linear layer whole on every tensor rank: MLA's down-projections, where Transformer Engine is missing.

    Its weight is marked `sequence_parallel`: each tensor rank sees its own slice of the tokens, so Megatron
    sums the gradients over the tensor axis.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable,
        bias: bool = False,
        parallel_mode: str = "duplicated",
        **_megatron_only: Any,
    ) -> None:
        super().__init__()
        assert not bias
        assert parallel_mode == "duplicated"
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=parameter_device())
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """By Megatron's linear operation, whose weight gradient can be put off (parallel/weight_gradients.py)."""
        from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

        product = linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            self.weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
        )
        return product, None


_prepared: str | None = None


def _prepare_megatron(name: str) -> None:
    global _prepared
    if _prepared is not None:
        assert _prepared == name, f"megatron-core is already prepared for {_prepared}, not {name}"
        return
    _prepared = name
    warnings.filterwarnings("ignore", module=r"megatron\..*")  # Apex and Transformer Engine are optional here
    if name == "cpu":
        _show_megatron_a_cpu()
        _redirect_tensor_methods()
        _read_split_sizes_on_cpu()
        _split_unevenly_by_all_to_all()
    if not has_transformer_engine():
        _replace_transformer_engine_symbols()
        _correct_torch_adam_in_distributed_optimizer()
        _duplicate_down_projections()


def parameter_device() -> torch.device:
    """Where this process's parameters live, once Megatron is prepared."""
    assert _prepared is not None, "call Platform.prepare_megatron() first"
    return torch.device("cpu") if _prepared == "cpu" else torch.device("cuda", torch.cuda.current_device())


# ---------------------------------------------------------------- the torch that Megatron sees on CPU
#
# Megatron calls torch.cuda unconditionally and writes device="cuda" as a literal. Its modules get a `torch` of
# their own, whose `cuda` is the CPU; everyone else in the process keeps the real one (transformers, for one,
# silently fails to build its rotary tables under a replaced torch.tensor).


class _Stream:
    """A CPU executes in order: every stream is the one stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    wait_event = synchronize = wait_stream

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    wait = synchronize = record

    def query(self) -> bool:
        return True


class _Replaced:
    """A module with some of its names replaced."""

    def __init__(self, module: ModuleType, replacements: dict[str, Any]) -> None:
        self.__dict__.update(replacements, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _returns(value: Any) -> Callable:
    return lambda *args, **kwargs: value


class _Generators:
    """torch.cuda.default_generators, indexed by Megatron with whatever current_device() returned."""

    def __getitem__(self, _device: Any) -> torch.Generator:
        return torch.default_generator


def _cuda_of_a_cpu() -> _Replaced:
    """torch.cuda with one device, the CPU, whose random generator is the CPU's (random.py:80-110)."""
    generator = torch.default_generator
    states = {
        "get_rng_state": lambda *args, **kwargs: generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: generator.set_state(state),
    }
    replacements: dict[str, Any] = {
        "current_device": _returns(torch.device("cpu")),
        "device_count": _returns(1),
        "get_device_capability": _returns((0, 0)),
        "get_device_name": _returns("cpu"),
        "is_current_stream_capturing": _returns(False),
        "memory_stats": lambda *args, **kwargs: {},
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "device": lambda *args, **kwargs: contextlib.nullcontext(),
        "default_generators": _Generators(),
        "random": _Replaced(torch.cuda.random, states),
        **states,
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None,
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)) and None,
    }
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "ipc_collect",
        "init",
    ):
        replacements[name] = _returns(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = _returns(0)
    ranges = {name: _returns(None) for name in ("range_push", "range_pop", "mark")}
    ranges["range"] = lambda *args, **kwargs: contextlib.nullcontext()
    replacements["nvtx"] = _Replaced(torch.cuda.nvtx, ranges)
    return _Replaced(torch.cuda, replacements)


def _is_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function: Callable, argument: str = "device") -> Callable:
    """The function with a GPU as `argument` replaced by the CPU, and without pinned memory."""

    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_gpu(kwargs.get(argument)):
            kwargs[argument] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return redirected


def _torch_of_a_cpu() -> _Replaced:
    """torch whose factories (schedules.py:596, clip_grads.py:90), torch.load and torch.cuda are the CPU's."""
    names = "tensor as_tensor zeros ones empty full arange rand randn randint eye linspace randperm"
    likes = "zeros_like ones_like empty_like full_like rand_like randn_like"
    replacements: dict[str, Any] = {}
    for name in f"{names} {likes}".split():
        replacements[name] = _on_cpu(getattr(torch, name))

    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return dist.barrier(*args, **kwargs)  # parallel_state.py:931; gloo has no device_ids

    replacements["load"] = _on_cpu(torch.load, "map_location")
    replacements["cuda"] = _cuda_of_a_cpu()
    replacements["distributed"] = _Replaced(torch.distributed, {"barrier": barrier})
    return _Replaced(torch, replacements)


class _MegatronLoader(Loader):
    """Loads a Megatron module, then puts the CPU's torch in its global name `torch`."""

    def __init__(self, loader: Loader, seen_torch: _Replaced) -> None:
        self.loader, self.seen_torch = loader, seen_torch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if getattr(module, "torch", None) is torch:
            module.torch = self.seen_torch  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _MegatronFinder(MetaPathFinder):
    """Finds what Python's own finder finds, for Megatron's modules only."""

    def __init__(self) -> None:
        self.seen_torch = _torch_of_a_cpu()

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("megatron."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _MegatronLoader(spec.loader, self.seen_torch)
        return spec


def _show_megatron_a_cpu() -> None:
    """Import Megatron with the CPU's torch, and uncompiled: its jit would start a C++ compiler."""
    early = sorted(name for name in sys.modules if name.startswith("megatron.core"))
    assert not early, f"{early[0]} was imported before Platform.prepare_megatron()"
    sys.meta_path.insert(0, _MegatronFinder())
    compile_ = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else lambda f: f  # type: ignore
    try:
        pass
    finally:
        torch.compile = compile_
    from megatron.core.tensor_parallel import random

    # Imported by name. Without a GPU torch queues the call for later, and no state would ever be restored.
    random._lazy_call = lambda call, **kwargs: call()
    random.device_ctx_manager = lambda *args: contextlib.nullcontext()


def _redirect_tensor_methods() -> None:
    """Methods cannot be replaced for one caller only. They change nothing that works without a GPU, but for
    Tensor.type() without argument: the optimizers sort parameters by "torch.cuda.FloatTensor" (optimizer.py:671).
    """
    tensor: Any = torch.Tensor
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = _returns(None)
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    to, type_ = tensor.to, tensor.type

    def to_cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], str | int | torch.device) and _is_gpu(args[0]):
            args = (torch.device("cpu"), *args[1:])
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return to(self, *args, **kwargs)

    def type_of_gpu(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_(self, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = to_cpu, type_of_gpu


# ---------------------------------------------------------------- Megatron symbols


def _read_split_sizes_on_cpu() -> None:
    """moe_utils.py:1093 turns split sizes into integers only where they are on a GPU; all_to_all needs integers."""
    from megatron.core.transformer.moe import token_dispatcher

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes


def _replace_transformer_engine_symbols() -> None:
    """What Megatron calls of Transformer Engine without asking whether it is there."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # moe_utils.py:1192 reads a name that was never bound
    init = CheckpointWithoutOutput.__init__

    def init_without_fp8(self: Any, fp8: Any = False) -> None:
        init(self, fp8 or None)  # random.py:636 takes the default False for "fp8 is on"

    CheckpointWithoutOutput.__init__ = init_without_fp8


def _split_unevenly_by_all_to_all() -> None:
    """gloo gathers and reduce-scatters equal parts only; experts divided over expert_tensor ranks that hold
    different numbers of tokens need unequal ones (mappings.py:150, :196)."""
    from megatron.core.tensor_parallel import mappings

    gather_equal, reduce_scatter_equal = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather(part: Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if sizes is None or group.size() == 1:
            return gather_equal(part, group, None, use_global_buffer)
        whole = part.new_empty(sum(sizes), *part.shape[1:])
        copies = part.repeat(group.size(), *[1] * (part.dim() - 1))
        dist.all_to_all_single(whole, copies, list(sizes), [part.shape[0]] * group.size(), group=group)
        return whole

    def reduce_scatter(
        whole: Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter_equal(whole, group, None, use_global_buffer)
        size = sizes[group.rank()]
        parts = whole.new_empty(size * group.size(), *whole.shape[1:])
        dist.all_to_all_single(parts, whole.contiguous(), [size] * group.size(), list(sizes), group=group)
        return parts.unflatten(0, (group.size(), size)).sum(dim=0)

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


def _correct_torch_adam_in_distributed_optimizer() -> None:
    """torch's Adam keeps a `step` tensor in each parameter's state; Apex and Transformer Engine do not."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    sharded_state_dict = DistributedOptimizer.sharded_state_dict

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        # :821-825 puts one step tensor into every parameter's state; Adam then counts it up once per parameter.
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def set_states_and_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # :940 copies every key of the state, but a checkpoint has no step: KeyError.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, **{k: state[k] for k in ("step",) if k in state}})

    def sharded_with_state(
        self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        # :642 asserts that the steps exist, which a fresh optimizer has not created yet.
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_state, is_loading, *args, **kwargs)

    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_and_step
    DistributedOptimizer.sharded_state_dict = sharded_with_state


def _duplicate_down_projections() -> None:
    """Let MLA's down-projections be whole on every tensor rank, as with Transformer Engine.

    The local spec splits them; with more than one tensor rank the backward of the gather that follows drops
    the gradients of the other ranks' heads, silently (multi_latent_attention.py:605-610). Megatron knows the
    duplicated case by comparing with TELinear, which without Transformer Engine is a mock.
    """
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.TELinear = DuplicatedLinear
