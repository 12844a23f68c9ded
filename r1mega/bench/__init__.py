"""`r1mega bench`: how fast the system and its kernels are on this machine; with --tune, how its GPU likes the kernels best.

step             one reinforcement-learning step, phase by phase, beside vLLM alone and transformers alone
rewards          every reward: throughput, latency, verdicts, beside its goals
schedule         pipeline orders: makespans, searched orders, DeepSeek-V3's step, pictures; nothing is timed
layouts          every layout's loss and gradients beside those of one process
kernels          all of the following
packing          a million sequences into chunks (r1mega_kernels/packing)
linear_logprob   the fused head (r1mega_kernels/linear_logprob)
grpo_loss        the head with the loss and its gradients (r1mega_kernels/grpo_loss)
eplb             replicas of hot experts, placed on GPUs (r1mega_kernels/eplb)
grouped_topk     the gate (r1mega_kernels/grouped_topk)
moe_permute      tokens to their experts and back (r1mega_kernels/moe_permute)
fp8_block        fp8 with scales of blocks (r1mega_kernels/fp8_block)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.bench.machine import machine
from r1mega.config import ConfigError
from r1mega_kernels.bench import check_can_tune

KERNEL_BENCHES = {
    "packing": "r1mega_kernels.packing.bench_packing",
    "linear_logprob": "r1mega_kernels.linear_logprob.bench_linear_logprob",
    "grpo_loss": "r1mega_kernels.grpo_loss.bench_grpo_loss",
    "eplb": "r1mega_kernels.eplb.bench_eplb",
    "grouped_topk": "r1mega_kernels.grouped_topk.bench_grouped_topk",
    "moe_permute": "r1mega_kernels.moe_permute.bench_moe_permute",
    "fp8_block": "r1mega_kernels.fp8_block.bench_fp8_block",
}
"""Programs with an option --json FILE."""
NOT_TUNED = ("packing", "eplb")
"""They run on a CPU; the other kernels' programs have an option --tune."""
RESPONSES = ("varying", "uniform", "both")


def run(
    what: str,
    json_path: str | None = None,
    responses: str = "both",
    *,
    parts: Sequence[str] = (),
    shared: str | None = None,
    drawing: Mapping[str, Any] | None = None,
    tune: bool = False,
) -> None:
    """Run the benchmark `what` ("all": every one), print its table, and write its numbers to `json_path`.

    Without a path, in a checkout, kernels write theirs to docs/benchmarks/kernels_<device>.json (r1mega_kernels/bench.py).
    tune: find the kernels' parameters for this GPU instead, and keep them (r1mega_kernels/tuning.py).
    """
    if responses not in RESPONSES:
        raise ConfigError(f"--responses {responses}: it is one of {', '.join(RESPONSES)}")
    groups = {
        "all": ["step", "rewards", "schedule", "layouts", *KERNEL_BENCHES],
        "kernels": [*KERNEL_BENCHES],
    }
    chosen = groups.get(what, [what])
    if tune:
        chosen = _tuned(what, chosen)
    results: dict[str, Any] = {"machine": machine()}
    for name in chosen:
        if name == "step":
            results[name] = _step(responses)
        elif name == "schedule":
            results[name] = _schedule(drawing or {})
        elif name == "layouts":
            results[name] = _layouts()
        else:
            kept = json_path is not None
            results[name] = (
                _rewards(parts, shared, json_path) if name == "rewards" else _kernel(name, tune, kept)
            )
        if json_path:
            write_json(Path(json_path), results)


def _step(responses: str) -> dict[str, Any]:
    from r1mega.bench import model, step

    kinds = model.RESPONSES if responses == "both" else (responses,)
    return {kind: step.run(kind) for kind in kinds}


def _rewards(parts: Sequence[str], shared: str | None, json_path: str | None) -> dict[str, Any]:
    """With --json FILE.json the trace of the part "overlap" is FILE.trace.json."""
    from r1mega.bench import rewards

    return rewards.run(parts, shared, Path(json_path).with_suffix(".trace.json") if json_path else None)


def _schedule(drawing: Mapping[str, Any]) -> dict[str, Any]:
    from r1mega.bench import schedules

    return schedules.run(schedules.Picture(**drawing))


def _layouts() -> list[dict[str, Any]]:
    from r1mega.bench import layouts

    return layouts.table()


def _tuned(what: str, chosen: Sequence[str]) -> list[str]:
    """Those of the chosen that can be tuned. ValueError where there is no GPU."""
    offered = [name for name in KERNEL_BENCHES if name not in NOT_TUNED]
    if what != "kernels" and what not in offered:
        raise ConfigError(f"--tune: {what} has nothing to tune; it is one of kernels, {', '.join(offered)}")
    check_can_tune()
    return [name for name in chosen if name in offered]


def _kernel(name: str, tune: bool, kept: bool) -> Any:
    """Its rows, if they are kept; otherwise it writes its record itself."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            KERNEL_BENCHES[name],
            *["--json", str(file)] * kept,
            *["--tune"] * tune,
        ]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}")
        return json.loads(file.read_text()) if kept else None


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{path.name}")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
