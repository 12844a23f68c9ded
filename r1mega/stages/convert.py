"""`r1mega convert SOURCE TARGET`: a Hugging Face directory in another dtype.

To and from fp8 as DeepSeek-V3's checkpoints are: matrices in float8_e4m3fn with `weight_scale_inv`, one float32 for each
block of 128 x 128 (r1mega_kernels.fp8_block). The model is never in memory: a tensor is read, computed (on a GPU where
there is one) and written. TARGET appears whole or not at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega import platforms
from r1mega.config import ConfigError
from r1mega.models.hf_config import load_hf_config
from r1mega.models.hf_files import (
    DTYPES,
    MAX_SHARD_BYTES,
    SCALE,
    check_dtypes,
    check_scales,
    copy_small_files,
    dequantized,
    files_of,
    in_order_of_the_files,
    open_tensors,
    read_scales,
    scale_blocks,
    scratch_of,
    shard_name,
    small_files,
    write_config,
    write_index,
)
from r1mega.models.shard_file import ShardFile, Stored
from r1mega.stages.console import Console
from r1mega.stages.lock import lock
from r1mega_kernels.fp8_block import BLOCK, quantize_weight

TARGETS = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "float32": torch.float32}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
QUANTISED = re.compile(
    r"\.(self_attn\.\w+_proj(_with_mqa)?|(mlp|experts\.\d+|shared_experts)\.\w+_proj)\.weight$"
)
"""The projections of attention, MLPs and experts, the MTP layer's too. Not embeddings, heads, norms, gates and eh_proj."""
KEPT = ("e_score_correction_bias", "rotary_emb.inv_freq", "score.weight")
"""Names that end so keep their dtype: the router's bias, old checkpoints' buffer, and a scalar head are float32."""
LOCK = ".lock"


