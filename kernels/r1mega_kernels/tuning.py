"""Which tile sizes, warps and stages a kernel is launched with: measured on the device, kept as data.

    tuned/<device>.json: tunable -> class of shapes -> parameters, their time, the default's, versions

One file per device, named after it and written there by `r1mega bench kernels --tune`. Where there is no entry the
default serves: the first of the kernel's candidates. A file that cannot be read, or that has parameters which are no
candidate, is an error: nothing is guessed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"
Parameters = dict[str, Any]
"""As the kernel is launched with: {"BLOCK_V": 2048, "num_warps": 8}."""


@dataclass(frozen=True)
class Entry:
    """What was measured of one tunable for one class of shapes."""

    parameters: Parameters
    """The fastest."""
    microseconds: float
    default_microseconds: float
    torch: str
    triton: str


Entries = dict[str, dict[str, Entry]]
"""Tunable -> class of shapes -> entry."""


@dataclass(frozen=True)
class Tunable:
    """A kernel, or kernels that share their parameters, and all that these may be."""

    name: str
    """operator.kernel"""
    candidates: tuple[Parameters, ...]
    """The first is the default."""

    def listed(self, every: bool) -> tuple[Parameters, ...]:
        return self.candidates if every else self.candidates[:1]

    def on(self, device: torch.device, shapes: str) -> Parameters:
        """The device's entry for this class of shapes, or the default. ValueError where the file is malformed."""
        if self.name in _forced:
            parameters, asked = _forced[self.name]
            asked.add(shapes)
            return parameters
        if device.type != "cuda":  # Triton's interpreter
            return self.candidates[0]
        file, entries = _entries_of(device)
        entry = entries.get(self.name, {}).get(shapes)
        if entry is None:
            return self.candidates[0]
        if entry.parameters not in self.candidates:
            if _tuning:
                return self.candidates[0]
            raise ValueError(
                f"{file}: {self.name}, {shapes}: {entry.parameters} is no candidate of this version; "
                f"run `r1mega bench {self.name.partition('.')[0]} --tune`, or delete the entry"
            )
        return entry.parameters

    @contextmanager
    def forced(self, parameters: Parameters) -> Iterator[set[str]]:
        """Inside, these parameters serve on every device. Yields the classes of shapes that were asked for."""
        asked: set[str] = set()
        before = _forced.get(self.name)
        _forced[self.name] = parameters, asked
        try:
            yield asked
        finally:
            del _forced[self.name]
            if before:
                _forced[self.name] = before


_forced: dict[str, tuple[Parameters, set[str]]] = {}
_tuning: list[bool] = []
"""Not empty while entries are written: those of an older version do not stand in the way then."""


@contextmanager
def writing() -> Iterator[None]:
    """While tuning."""
    _tuning.append(True)
    try:
        yield
    finally:
        _tuning.pop()


def shape_class(*kinds: object, **sizes: int) -> str:
    """("bfloat16", V=129280) -> "bfloat16 V131072": sizes up to the same power of two are one class."""
    rounded = [f"{name}{1 << max(0, size - 1).bit_length()}" for name, size in sizes.items()]
    return " ".join([*(str(kind).removeprefix("torch.") for kind in kinds), *rounded])


def check_writable() -> None:
    """ValueError where no file could be kept."""
    if not os.access(FOLDER if FOLDER.exists() else FOLDER.parent, os.W_OK):
        raise ValueError(
            f"{FOLDER} cannot be written, where tuned parameters are kept: tune in a checkout of your own"
        )


def file_of(device_name: str) -> Path:
    """device_name: torch.cuda.get_device_name's."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def read(file: Path) -> Entries:
    """Empty where there is no file; ValueError where it is malformed."""
    if not file.exists():
        return {}
    try:
        return {
            tunable: {shapes: Entry(**entry) for shapes, entry in classes.items()}
            for tunable, classes in json.loads(file.read_text())["tunables"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: malformed ({type(error).__name__}: {error}); "
            "delete it, and write it anew with `r1mega bench kernels --tune`"
        ) from error


def write(device_name: str, found: Entries) -> Path:
    """Replace the entries in `found`, and keep the device's others."""
    file = file_of(device_name)
    entries = read(file)
    for tunable, classes in found.items():
        entries[tunable] = entries.get(tunable, {}) | classes
    tables = {
        tunable: {shapes: asdict(entry) for shapes, entry in sorted(classes.items())}
        for tunable, classes in sorted(entries.items())
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".writing-{file.name}")
    partial.write_text(json.dumps({"device": device_name, "tunables": tables}, indent=1) + "\n")
    os.replace(partial, file)
    _entries_of.cache_clear()
    return file


@cache
def _entries_of(device: torch.device) -> tuple[Path, Entries]:
    file = file_of(torch.cuda.get_device_name(device))
    return file, read(file)
