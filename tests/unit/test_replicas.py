"""Who sends which expert to whom, and which replica a token goes to."""

from __future__ import annotations

import pytest
import torch

from r1mega.parallel.replicas import copy_plans, on_slots, slots_of_tokens
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


def test_the_replicas_of_an_expert_share_its_tokens_evenly():
    load = torch.randn(1, 8).mul(2).exp()
    _, slots_LEX, replicas_LE = rebalance_experts(load, 16, 1, 1, 4)
    slot_TE = slots_of_tokens(slots_LEX[0], replicas_LE[0], 101)
    for token in range(101):
        for expert in range(8):
            assert slot_TE[token, expert] == slots_LEX[0, expert, token % replicas_LE[0, expert]]
    for expert in range(8):
        count = torch.bincount(slot_TE[:, expert], minlength=16)
        used = count[count > 0]
        assert len(used) == replicas_LE[0, expert]
        assert used.max() - used.min() <= 1


def test_weights_and_choices_move_to_the_slots_and_nothing_is_lost():
    placement = rebalance_experts(torch.rand(1, 8), 12, 1, 1, 4)
    weight_TE = torch.rand(30, 8)
    chosen_TE = torch.zeros(30, 8, dtype=torch.bool).scatter(1, torch.rand(30, 8).topk(3).indices, True)
    weight_TE = (weight_TE * chosen_TE).requires_grad_()
    slot_TE = slots_of_tokens(placement.slots_LEX[0], placement.replicas_LE[0], 30)
    weight_TP, chosen_TP = on_slots(weight_TE, chosen_TE, slot_TE, 12)
    back = placement.expert_of_slot_LP[0].expand(30, -1)
    assert torch.equal(torch.zeros(30, 8).scatter_add(1, back, weight_TP.detach()), weight_TE.detach())
    assert torch.equal(torch.zeros(30, 8).scatter_add(1, back, chosen_TP.float()), chosen_TE.float())
    (weight_TP**2).sum().backward()
    torch.testing.assert_close(weight_TE.grad, 2 * weight_TE.detach())


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
