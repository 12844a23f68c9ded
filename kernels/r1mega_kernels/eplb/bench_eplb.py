"""Places the replicas of DeepSeek-V3's experts: time and balance of each solver, beside the algorithm in Python.

    python -m r1mega_kernels.eplb.bench_eplb [--layers N] [--repeats N] [--json FILE]

256 experts in 8 groups, 288 or 320 slots on 32 GPUs: in 4 or 8 nodes, or with nodes playing no part. Loads are drawn:
even, log-normal, with a spread between groups as well, and one hot group. Balance is the load of the heaviest GPU over
the mean, averaged over layers; its lower bound knows nothing of nodes. Times are CPU times of one thread, the best of
many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega_kernels.bench import JSON_HELP, keep
from r1mega_kernels.eplb import SOLVERS, imbalance, rebalance_experts, reference

EXPERTS, GROUPS, GPUS = 256, 8, 32


def draw_loads(layers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    experts = (0.7 * normal(layers, GROUPS, EXPERTS // GROUPS)).exp()
    hot = (0.5 * normal(layers, EXPERTS)).exp()
    hot[:, : EXPERTS // GROUPS] *= 8
    return {
        "even": torch.randint(1, 1000, (layers, EXPERTS), generator=generator).float(),
        "log-normal": normal(layers, EXPERTS).exp(),
        "uneven groups": ((0.7 * normal(layers, GROUPS, 1)).exp() * experts).flatten(1),
        "hot group": hot,
    }


def best_milliseconds(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds)


def measure(name: str, load: Tensor, slots: int, nodes: int | None, repeats: int) -> dict[str, Any]:
    groups, num_nodes = (
        (1, 2) if nodes is None else (GROUPS, nodes)
    )  # one group in two nodes: the global mode
    setting = slots, groups, num_nodes, GPUS
    few = max(1, len(load) // 20)
    python = best_milliseconds(lambda: reference.rebalance_experts(load[:few], *setting), 3) * len(load) / few
    row: dict[str, Any] = {
        "loads": name,
        "layers": len(load),
        "slots": slots,
        "nodes": nodes,
        "lower_bound": reference.lower_bound(load, slots, GPUS).mean().item(),
        "python_milliseconds": python,
        "python_measured_on_layers": few,
    }
    for solver in SOLVERS:
        balance = imbalance(load, rebalance_experts(load, *setting, solver), GPUS)
        milliseconds = best_milliseconds(partial(rebalance_experts, load, *setting, solver), repeats)
        row[solver] = {
            "milliseconds": milliseconds,
            "max_over_mean": balance.mean().item(),
            "worst_layer": balance.max().item(),
        }
    return row


def run(layers: int = 58, repeats: int = 20) -> list[dict[str, Any]]:
    """Prints the table and returns its rows."""
    torch.set_num_threads(1)
    print(f"{layers} layers, {EXPERTS} experts, {GPUS} GPUs; milliseconds and heaviest GPU over the mean")
    print(
        f"{'loads':14}{'slots':>6}{'nodes':>6}{'bound':>8}"
        + "".join(f"{solver:>16}" for solver in SOLVERS)
        + f"{'Python ms*':>12}"
    )
    rows = []
    for name, load in draw_loads(layers).items():
        for slots in (288, 320):
            for nodes in (None, 4, 8):
                row = measure(name, load, slots, nodes, repeats)
                rows.append(row)
                cells = "".join(
                    f"{row[solver]['milliseconds']:9.2f}{row[solver]['max_over_mean']:7.4f}"
                    for solver in SOLVERS
                )
                print(
                    f"{name:14}{slots:6}{nodes or '-':>6}{row['lower_bound']:8.4f}{cells}"
                    f"{row['python_milliseconds']:12.0f}"
                )
    print("* measured on some layers, scaled linearly")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help=JSON_HELP)
    args = parser.parse_args()
    keep("eplb", run(args.layers, args.repeats), "cpu", args.json)


if __name__ == "__main__":
    main()
