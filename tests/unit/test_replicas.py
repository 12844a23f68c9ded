"""Who sends which expert to whom."""

from __future__ import annotations

import pytest
import torch

from r1mega.parallel.replicas import copy_plans
from r1mega_kernels.eplb import rebalance_experts


def test_the_copies_of_a_placement_made_by_hand():
    # 4 experts on 2 ranks (0, 1 | 2, 3), 3 slots each; expert 1 has two slots at home and one in rank 1
    plans = copy_plans(torch.tensor([1, 1, 2, 3, 0, 1]), num_experts=4, num_ranks=2)
    assert [plan.slots for plan in plans] == [[1, 1, 2], [3, 0, 1]]
    assert [plan.homes for plan in plans] == [range(2), range(2, 4)]
    assert [plan.send for plan in plans] == [{1: [0, 1]}, {0: [2]}]
    assert [plan.receive for plan in plans] == [{1: [2]}, {0: [0, 1]}]


def test_an_expert_is_sent_once_to_each_rank_that_needs_it():
    for _ in range(20):
        load = torch.randn(1, 16).mul(2).exp()
        placement = rebalance_experts(load, 24, 4, 2, 4, "across_nodes")
        plans = copy_plans(placement.expert_of_slot_LP[0], 16, 4)
        for rank, plan in enumerate(plans):
            here = set(plan.slots) - set(plan.homes)
            received = [expert for experts in plan.receive.values() for expert in experts]
            assert sorted(received) == sorted(here)
            assert rank not in plan.receive
            for home, experts in plan.receive.items():
                assert plans[home].send[rank] == experts
                assert set(experts) <= set(plans[home].homes)
        sent = sum(len(experts) for plan in plans for experts in plan.send.values())
        assert sent == sum(len(experts) for plan in plans for experts in plan.receive.values())


@pytest.mark.parametrize(
    "slots, experts, ranks, message",
    [
        ([0, 1, 2], 3, 2, "3 experts do not divide over 2 ranks"),
        ([0, 1, 2], 2, 2, "3 slots do not divide over 2 ranks"),
        ([0, 0, 1, 2], 4, 2, r"experts \[3\] have no slot"),
        ([0, 1, 2, 7], 2, 2, r"slots name experts \[2, 7\] of 2"),
    ],
)
def test_a_placement_that_does_not_fit_is_named(slots, experts, ranks, message):
    with pytest.raises(ValueError, match=message):
        copy_plans(torch.tensor(slots), experts, ranks)
