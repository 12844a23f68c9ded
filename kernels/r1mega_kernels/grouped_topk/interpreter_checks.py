"""The Triton kernels against the reference, in Triton's interpreter, on CPU.

test_grouped_topk.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is
imported. The interpreter runs programs one after another and cannot show races.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

from r1mega_kernels.grouped_topk import kernel, reference  # noqa: E402
from r1mega_kernels.grouped_topk.test_grouped_topk import assert_strangers_harm_nobody  # noqa: E402

CASES = {  # T, E, K, groups, kept groups
    "DeepSeek-V3": (5, 256, 8, 8, 4),
    "tiny model": (70, 8, 2, 4, 2),
    "one group": (9, 12, 5, 1, 1),
    "groups of three": (40, 21, 4, 7, 2),
    "groups of one": (33, 9, 3, 9, 5),
    "one expert": (3, 1, 1, 1, 1),
}
NONE = {"counted_T": None, "sequence_T": None, "replay_TK": None, "table_ER": None, "count_E": None}
RESULTS = ("weights", "experts", "slots", "load", "chosen", "shares")


def both(logits_TE: Tensor, bias_E: Tensor, case: tuple[int, ...], **optional: Any) -> list[list[Tensor]]:
    """The kernel's results and the reference's."""
    arguments: dict[str, Any] = {**NONE, "num_sequences": 0, "normalise": True, "scale": 2.5, **optional}
    sizes = dict(zip(("top_k", "num_groups", "kept_groups"), case[2:]))
    return [list(m.forward(logits_TE, bias_E, **sizes, **arguments)) for m in (kernel, reference)]


def assert_alike(own: list, expected: list) -> None:
    for name, a, b in zip(RESULTS, own, expected):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def well_apart(case: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scores so far apart that rounding decides nothing: tokens whose scores are permutations of a grid."""
    num_tokens, num_experts = case[:2]
    grid_E = torch.linspace(0.05, 0.95, num_experts).pow(1.1)
    order_TE = torch.rand(num_tokens, num_experts).argsort(dim=-1)
    return grid_E[order_TE].logit(), torch.randint(-3, 4, (num_experts,)) * 0.0371


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("normalise", [True, False])
def test_results_match_the_reference(case, normalise):
    assert_alike(*both(*well_apart(case), case, normalise=normalise))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_padding_statistics_and_replicas_match_the_reference(case):
    num_tokens, num_experts = case[:2]
    sequence_T = torch.randint(0, 5, (num_tokens,)).sort().values
    if num_tokens > 20:
        sequence_T[:3] = torch.tensor([4, 0, 4])
    count_E = torch.randint(1, 4, (num_experts,))
    assert_alike(
        *both(
            *well_apart(case),
            case,
            counted_T=torch.rand(num_tokens) < 0.7,
            sequence_T=sequence_T,
            num_sequences=6,
            table_ER=torch.randint(0, 99, (num_experts, 3)),
            count_E=count_E,
        )
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_given_experts_take_the_place_of_the_choice(case):
    num_tokens, num_experts, top_k = case[:3]
    replay_TK = torch.rand(num_tokens, num_experts).argsort(dim=-1)[:, :top_k].contiguous()
    assert_alike(
        *both(torch.randn(num_tokens, num_experts), torch.randn(num_experts), case, replay_TK=replay_TK)
    )


@pytest.mark.parametrize("case", [CASES["DeepSeek-V3"], CASES["groups of three"]])
def test_experts_and_sequences_that_do_not_exist_harm_no_other(case):
    def forward(logits_TE, sequence_T, replay_TK, table_ER, count_E):
        optional = {
            "sequence_T": sequence_T,
            "replay_TK": replay_TK,
            "table_ER": table_ER,
            "count_E": count_E,
        }
        arguments: dict[str, Any] = {**NONE, **optional, "num_sequences": 5, "normalise": True, "scale": 2.5}
        return kernel.forward(logits_TE, torch.zeros(case[1]), *case[2:], **arguments)

    def backward(*tensors: Tensor) -> Tensor:
        grad_weight_TK, grad_share_SE, logits_TE, expert_TK, sequence_T = tensors
        return kernel.backward(grad_weight_TK, grad_share_SE, logits_TE, expert_TK, sequence_T, True, 2.5)

    assert_strangers_harm_nobody(forward, backward, case)


@pytest.mark.parametrize("logit", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_of_equal_scores_the_lowest_index_wins(case, logit):
    own, expected = both(torch.full(case[:2], logit), torch.zeros(case[1]), case)
    assert own[1].tolist() == [list(range(case[2]))] * case[0]
    assert_alike(own, expected)


def test_ties_of_coarse_scores_are_broken_as_in_the_reference():
    case = (60, 24, 4, 6, 3)
    logits_TE = (
        torch.randint(-2, 3, (60, 24)).float() * 30
    )  # scores 0, 0.5, 1 and next to them, in any arithmetic
    assert_alike(*both(logits_TE, -torch.randint(0, 2, (24,)).float(), case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
def test_gradients_match_the_reference_in_float64(case, normalise, statistics):
    num_tokens, num_experts, top_k = case[:3]
    logits_TE = torch.randn(num_tokens, num_experts) * 2
    expert_TK = torch.rand(num_tokens, num_experts).argsort(dim=-1)[:, :top_k].contiguous()
    grad_TK, grad_SE = torch.randn(num_tokens, top_k), torch.randn(3, num_experts)
    sequence_T = torch.randint(0, 3, (num_tokens,))
    shares = (grad_SE, sequence_T) if statistics else (None, None)
    own_TE = kernel.backward(grad_TK, shares[0], logits_TE, expert_TK, shares[1], normalise, 2.5)
    exact_TE = reference.backward(
        grad_TK.double(), grad_SE.double() if statistics else None, logits_TE.double(), expert_TK, shares[1],
        normalise, 2.5,
    )  # fmt: skip
    torch.testing.assert_close(own_TE.double(), exact_TE, rtol=1e-5, atol=2e-6)


SIZES = [(tunable, sizes) for tunable in kernel.candidates() for sizes in tunable.candidates]


@pytest.mark.parametrize(("tunable", "sizes"), SIZES, ids=lambda part: getattr(part, "name", str(part)))
def test_every_candidate_gives_the_reference(tunable, sizes):
    with tunable.forced(sizes) as asked:
        if tunable is kernel.FORWARD:
            test_padding_statistics_and_replicas_match_the_reference(CASES["one group"])
        else:
            shares = tunable is kernel.BACKWARD_OF_SHARES
            test_gradients_match_the_reference_in_float64(CASES["one group"], True, shares)
    assert asked == {"E16"}


def test_no_tokens_give_empty_results():
    case = (0, 16, 2, 4, 2)
    own, expected = both(
        torch.zeros(0, 16), torch.zeros(16), case, sequence_T=torch.zeros(0).long(), num_sequences=2
    )
    assert_alike(own, expected)
    empty_TK = torch.zeros(0, 2)
    assert kernel.backward(empty_TK, None, torch.zeros(0, 16), empty_TK.long(), None, True, 1.0).shape == (
        0,
        16,
    )
