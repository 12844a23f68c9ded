"""The Triton kernels against the reference, in Triton's interpreter, on CPU and float32.

test_moe_permute.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is
imported. The interpreter runs programs one after another and cannot show races; its fp8 is wrong, so that permute_fp8's
rounding is only checked on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

from r1mega_kernels.moe_permute import kernel, reference  # noqa: E402

CASES = [(1, 1, 1, 1), (150, 2, 5, 3), (12, 4, 7, 1030), (0, 2, 4, 3)]
"""T, K, E, D: 150 x 2 pairs are two stretches, 1030 columns two passes."""


def draw(num_tokens: int, num_per_token: int, num_experts: int, absent: bool) -> torch.Tensor:
    """Different experts of each token in ascending order, some of them -1."""
    indices_TK = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :num_per_token].sort(dim=1).values
    if absent:
        indices_TK[torch.rand(indices_TK.shape) < 0.3] = -1
    return indices_TK.contiguous()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("multiple", "absent"), [(1, False), (1, True), (16, True)])
def test_every_kernel_gives_the_reference(case, multiple, absent):
    num_tokens, num_per_token, num_experts, hidden_size = case
    indices_TK = draw(num_tokens, num_per_token, num_experts, absent)
    num_rows = num_tokens * num_per_token + num_experts * (multiple - 1)
    own = kernel.slots(indices_TK, num_experts, multiple, num_rows)
    expected = reference.slots(indices_TK, num_experts, multiple, num_rows)
    for a, b in zip(own, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    row_of_pair_TK, pair_of_row_N, _ = own

    tokens_TD = torch.randn(num_tokens, hidden_size)
    rows_ND = reference.permute(tokens_TD, row_of_pair_TK, pair_of_row_N)
    assert torch.equal(kernel.permute(tokens_TD, row_of_pair_TK, pair_of_row_N), rows_ND)
    weights_TK = torch.rand(num_tokens, num_per_token)
    outputs_ND = torch.randn_like(rows_ND)
    for weights in (None, weights_TK):
        torch.testing.assert_close(
            kernel.unpermute(outputs_ND, row_of_pair_TK, weights),
            reference.unpermute(outputs_ND, row_of_pair_TK, weights),
        )
    arguments = (torch.randn_like(tokens_TD), outputs_ND, row_of_pair_TK, pair_of_row_N, weights_TK)
    for a, b in zip(
        kernel.unpermute_backward(*arguments), reference.unpermute_backward(*arguments), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("absent", [False, True])
def test_a_map_becomes_ascending_indices(absent):
    map_TE = torch.zeros(37, 12, dtype=torch.bool)
    indices_TK = draw(37, 3, 12, absent)
    for k in range(3):
        chosen_T = indices_TK[:, k] >= 0
        map_TE[chosen_T, indices_TK[chosen_T, k]] = True
    assert torch.equal(kernel.indices(map_TE, 3), reference.indices(map_TE, 3))


def test_one_expert_may_take_every_token():
    indices_TK = torch.full((700, 1), 2)
    for a, b in zip(kernel.slots(indices_TK, 4, 8, 704), reference.slots(indices_TK, 4, 8, 704), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("multiple", [1, 16])
def test_an_expert_that_does_not_exist_is_none(multiple):
    indices_TK = draw(150, 2, 5, absent=True)
    strange_TK = indices_TK.clone()
    strange_TK[indices_TK < 0] = torch.tensor([5, 8, -2, 2**32 + 1, -(2**40)])[
        torch.arange(int((indices_TK < 0).sum())) % 5
    ]
    num_rows = 300 + 5 * (multiple - 1)
    for a, b in zip(
        kernel.slots(strange_TK, 5, multiple, num_rows), reference.slots(indices_TK, 5, multiple, num_rows)
    ):
        assert torch.equal(a, b)


SIZES = [(tunable, sizes) for tunable in kernel.candidates() for sizes in tunable.candidates]
FP8 = (kernel.PERMUTE_FP8,)
"""Wrong in the interpreter; its candidates are those of permute."""


@pytest.mark.parametrize(
    ("tunable", "sizes"),
    [x for x in SIZES if x[0] not in FP8],
    ids=lambda part: getattr(part, "name", str(part)),
)
def test_every_candidate_gives_the_reference(tunable, sizes):
    with tunable.forced(sizes) as asked:
        if tunable is kernel.INDICES:
            test_a_map_becomes_ascending_indices(True)
        elif tunable is kernel.SLOTS:
            test_one_expert_may_take_every_token()
        else:
            test_every_kernel_gives_the_reference((6, 2, 4, 4100), 1, True)
    assert len(asked) == 1
