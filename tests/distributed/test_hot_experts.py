"""Replicas of hot experts over four expert-parallel ranks: the same numbers, and no rank with most of the work.

A skewed gate: every token takes expert 0, most take expert 1, both at home in rank 0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import free_port, mesh_of, packed, process_group

from r1mega.bench.layouts import MTP, Layout, train
from r1mega.config import ModelConfig, ParallelConfig

RANKS, SLOTS = 4, 16
PARALLEL = ParallelConfig(data=RANKS, expert=RANKS)
VARIANTS = {
    "plain": ("none", "alltoall"),
    "allgather": ("none", "allgather"),
    "recompute": ("full", "alltoall"),
}


def work_of_ranks(layers: list[Any], seen: list[int], compute: Any) -> tuple[Any, list[int]]:
    """What `compute` returns, and how many token-expert pairs came to each rank meanwhile."""
    seen.clear()
    result = compute()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
    dist.all_gather(counts, torch.tensor([sum(seen)]))
    return result, [int(count) for count in counts]


def run(rank: int, port: int, directory: Path) -> None:
    with mesh_of(PARALLEL, rank, port):
        for name, (recompute, dispatcher) in VARIANTS.items():
            torch.save(compare(rank, recompute, dispatcher), directory / f"{name} {rank}.pt")


def compare(rank: int, recompute: str, dispatcher: str) -> dict[str, Any]:
    from r1mega.models.expert_load import routers_of
    from r1mega.models.hot_experts import HotExperts, expert_layers
    from r1mega.models.language_model import build_model

    options = ModelConfig(dtype="float32", init="random", recompute=recompute, mtp_loss_weight=0.3)
    parallel = replace(PARALLEL, dispatcher=dispatcher)
    model = build_model(MTP, options, parallel, seed=5).train()
    routers, layers, seen = routers_of([model]), expert_layers([model]), []
    for router in routers:
        router.expert_bias.copy_(torch.tensor([10.0, 0.2, *[0.0] * 6]))
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[0]))
    batch = packed([31, 9, 24], MTP["vocab_size"], seed=rank)

    def gradients() -> dict[str, Any]:
        model.zero_grad()
        out = model(batch)
        loss = -(batch.token_weights_T * out.logprobs_T).sum() + 0.3 * out.mtp_loss_sum
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"logprobs": out.logprobs_T.detach(), "gradients": found}

    hot = HotExperts([model], (SLOTS - MTP["n_routed_experts"]) // RANKS)
    assert hot.num_nodes == 1
    hot.num_nodes = 2  # as on two machines
    before, work_before = work_of_ranks(layers, seen, gradients)
    counted = [router.local_tokens_per_expert.clone() for router in routers]
    hot.place()
    with hot.placed():
        shares_LE, replicas = hot.load.shares_LE(), [tuple(router.replicas) for router in routers]
        after, work_after = work_of_ranks(layers, seen, gradients)
        with torch.no_grad():
            forward_only = model.eval()(batch).logprobs_T
    with hot.placed():
        kept = [tuple(router.replicas) for router in routers]
    model.train()
    again, _ = work_of_ranks(layers, seen, gradients)
    return {
        "before": before,
        "after": after,
        "again": again,
        "forward_only": forward_only,
        "work": (work_before, work_after),
        "shares": shares_LE,
        "replicas": replicas,
        "kept": kept,
        "balance": hot.balance,
        "counts_tripled": all(
            torch.equal(router.local_tokens_per_expert, 3 * count)
            for router, count in zip(routers, counted, strict=True)
        ),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("hot")
    mp.spawn(run, (free_port(), directory), nprocs=RANKS)
    return {
        name: [
            torch.load(directory / f"{name} {rank}.pt", weights_only=False, map_location="cpu")
            for rank in range(RANKS)
        ]
        for name in VARIANTS
    }


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_change_neither_outputs_nor_gradients(variant: str, results: Any) -> None:
    for found in results[variant]:
        before, after = found["before"], found["after"]
        torch.testing.assert_close(after["logprobs"], before["logprobs"], rtol=0, atol=3e-6)
        torch.testing.assert_close(found["forward_only"], before["logprobs"], rtol=0, atol=3e-6)
        assert after["gradients"].keys() == before["gradients"].keys()
        for name, gradient in before["gradients"].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                after["gradients"][name],
                gradient,
                rtol=0,
                atol=1e-5 * scale + 1e-12,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        assert any("experts" in name and g.abs().max() > 1e-4 for name, g in before["gradients"].items())


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_outside_the_context_the_model_is_as_before(variant: str, results: Any) -> None:
    for found in results[variant]:
        assert torch.equal(found["again"]["logprobs"], found["before"]["logprobs"])
        for name, gradient in found["before"]["gradients"].items():
            assert torch.equal(found["again"]["gradients"][name], gradient), name


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_busiest_rank_has_less_to_do(variant: str, results: Any) -> None:
    work_before, work_after = results[variant][0]["work"]
    print(f"{variant}: token-expert pairs of each rank {work_before} -> {work_after}")
    assert sum(work_before) == sum(work_after)
    assert max(work_before) > 2 * sum(work_before) / RANKS
    assert max(work_after) < 1.15 * sum(work_after) / RANKS


@pytest.mark.distributed
def test_a_placement_stays_until_the_next_one_is_asked_for(results: Any) -> None:
    for found in results["plain"]:
        for first, later in zip(found["replicas"], found["kept"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@pytest.mark.distributed
def test_all_ranks_see_the_same_loads_and_routers_count_experts_not_slots(results: Any) -> None:
    first, *others = results["plain"]
    assert all(torch.equal(first["shares"], other["shares"]) for other in others)
    for other in others:
        for mine, theirs in zip(first["replicas"], other["replicas"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    work_before, work_after = first["work"]
    for when, work in (("without_replicas", work_before), ("with_replicas", work_after)):
        total, layers = first["balance"][when]
        assert total / layers == pytest.approx(max(work) * RANKS / sum(work), rel=0.1), when
    torch.testing.assert_close(
        first["shares"].sum(dim=1), torch.ones(len(first["shares"]), dtype=torch.float64)
    )
    assert (first["shares"][:, 0] > 0.3).all()
    assert all(found["counts_tripled"] for found in results["plain"])


PIPELINE = Layout("deep V3 MTP", ParallelConfig(data=2, expert=2, pipeline=2))
REPLICATED = replace(PIPELINE, parallel=replace(PIPELINE.parallel, expert_replicas=2))


def train_with_replicas(rank: int, port: int, directory: Path) -> None:
    with process_group(rank, PIPELINE.ranks, port):
        from r1mega.parallel import mesh

        place = mesh.init_mesh(PIPELINE.parallel, seed=1)
        for overlap in (False, True):
            outcomes = [train(layout, place, overlap) for layout in (PIPELINE, REPLICATED)]
            torch.save(outcomes, directory / f"{overlap} {rank}.pt")
        mesh.destroy_mesh()


@pytest.mark.slow
@pytest.mark.distributed
def test_training_with_replicas_under_a_pipeline_gives_the_same_weights(tmp_path: Path) -> None:
    """Three optimizer steps under DualPipeV, its forwards and backwards one after the other and mixed."""
    mp.spawn(train_with_replicas, (free_port(), tmp_path), nprocs=PIPELINE.ranks)
    for overlap in (False, True):
        for rank in range(PIPELINE.ranks):
            plain, hot = torch.load(tmp_path / f"{overlap} {rank}.pt", weights_only=False)
            torch.testing.assert_close(hot.losses, plain.losses, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hot.norms, plain.norms, rtol=1e-5, atol=1e-6)
            for what in ("gradients", "weights"):
                for name, tensor in getattr(plain, what).items():
                    scale = tensor.abs().max().item()
                    torch.testing.assert_close(
                        getattr(hot, what)[name], tensor, rtol=0, atol=1e-5 * scale + 1e-9
                    )