def run(
    source: Path, target: Path, dtype: str, console: Console, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `source` to `target` in `dtype`. ValueError or FileNotFoundError for what cannot be done, before it begins but
    for values that have no place in fp8; a full disk is a ConfigError too."""
    target = Path(os.path.abspath(target))
    _refuse_existing(target)
    conversion = Conversion(source, TARGETS[dtype])
    scratch = scratch_of(target)
    scratch.mkdir(parents=True, exist_ok=True)
    with lock(scratch, "another conversion writes there; wait for it or name another TARGET"):
        try:
            for left in scratch.iterdir():  # by a conversion that was killed
                if left.name != LOCK:
                    left.unlink()
            conversion.write(scratch, target, console, max_shard_bytes)
            _refuse_existing(target)
            scratch.rename(target)
            (target / LOCK).unlink()
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ConfigError(
                    f"{target}: no space is left there; make room or name another TARGET"
                ) from error
            raise


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists: name another TARGET, or remove it")


@dataclass(frozen=True)
class Item:
    """A tensor of the source and what it becomes: itself, or fp8 values and their scales."""

    name: str
    becomes: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.becomes)


class Conversion:
    """Reads the headers and refuses what cannot be converted."""

    def __init__(self, source: Path, dtype: torch.dtype):
        self.source, self.dtype = source, dtype
        self.fp8 = dtype == torch.float8_e4m3fn
        self.numbers = torch.bfloat16 if self.fp8 else dtype
        """Of what is not in fp8."""
        self.device = platforms.detect().device_of(0)
        self.config = _config_of(source)
        quantization = self.config.get("quantization_config") or {}
        files = files_of(source)
        names = in_order_of_the_files(files)
        names += sorted(files.keys() - set(names))  # open_tensors says what is wrong with them
        tensors = [name for name in names if not name.endswith(SCALE)]
        lost = sorted(set(names) - set(tensors) - {name + SCALE for name in tensors})
        if lost:
            raise ValueError(f"{source}: {len(lost)} scales without a tensor, first {lost[0]}")
        self.slices, self.scales = open_tensors(source, files, tensors)
        check_dtypes(source, self.slices)
        check_scales(source, self.slices, self.scales, quantization)
        self.items = [Item(name, self._becomes(name)) for name in tensors]
        if all(item.becomes[0].dtype == DTYPES[self.slices[item.name].get_dtype()] for item in self.items):
            raise ConfigError(f"{source} has that dtype already: there is nothing to convert")

    def _becomes(self, name: str) -> tuple[Stored, ...]:
        shape = tuple(self.slices[name].get_shape())
        if name.endswith(KEPT):
            return (Stored(name, DTYPES[self.slices[name].get_dtype()], shape),)
        if self.fp8 and len(shape) == 2 and QUANTISED.search(name):
            scale = Stored(name + SCALE, torch.float32, tuple(scale_blocks(shape)))
            return Stored(name, self.dtype, shape), scale
        return (Stored(name, self.numbers, shape),)

    def write(self, scratch: Path, target: Path, console: Console, max_shard_bytes: int) -> None:
        """All files of the new directory; config.json is the last."""
        shards = list(_shards(self.items, max_shard_bytes))
        total = sum(item.nbytes for item in self.items)
        _check_space(scratch, target, total + sum(file.stat().st_size for file in small_files(self.source)))
        began = time.monotonic()
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            file, shard_began = shard_name(number, len(shards)), time.monotonic()
            contents = [stored for item in shard for stored in item.becomes]
            with ShardFile(scratch / file, contents) as out:
                for item in shard:
                    for stored, tensor in zip(item.becomes, self._converted(item), strict=True):
                        out.write(stored.name, tensor)
            weight_map.update({stored.name: file for stored in contents})
            console.phase(f"{file}: {_speed(sum(item.nbytes for item in shard), shard_began)}")
        write_index(scratch, weight_map, total)
        copy_small_files(self.source, scratch)
        config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        if self.fp8:
            config["quantization_config"] = QUANTIZATION
        write_config(scratch, config, self.numbers)
        console.result(str(target), _speed(total, began))

    def _converted(self, item: Item) -> Sequence[Tensor]:
        read, name, stored = self.slices[item.name], item.name, item.becomes[0]
        scale = self.scales.get(name)
        if scale is None:
            numbers = read[...]
            if len(item.becomes) == 1:
                return [numbers.to(stored.dtype)]
            if numbers.dtype != torch.bfloat16:
                numbers = numbers.to(torch.float32)
            return self._quantised(name, numbers)
        rows = stored.shape[0]
        if len(item.becomes) == 2:  # fp8 already
            return [read[...], read_scales(self.source, name, scale, 0, 0, -(-rows // BLOCK))]
        return [dequantized(self.source, name, read, scale, 0, 0, rows, self.device, self.numbers).cpu()]

    def _quantised(self, name: str, matrix_OI: Tensor) -> Sequence[Tensor]:
        try:
            values_OI, scale_PQ = quantize_weight(matrix_OI.to(self.device).contiguous())
        except ValueError as error:
            raise ConfigError(f"{self.source}: {name}: {error}") from error
        scale_PQ = scale_PQ.cpu()
        if not bool(scale_PQ.isfinite().all()):
            raise ConfigError(f"{self.source}: {name}: values are NaN or infinite; fp8 has no place for them")
        return values_OI.cpu(), scale_PQ


def _config_of(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise FileNotFoundError(f"no model directory {source}: name a Hugging Face directory as SOURCE")
    if (source / "hf" / "config.json").is_file():
        raise ConfigError(f"{source} is a run's directory: its model is {source / 'hf'}")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is no model directory: config.json is missing")
    config = load_hf_config(source)
    method = (config.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise ConfigError(f"{source}: quant_method is {method!r} in config.json; only 'fp8' can be read")
    return config


def _shards(items: Sequence[Item], max_bytes: int) -> Iterator[list[Item]]:
    """Parts of at most `max_bytes`; values and their scales stay together."""
    shard: list[Item] = []
    size = 0
    for item in items:
        if shard and size + item.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.nbytes
    if shard:
        yield shard


def _check_space(folder: Path, target: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{target} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there: "
            "make room or name another TARGET"
        )


def _speed(nbytes: int, began: float) -> str:
    seconds = max(time.monotonic() - began, 1e-9)
    return f"{nbytes / 1e9:.3g} GB written in {seconds:.1f} s, {nbytes / seconds / 1e9:.3g} GB/s"
