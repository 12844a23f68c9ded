"""vLLM's EPLB with this project's policy, and weight sync under it: vLLM's own maps and weight movements, on CPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import process_group

pytest.importorskip("vllm")
LAYERS, EXPERTS, SLOTS, RANKS = 3, 16, 24, 4


def test_a_run_with_replicas_turns_vllms_balancer_on(tmp_path):
    from vllm.config.parallel import EPLBConfig

    from r1mega.config import ModelConfig, ParallelConfig, RolloutConfig, RunConfig
    from r1mega.platforms import CUDA
    from r1mega.rollout.vllm_engine import engine_options

    (tmp_path / "config.json").write_text("{}")
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path)),
        parallel=ParallelConfig(expert=8, data=8, expert_replicas=2),
        rollout=RolloutConfig(tensor_parallel=4),
    )
    options = engine_options(config, CUDA, str(tmp_path), seed=1)
    assert options["enable_expert_parallel"]
    assert options["enable_eplb"]
    assert EPLBConfig(**options["eplb_config"]).num_redundant_experts == 8
    alone = dataclasses.replace(config, rollout=RolloutConfig())
    assert "enable_eplb" not in engine_options(alone, CUDA, str(tmp_path), seed=1)


def test_the_policy_keeps_vllms_contract_and_is_never_worse():
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    from r1mega.rollout.expert_placement import HotExpertsPolicy

    def heaviest(load: torch.Tensor, expert_of_slot: torch.Tensor) -> torch.Tensor:
        count = torch.zeros_like(load).scatter_add_(1, expert_of_slot, torch.ones(LAYERS, SLOTS))
        share = (load / count).gather(1, expert_of_slot)
        return share.unflatten(1, (RANKS, -1)).sum(-1).max(dim=1).values

    for _ in range(20):
        load = torch.randn(LAYERS, EXPERTS).mul(1.5).exp()
        for groups, nodes in ((4, 2), (1, 1), (3, 2)):
            arguments = load, SLOTS, groups, nodes, RANKS
            own = DefaultEplbPolicy.rebalance_experts(*arguments)
            ours = HotExpertsPolicy.rebalance_experts(*arguments)
            assert (ours.shape, ours.dtype, ours.device) == (own.shape, own.dtype, own.device)
            assert all(set(row.tolist()) == set(range(EXPERTS)) for row in ours)
            assert (heaviest(load, ours) <= heaviest(load, own) * (1 + 1e-6)).all()
            again = HotExpertsPolicy.rebalance_experts(*arguments, ours.flip(1).contiguous())
            for row, old in zip(again.view(LAYERS, RANKS, -1), ours.view(LAYERS, RANKS, -1)):
                assert [sorted(gpu.tolist()) for gpu in row] == [sorted(gpu.tolist()) for gpu in old]
            kept = HotExpertsPolicy.rebalance_experts(*arguments, again)
            assert torch.equal(kept, again), "experts that stay changed their slots"


def test_vllm_takes_the_policy_under_the_one_name_it_knows(monkeypatch):
    from vllm.distributed.eplb import eplb_state
    from vllm.distributed.eplb.policy import EPLB_POLICIES

    from r1mega.rollout import expert_placement

    monkeypatch.setitem(EPLB_POLICIES, "default", EPLB_POLICIES["default"])
    expert_placement.install()
    assert eplb_state.EPLB_POLICIES["default"] is expert_placement.HotExpertsPolicy


def state_of(expert_of_slot: torch.Tensor) -> Any:
    """What vLLM keeps of a model with one expert-parallel rank; an expert's weights are its number."""
    from vllm.distributed.eplb.eplb_communicator import TorchDistGlooStagedEplbCommunicator
    from vllm.distributed.eplb.eplb_state import _commit_eplb_maps

    weights = [[torch.zeros(SLOTS, 5), torch.zeros(SLOTS, 2)] for _ in range(LAYERS)]
    buffer = [torch.empty_like(weight) for weight in weights[0]]
    state = SimpleNamespace(
        physical_to_logical_map=torch.zeros(LAYERS, SLOTS, dtype=torch.int64),
        logical_to_physical_map=torch.full((LAYERS, EXPERTS, SLOTS - EXPERTS + 1), -1),
        logical_replica_count=torch.zeros(LAYERS, EXPERTS, dtype=torch.int64),
        model=SimpleNamespace(expert_weights=weights),
        expert_buffer=buffer,
        communicator=TorchDistGlooStagedEplbCommunicator(cpu_group=dist.group.WORLD),
    )
    _commit_eplb_maps(state, expert_of_slot)
    return state


def test_a_sync_fills_every_replica_whatever_the_placement():
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from r1mega.rollout.expert_placement import HotExpertsPolicy, begin_loading, finish_loading

    placement = HotExpertsPolicy.rebalance_experts(torch.rand(LAYERS, EXPERTS) ** 4, SLOTS, 4, 2, RANKS)
    with process_group():
        state = state_of(placement)
        maps = state.logical_to_physical_map.clone(), state.logical_replica_count.clone()
        former = begin_loading([state])
        for layer, weights in enumerate(
            state.model.expert_weights
        ):  # the slots that vLLM's loader writes, by its names
            for _, name, slot, shard in RoutedExperts.build_expert_params_mapping(
                "gate_proj", "down_proj", "up_proj", EXPERTS, SLOTS - EXPERTS
            ):
                expert = int(name.split(".")[1])
                assert state.physical_to_logical_map[layer, slot] == expert, (
                    "maps and loader disagree meanwhile"
                )
                weights[shard == "w2"][slot] = 100 * layer + expert
        finish_loading([state], former, dist.group.WORLD)
    assert torch.equal(state.physical_to_logical_map, placement)
    assert torch.equal(state.logical_to_physical_map, maps[0])
    assert torch.equal(state.logical_replica_count, maps[1])
    for layer, weights in enumerate(state.model.expert_weights):
        for weight in weights:
            wanted = (100 * layer + placement[layer]).float()[:, None].expand_as(weight)
            assert torch.equal(weight, wanted)
