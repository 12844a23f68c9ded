"""The files of a Hugging Face model directory: safetensors read by name, fp8 matrices as the numbers they stand for,
and what a new directory needs beside its tensors.

fp8 as DeepSeek-V3's checkpoints have it: X in float8_e4m3fn with X_scale_inv, one float32 for each block of 128 x 128.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1mega_kernels.fp8_block import BLOCK, dequantize_weight

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
"""A fp8 tensor's scales have its name with this after it."""
FP8 = "F8_E4M3"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    FP8: torch.float8_e4m3fn,
}
"""What can be read, by safetensors' names."""
MAX_SHARD_BYTES = 5 * 10**9
"""Of a file; a larger tensor is alone in its file."""

Slices = Mapping[str, Any]
"""safetensors' slices by tensor name: shape, dtype, and the numbers where they are indexed."""


# ---------------------------------------------------------------- reading


def files_of(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Raises FileNotFoundError without weights."""
    if (path / INDEX).is_file():
        try:
            names = json.loads((path / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path / INDEX}: no index with a weight_map ({error})") from error
        return {name: path / file for name, file in names.items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{path}: neither {INDEX} nor model.safetensors is there")
    return dict.fromkeys(_opened(single).keys(), single)


def in_order_of_the_files(files: Mapping[str, Path]) -> list[str]:
    """The names as their bytes lie on the disk."""
    return [
        name
        for file in sorted(set(files.values()))
        for name in _opened(file).offset_keys()
        if files.get(name) == file  # a tensor may lie in another file too
    ]


def open_tensors(path: Path, files: Mapping[str, Path], names: Iterable[str]) -> tuple[Slices, Slices]:
    """Tensors by name, and the scales of those in fp8 by the same names. Only headers are read.

    Raises ValueError where fp8 has no scales, a tensor is not in its file, or a file is not whole.
    """
    handles: dict[Path, Any] = {}

    def opened(name: str) -> Any:
        file = files[name]
        if file not in handles:
            handles[file] = _opened(file)
        try:
            return handles[file].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: {INDEX} says that {name} is in {file.name}, and it is not") from error

    slices = {name: opened(name) for name in names}
    scales: dict[str, Any] = {}
    for name, tensor in slices.items():
        if name + SCALE in files:
            scales[name] = opened(name + SCALE)
        elif tensor.get_dtype() == FP8:
            raise ValueError(f"{path}: {name} is {FP8}, and its scales {name + SCALE} are missing")
    return slices, scales


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:  # torch's: the file is larger than this machine's memory
        raise ValueError(
            f"{file}: {str(error).splitlines()[0]}; in several smaller files it could be read"
        ) from error


def check_dtypes(path: Path, slices: Slices) -> None:
    for name, tensor in slices.items():
        if tensor.get_dtype() not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {tensor.get_dtype()}; only {', '.join(DTYPES)} can be read"
            )


def scale_blocks(shape: Iterable[int]) -> list[int]:
    return [-(-size // BLOCK) for size in shape]


def check_scales(path: Path, slices: Slices, scales: Slices, quantization: Mapping[str, Any]) -> None:
    """ValueError where scales do not fit their tensors. quantization: of config.json."""
    size = quantization.get("weight_block_size") or [BLOCK, BLOCK]
    if scales and size != [BLOCK, BLOCK]:
        raise ValueError(
            f"{path}: weight_block_size is {size} in config.json; only {[BLOCK, BLOCK]} is supported"
        )
    for name, scale in scales.items():
        shape, dtype = slices[name].get_shape(), slices[name].get_dtype()
        if dtype != FP8:
            raise ValueError(f"{path}: {name} has scales, {name + SCALE}, and is {dtype}, not {FP8}")
        if len(shape) != 2:
            raise ValueError(
                f"{path}: {name} is {FP8} and {list(shape)}; only matrices have blocks of scales"
            )
        blocks = scale_blocks(shape)
        if list(scale.get_shape()) != blocks or scale.get_dtype() != "F32":
            raise ValueError(
                f"{path}: {name + SCALE} is {scale.get_dtype()} {list(scale.get_shape())}; blocks of {BLOCK} x "
                f"{BLOCK} of {list(shape)} need F32 {blocks}"
            )


def span(read: Any, dim: int, start: int, end: int) -> Tensor:
    return read[start:end] if dim == 0 else read[:, start:end]


def read_scales(path: Path, name: str, scale: Any, dim: int, first: int, end: int) -> Tensor:
    """The scales of the blocks [first, end) along `dim`. ValueError for those that no quantiser makes."""
    scale_PQ = span(scale, dim, first, end)
    if not bool((scale_PQ.isfinite() & (scale_PQ >= 0)).all()):
        raise ValueError(f"{path}: {name + SCALE} has values that are negative, infinite or NaN")
    return scale_PQ.contiguous()


def dequantized(
    path: Path, name: str, read: Any, scale: Any, dim: int, start: int, length: int,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows (dim 0) or columns (dim 1) [start, start + length) of a fp8 matrix, on `device`, where they are computed.

    dtype: bfloat16 or float32.
    """
    first, end = start // BLOCK, start + length
    scale_PQ = read_scales(path, name, scale, dim, first, -(-end // BLOCK))
    values_OI = span(read, dim, first * BLOCK, end)  # from the start of a block
    whole = dequantize_weight(values_OI.to(device).contiguous(), scale_PQ.to(device), dtype)
    return whole.narrow(dim, start - first * BLOCK, length)


# ---------------------------------------------------------------- writing


def scratch_of(path: Path) -> Path:
    """Where a directory is written before it is renamed to `path`."""
    return path.with_name(f".writing-{path.name}")


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """config.json, with the dtype of the numbers."""
    name = "dtype" if "dtype" in config else "torch_dtype"
    written = {**config, name: str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


def small_files(source: Path) -> list[Path]:
    """Tokenizer, generation config, chat template, licence: everything that is neither weights nor config."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    return [
        file
        for file in (sorted(source.iterdir()) if source.is_dir() else [])
        if file.is_file() and not file.name.endswith(weights) and file.name not in ("config.json", ".lock")
    ]


def copy_small_files(source: Path, folder: Path) -> None:
    for file in small_files(source):
        shutil.copyfile(file, folder / file.name)


def replace_directory(scratch: Path, path: Path) -> None:
    """rename(2) replaces no directory that has files: an old one steps aside first."""
    scratch.chmod(0o755)
    old = scratch.with_name(scratch.name + ".old")
    if path.exists():
        os.replace(path, old)
    os.replace(scratch, path)
    shutil.rmtree(old, ignore_errors=True)
