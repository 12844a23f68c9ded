"""One table of names per architecture: which Hugging Face tensor is which part of which Megatron parameter.

The table serves import, export and weight sync alike. A row says how a parameter is made of HF tensors
(`kind`) and thereby how it is divided over the mesh; `regions` turns a row into the parts one process holds.
Every HF tensor lies in exactly one parameter, and the part of it that a process holds is a range of one dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from r1mega.parallel.mesh import Mesh

KINDS = ("whole", "rows", "columns", "gate_up", "qkv", "expert_gate_up", "expert_down")


@dataclass(frozen=True)
class Weight:
    """One row: `parameter` is made of the tensors `hf`, as `kind` says.

    whole: the same on every tensor rank. rows, columns: divided over the tensor axis by dim 0, dim 1.
    gate_up: [gate rows; up rows], each divided. qkv: per key-value head its query heads, its key, its value;
    key-value heads divided. expert_gate_up, expert_down: experts stacked on dim 0, divided over the expert
    axis, and inside an expert over the expert_tensor axis; HF names hold "{expert}".
    """

    parameter: str
    hf: tuple[str, ...]
    kind: str
    heads: tuple[int, int, int] | None = None
    """qkv only: query heads, key-value heads, head dim."""
    copies: tuple[str, ...] = ()
    """Names under which checkpoints repeat `hf[0]`: written, and not needed when reading."""
    constant: float | None = None
    """What a random initialisation sets (norms 1, biases 0); None draws from a normal distribution."""


@dataclass(frozen=True)
class Region:
    """The part of one HF tensor that this process holds, and where it lies in the parameter."""

    hf_name: str
    hf_shape: tuple[int, ...]
    dim: int
    """Dim of the HF tensor that is divided; rows start:start + length are here."""
    start: int
    length: int
    view: tuple[int, ...]
    index: tuple[Any, ...]
    axis: str | None
    """Mesh axis that divides `dim`: "tensor", "expert_tensor" or None."""

    def of(self, parameter: Tensor) -> Tensor:
        """The held part: a view of the parameter's storage, whose reshape to `shape` is the HF part."""
        return parameter.view(self.view)[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.length if i == self.dim else n for i, n in enumerate(self.hf_shape))


def _region(
    name: str,
    view: tuple[int, ...],
    index: tuple[Any, ...],
    part: tuple[int, ...],
    dim: int,
    axis: str | None,
    mesh: Mesh,
) -> Region:
    """A region from the shape of the held part: the HF shape is `size` of them along `dim`."""
    size = getattr(mesh, f"{axis}_size") if axis else 1
    rank = getattr(mesh, f"{axis}_rank") if axis else 0
    hf_shape = tuple(n * size if i == dim else n for i, n in enumerate(part))
    return Region(name, hf_shape, dim, rank * part[dim], part[dim], view, index, axis)


def regions(weight: Weight, shape: tuple[int, ...], mesh: Mesh) -> Iterator[Region]:
    """The HF tensors of which this process holds a part, in a fixed order; `shape` is the parameter's here."""
    everything = (slice(None),)
    if weight.kind in ("whole", "rows", "columns"):
        axis = None if weight.kind == "whole" else "tensor"
        dim = 1 if weight.kind == "columns" else 0
        yield _region(weight.hf[0], shape, everything, shape, dim, axis, mesh)
    elif weight.kind == "gate_up":
        half = (shape[0] // 2, *shape[1:])
        for i, name in enumerate(weight.hf):
            yield _region(name, (2, *half), (i,), half, 0, "tensor", mesh)
    elif weight.kind == "qkv":
        assert weight.heads is not None
        query_heads, kv_heads, head_dim = weight.heads
        per_group, groups = query_heads // kv_heads, kv_heads // mesh.tensor_size
        view = (groups, per_group + 2, head_dim, *shape[1:])
        spans = (slice(0, per_group), slice(per_group, per_group + 1), slice(per_group + 1, per_group + 2))
        for name, span in zip(weight.hf, spans, strict=True):
            part = (groups * (span.stop - span.start) * head_dim, *shape[1:])
            yield _region(name, view, (slice(None), span), part, 0, "tensor", mesh)
    elif weight.kind == "expert_gate_up":
        experts, half = shape[0], (shape[1] // 2, shape[2])
        for slot in range(experts):
            for i, name in enumerate(weight.hf):
                name = name.format(expert=mesh.expert_rank * experts + slot)
                yield _region(name, (experts, 2, *half), (slot, i), half, 0, "expert_tensor", mesh)
    elif weight.kind == "expert_down":
        for slot in range(shape[0]):
            name = weight.hf[0].format(expert=mesh.expert_rank * shape[0] + slot)
            yield _region(name, shape, (slot,), shape[1:], 1, "expert_tensor", mesh)
    else:
        raise AssertionError(f"{weight.parameter}: kind {weight.kind!r} is not in {KINDS}")
    assert prod(shape) > 0
