"""A safetensors file written tensor by tensor, where the shapes are known before: memory holds one tensor at a time.

Format: 8 bytes with the header's length, the header (JSON), the tensors' bytes without gaps. Tensors of large elements come
first, so that every one is aligned to its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1mega.models.hf_files import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardFile:
    """Context manager; `write` takes the tensors in any order, each once."""

    def __init__(self, path: Path, contents: Sequence[Stored]):
        self.path, self._missing = path, {stored.name: stored for stored in contents}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        end = 0
        for stored in sorted(contents, key=lambda stored: -stored.dtype.itemsize):
            start, end = end, end + stored.nbytes
            self._starts[stored.name] = start
            header[stored.name] = {
                "dtype": NAMES[stored.dtype],
                "shape": stored.shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)

    def __enter__(self) -> ShardFile:
        self._file = open(self.path, "wb")
        self._file.write(struct.pack("<Q", len(self._header)) + self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """A contiguous tensor of the CPU."""
        stored = self._missing.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape), (stored, tensor.dtype)
        self._file.seek(8 + len(self._header) + self._starts[name])
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind or not self._missing, f"{self.path}: {len(self._missing)} tensors were not written"
