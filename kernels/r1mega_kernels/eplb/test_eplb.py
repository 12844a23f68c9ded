"""The placement solvers against the published algorithm in plain Python, and against each other."""

from __future__ import annotations

import random

import pytest
import torch

from r1mega_kernels.eplb import SOLVERS, gpu_loads, imbalance, rebalance_experts, reference, slots_of_experts

IMPROVED = [solver for solver in SOLVERS if solver != "published"]


def random_setting() -> tuple[int, int, int, int, int]:
    """(experts, slots, groups, nodes, gpus) that divide."""
    nodes = random.choice([1, 2, 3, 4])
    groups, gpus = random.choice([1, 2, 3, 4, 6, 8]), nodes * random.choice([1, 2, 4])
    experts = groups * random.choice([1, 2, 4, 8])
    return experts, gpus * (-(-experts // gpus) + random.choice([0, 1, 4])), groups, nodes, gpus


def random_loads(layers: int, experts: int) -> torch.Tensor:
    draw = random.choice(["fractions", "counts", "few values", "zeros", "skewed"])
    if draw == "fractions":
        return torch.rand(layers, experts)
    if draw == "counts":
        return torch.randint(0, 100_000, (layers, experts))
    if draw == "few values":
        return torch.randint(0, 3, (layers, experts))
    return torch.zeros(layers, experts) if draw == "zeros" else (3 * torch.randn(layers, experts)).exp()


def test_the_published_algorithm_bit_for_bit():
    for _ in range(60):
        experts, slots, groups, nodes, gpus = random_setting()
        setting = slots, groups, nodes, gpus
        load = random_loads(3, experts)
        placement = rebalance_experts(load, *setting)
        expert_of_slot, replica_of_slot, replicas = reference.rebalance_experts(load, *setting)
        assert torch.equal(placement.expert_of_slot_LP, expert_of_slot), (setting, load)
        assert torch.equal(placement.replicas_LE, replicas)
        assert torch.equal(placement.slots_LEX, slots_of_experts(expert_of_slot, replica_of_slot, replicas))


def test_the_example_of_the_published_readme():
    load = torch.tensor(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    placement = rebalance_experts(load, 16, num_groups=4, num_nodes=2, num_gpus=8)
    assert placement.expert_of_slot_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@pytest.mark.parametrize("solver", IMPROVED)
def test_better_solvers_are_valid_and_never_worse(solver):
    for _ in range(200):
        experts, slots, groups, nodes, gpus = random_setting()
        load = random_loads(3, experts)
        setting = slots, groups, nodes, gpus
        published = rebalance_experts(load, *setting)
        placement = rebalance_experts(load, *setting, solver=solver)
        check_placement(placement, experts, slots)
        if groups % nodes == 0:
            check_nodes(placement, experts, groups, nodes, everywhere=solver == "within_nodes")
        heaviest = gpu_loads(load, placement, gpus).max(dim=1).values
        assert (heaviest <= gpu_loads(load, published, gpus).max(dim=1).values * (1 + 1e-12)).all(), setting
        assert (
            imbalance(load, placement, gpus) >= reference.lower_bound(load, slots, gpus) * (1 - 1e-9)
        ).all()


def check_placement(placement, experts: int, slots: int) -> None:
    """Every expert has a slot, and the three parts of the placement say the same."""
    for expert_of_slot, slots_EX, replicas in zip(*placement, strict=True):
        assert torch.equal(torch.bincount(expert_of_slot, minlength=experts), replicas)
        assert (replicas >= 1).all()
        assert torch.equal((slots_EX >= 0).sum(dim=1), replicas)
        for expert, row in enumerate(slots_EX):
            assert (expert_of_slot[row[row >= 0]] == expert).all()


def check_nodes(placement, experts: int, groups: int, nodes: int, *, everywhere: bool) -> None:
    """All replicas of a group's experts, or at least one of each, lie in one node; nodes have equally many groups."""
    for expert_of_slot in placement.expert_of_slot_LP:
        of_node = [set(part.tolist()) for part in expert_of_slot.chunk(nodes)]
        size = experts // groups
        for group in range(groups):
            members = set(range(group * size, (group + 1) * size))
            homes = [node for node in of_node if members <= node]
            assert homes
            if everywhere:
                assert sum(bool(members & node) for node in of_node) == 1


def test_swaps_reach_a_perfect_balance_that_the_greedy_misses():
    load = torch.tensor([[6.0, 6.0, 4.0, 4.0, 4.0, 0.0]])
    loads = [
        gpu_loads(load, rebalance_experts(load, 6, 1, 1, 2, solver), 2)[0].tolist() for solver in SOLVERS[:2]
    ]
    assert loads == [[14.0, 10.0], [12.0, 12.0]]


def test_replicas_in_other_nodes_relieve_a_hot_group():
    load = torch.ones(1, 64)
    load[0, :8] = 10.0
    within, across = (
        imbalance(load, rebalance_experts(load, 96, 8, 4, 16, solver), 16).item() for solver in IMPROVED
    )
    assert across < 0.7 * within


def test_one_expert_with_all_the_load_is_spread_over_all_gpus():
    load = torch.zeros(1, 64)
    load[0, 7] = 1.0
    placement = rebalance_experts(load, 96, 8, 3, 8, "across_nodes")
    assert imbalance(load, placement, 8).item() < 1.25


def test_the_result_does_not_depend_on_the_memory_layout_or_dtype():
    load = torch.randint(0, 1000, (3, 32))
    first = rebalance_experts(load, 40, 4, 2, 8, "across_nodes")
    again = rebalance_experts(load.T.contiguous().T.double(), 40, 4, 2, 8, "across_nodes")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "load, setting, message",
    [
        (torch.ones(8), (8, 1, 1, 2), r"loads of shape \(8,\)"),
        (torch.ones(1, 8), (7, 1, 1, 1), "7 slots hold no 8 experts"),
        (torch.ones(1, 8), (9, 1, 1, 2), "9 slots do not divide into 2 GPUs"),
        (torch.ones(1, 8), (12, 3, 3, 3), "8 experts do not divide into 3 groups"),
        (torch.ones(1, 8), (12, 4, 4, 6), "6 GPUs do not divide into 4 nodes"),
        (torch.ones(1, 8), (12, 0, 1, 6), "num_groups is 0"),
        (torch.ones(1, 8), (12, 1, 1, 0), "num_gpus is 0"),
        (torch.tensor([[1.0, -1.0]]), (2, 1, 1, 1), "layer 0, expert 1: load -1.0"),
        (torch.tensor([[float("nan"), 1.0]]), (2, 1, 1, 1), "layer 0, expert 0: load nan"),
        (torch.tensor([[1.0, float("inf")]]), (2, 1, 1, 1), "layer 0, expert 1: load inf"),
    ],
)
def test_bad_input_is_named(load, setting, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(load, *setting)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="solver 'best' is unknown: take one of published"):
        rebalance_experts(torch.ones(1, 8), 8, 1, 1, 1, "best")
