"""moe_permute against loops over single pairs and dense products in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega_kernels.fp8_block import quantize_rows
from r1mega_kernels.moe_permute import (
    Permutation,
    compiled,
    indices_of,
    permute,
    permute_fp8,
    permute_values,
    reference,
    sort_by_expert,
    unpermute,
)

HERE = Path(__file__).parent
OPS = torch.ops.r1mega
CASES = {
    "several": (17, 3, 8),
    "one expert a token": (9, 1, 4),
    "one token": (1, 2, 4),
    "no tokens": (0, 2, 4),
    "one expert": (6, 1, 1),
    "most experts empty": (3, 2, 64),
}
"""T, K, E."""


def draw(num_tokens: int, num_per_token: int, num_experts: int, absent: float = 0.0) -> torch.Tensor:
    indices_TK = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :num_per_token].contiguous()
    indices_TK[torch.rand(indices_TK.shape) < absent] = -1
    return indices_TK


def check_rows(indices_TK: torch.Tensor, num_experts: int, permutation: Permutation) -> None:
    """What a permutation promises, by a loop over pairs."""
    multiple = permutation.multiple
    pairs = list(enumerate(indices_TK.flatten().tolist()))
    expected: list[int] = []
    for expert in range(num_experts):
        mine = [pair for pair, of in pairs if of == expert]
        assert int(permutation.tokens_per_expert_E[expert]) == len(mine)
        expected += mine + [-1] * (-len(mine) % multiple)
        assert int(permutation.rows_per_expert_E[expert]) == len(mine) + -len(mine) % multiple
    rows = permutation.pair_of_row_N.tolist()
    assert rows == expected + [-1] * (len(rows) - len(expected))
    places = {pair: row for row, pair in enumerate(rows) if pair >= 0}
    assert permutation.row_of_pair_TK.flatten().tolist() == [places.get(pair, -1) for pair, _ in pairs]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_sorted_by_expert_and_then_by_token(case, multiple, dtype):
    num_tokens, num_per_token, num_experts = CASES[case]
    indices_TK = draw(num_tokens, num_per_token, num_experts).to(dtype)
    check_rows(indices_TK, num_experts, sort_by_expert(indices_TK, num_experts, multiple=multiple))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_hold_their_promise_for_any_indices(data):
    """Also the same expert twice, no expert at all, and more rows than needed."""
    num_experts = data.draw(st.integers(1, 6))
    num_per_token = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=num_per_token, max_size=num_per_token)
    indices_TK = torch.tensor(data.draw(st.lists(row, max_size=12)), dtype=torch.int64).view(
        -1, num_per_token
    )
    multiple = data.draw(st.integers(1, 5))
    permutation = sort_by_expert(indices_TK, num_experts, multiple=multiple)
    check_rows(indices_TK, num_experts, permutation)
    more = len(permutation.pair_of_row_N) + data.draw(st.integers(0, 9))
    permutation = sort_by_expert(indices_TK, num_experts, multiple=multiple, num_rows=more)
    check_rows(indices_TK, num_experts, permutation)
    tokens_TD = torch.randn(len(indices_TK), 3)
    rows_ND = permute(tokens_TD, permutation)
    for pair_row, pair in zip(rows_ND, permutation.pair_of_row_N.tolist(), strict=True):
        expected = tokens_TD[pair // num_per_token] if pair >= 0 else torch.zeros(3)
        assert torch.equal(pair_row, expected)


def test_all_tokens_may_go_to_one_expert():
    indices_TK = torch.full((30, 1), 2)
    permutation = sort_by_expert(indices_TK, 4, multiple=16)
    check_rows(indices_TK, 4, permutation)
    tokens_TD = torch.randn(30, 5)
    assert torch.equal(permute(tokens_TD, permutation)[:30], tokens_TD)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("multiple", [1, 8])
def test_what_runs_on_cpu_is_the_reference_bit_for_bit(case, multiple):
    num_tokens, num_per_token, num_experts = CASES[case]
    indices_TK = draw(num_tokens, num_per_token, num_experts, absent=0.2)
    num_rows = num_tokens * num_per_token + num_experts * (multiple - 1)
    places = compiled.slots(indices_TK, num_experts, multiple, num_rows)
    for a, b in zip(places, reference.slots(indices_TK, num_experts, multiple, num_rows), strict=True):
        assert torch.equal(a, b)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tokens_TD, rows_ND = torch.randn(num_tokens, 37).to(dtype), torch.randn(num_rows, 37).to(dtype)
        assert torch.equal(
            compiled.permute(tokens_TD, *places[:2]), reference.permute(tokens_TD, *places[:2])
        )
        for weights_TK in (None, torch.rand(num_tokens, num_per_token)):
            own, expected = (of.unpermute(rows_ND, places[0], weights_TK) for of in (compiled, reference))
            assert torch.equal(own, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("multiple", [1, 8])
def test_there_and_back_is_each_token_times_its_experts(case, multiple):
    num_tokens, num_per_token, num_experts = CASES[case]
    indices_TK = draw(num_tokens, num_per_token, num_experts)
    permutation = sort_by_expert(indices_TK, num_experts, multiple=multiple)
    tokens_TD = torch.randint(-9, 10, (num_tokens, 7)).float()
    rows_ND = permute(tokens_TD, permutation)
    assert not rows_ND[permutation.pair_of_row_N < 0].any()
    assert torch.equal(unpermute(rows_ND, permutation), num_per_token * tokens_TD)
    weights_TK = torch.full((num_tokens, num_per_token), 1 / num_per_token)
    torch.testing.assert_close(unpermute(rows_ND, permutation, weights_TK), tokens_TD)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("multiple", [1, 8])
def test_results_and_gradients_match_dense_products_in_float64(case, absent, multiple):
    """permute is a product with a 0-1 matrix [N, T], unpermute with a weighted one [T, N]."""
    num_tokens, num_per_token, num_experts = CASES[case]
    indices_TK = draw(num_tokens, num_per_token, num_experts, absent)
    num_rows = num_tokens * num_per_token + num_experts * (multiple - 1)
    permutation = sort_by_expert(indices_TK, num_experts, multiple=multiple, num_rows=num_rows)
    pair_of_row_N = permutation.pair_of_row_N.long()
    real_N = pair_of_row_N >= 0
    choose_NP = torch.zeros(num_rows, indices_TK.numel(), dtype=torch.float64)
    choose_NP[real_N, pair_of_row_N[real_N]] = 1

    tokens_TD, outputs_ND = torch.randn(num_tokens, 5), torch.randn(num_rows, 5)
    weights_TK = torch.rand(num_tokens, num_per_token)
    own = [x.clone().requires_grad_() for x in (tokens_TD, outputs_ND, weights_TK)]
    exact = [x.double().requires_grad_() for x in (tokens_TD, outputs_ND, weights_TK)]
    own_results = (
        permute(own[0], permutation),
        unpermute(own[1], permutation, own[2]),
        unpermute(own[1], permutation),
        permute_values(own[2], permutation),
    )
    pairs_PD = exact[0].repeat_interleave(num_per_token, 0)
    back_PD = choose_NP.T @ exact[1]
    exact_results = (
        choose_NP @ pairs_PD,
        (back_PD * exact[2].reshape(-1, 1)).view(num_tokens, num_per_token, 5).sum(1),
        back_PD.view(num_tokens, num_per_token, 5).sum(1),
        choose_NP @ exact[2].flatten(),
    )
    seeds = [torch.randn(x.shape) for x in own_results]
    gradients = []
    for inputs, results in ((own, own_results), (exact, exact_results)):
        gradients.append(
            torch.autograd.grad(results, inputs, [s.to(x.dtype) for s, x in zip(seeds, results)])
        )
    for a, b in zip((*own_results, *gradients[0]), (*exact_results, *gradients[1]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    permutation = sort_by_expert(draw(5, 2, 3, absent=0.2), 3, num_rows=12)
    inputs = [
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 3), (12, 3), (5, 2))
    ]
    assert torch.autograd.gradcheck(lambda t: permute(t, permutation), inputs[0])
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, permutation, w), inputs[1:])
    assert torch.autograd.gradcheck(lambda w: permute_values(w, permutation), inputs[2])


def test_storages_stay_resizable():
    """Megatron frees what it sends between ranks by resizing it to nothing."""
    permutation = sort_by_expert(draw(5, 2, 3), 3)
    tokens_TD, values_TK = torch.randn(5, 3), torch.rand(5, 2)
    rows_ND, values_N = permute(tokens_TD, permutation), permute_values(values_TK, permutation)
    back_TD = unpermute(rows_ND, permutation, values_TK)
    for tensor in (tokens_TD, values_TK, rows_ND, values_N, back_TD):
        tensor.untyped_storage().resize_(0)


def test_sums_of_bfloat16_rows_are_rounded_once():
    indices_TK = draw(50, 8, 16)
    permutation = sort_by_expert(indices_TK, 16)
    rows_ND = torch.randn(400, 33).bfloat16()
    exact_TD = unpermute(rows_ND.double(), permutation)
    assert torch.equal(unpermute(rows_ND, permutation), exact_TD.float().bfloat16())


def test_fp8_rows_are_the_quantised_permuted_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        permutation = sort_by_expert(draw(20, 2, 5), 5, multiple=16)
        tokens_TD = (torch.randn(20, 300) * torch.randn(20, 1).exp()).to(dtype)
        rows_ND, scale_NQ = permute_fp8(tokens_TD, permutation)
        expected_ND, expected_NQ = quantize_rows(permute(tokens_TD, permutation))
        assert torch.equal(rows_ND.view(torch.uint8), expected_ND.view(torch.uint8))
        assert torch.equal(scale_NQ, expected_NQ)
        assert not rows_ND.float()[permutation.pair_of_row_N < 0].any()


def test_away_from_the_cpu_gathering_values_asks_nothing_of_the_data():
    """On a GPU an answer would wait for the device; a meta tensor has none."""
    places = (
        torch.empty(6, 2, dtype=torch.int32, device="meta"),
        torch.empty(12, dtype=torch.int32, device="meta"),
    )
    permutation = Permutation(*places, torch.empty(4, dtype=torch.int64, device="meta"), 1)
    assert reference.gather(torch.empty(12, device="meta"), permutation.row_of_pair_TK).shape == (6, 2)
    assert permute_values(torch.empty(6, 2, device="meta"), permutation).shape == (12,)


def test_a_map_becomes_ascending_indices():
    map_TE = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    assert indices_of(map_TE, 2).tolist() == [[1, 3], [-1, -1], [0, -1], [2, 3]]
    assert indices_of(map_TE[[0, 3]], 2).tolist() == [[1, 3], [2, 3]]
    assert indices_of(map_TE[:0], 2).shape == (0, 2)
    with pytest.raises(ValueError, match="token 0 has 2 experts, more than 1"):
        indices_of(map_TE, 1)


def test_operators_are_registered_as_torch_wants_them():
    indices_TK = draw(6, 2, 4, absent=0.2)
    row_of_pair_TK, pair_of_row_N, _ = OPS.moe_slots(indices_TK, 4, 2, 16)
    places = (row_of_pair_TK, pair_of_row_N)
    rows_ND, weights_TK = torch.randn(16, 3, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    for op, arguments in (
        (OPS.moe_indices, (torch.eye(4).bool(), 2)),
        (OPS.moe_slots, (indices_TK, 4, 2, 16)),
        (OPS.moe_permute, (torch.randn(6, 3, requires_grad=True), *places)),
        (OPS.moe_permute_values, (weights_TK, *places)),
        (OPS.moe_unpermute_values, (torch.rand(16, requires_grad=True), *places)),
        (OPS.moe_permute_fp8, (torch.randn(6, 130), *places)),
        (OPS.moe_unpermute, (rows_ND, *places, weights_TK)),
        (OPS.moe_unpermute, (rows_ND, *places, None)),
        (OPS.moe_unpermute_backward, (torch.randn(6, 3), rows_ND.detach(), *places, weights_TK.detach())),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: indices_of(torch.ones(2, 3), 1), r"the map is torch.float32 \[2, 3\]"),
        (lambda p: indices_of(torch.ones(2, 3).bool(), 0), "num_per_token is 0"),
        (lambda p: sort_by_expert(torch.ones(2, 3), 4), r"indices are torch.float32 \[2, 3\]"),
        (lambda p: sort_by_expert(torch.zeros(3, 2).long().T, 4), r"strides \(1, 2\)"),
        (lambda p: sort_by_expert(torch.tensor([[0, 4]]), 4), r"from 0 to 4; they must be in \[-1, 4\)"),
        (lambda p: sort_by_expert(torch.tensor([[-2, 3]]), 4), "from -2 to 3"),
        (lambda p: sort_by_expert(torch.tensor([[0, 2**40]]), 4, multiple=2), f"from 0 to {2**40}"),
        (lambda p: sort_by_expert(torch.zeros(2, 2).long(), 4, multiple=0), "multiple 0"),
        (lambda p: sort_by_expert(torch.zeros(2, 2).long(), 4, num_rows=3), "need 4 rows, num_rows is 3"),
        (lambda p: permute(torch.ones(3, 2), p), r"tokens are \[3, 2\]; the permutation has 2 tokens"),
        (lambda p: permute(torch.ones(2, 2).long(), p), "tokens are torch.int64"),
        (lambda p: permute(torch.ones(3, 2).T, p), r"tokens: strides \(1, 2\)"),
        (lambda p: permute(torch.ones(2, 2, device="meta"), p), "tokens are on meta, the permutation on cpu"),
        (
            lambda p: permute_values(torch.ones(2, 3), p),
            r"values are \[2, 3\]; the permutation's pairs are \[2, 2\]",
        ),
        (
            lambda p: permute_values(torch.ones(2, 2, device="meta"), p),
            "values are on meta, the permutation on cpu",
        ),
        (lambda p: permute(torch.ones(2, 2, device="meta").double(), p), "tokens are torch.float64 on meta"),
        (
            lambda p: unpermute(torch.ones(4, 2), p, torch.ones(2, 2, device="meta").double()),
            "weights are torch.float64 on",
        ),
        (lambda p: permute_fp8(torch.ones(2, 2).double(), p), "tokens are torch.float64"),
        (lambda p: permute_fp8(torch.ones(2, 2).requires_grad_(), p), "fp8 rows have no gradient"),
        (lambda p: unpermute(torch.ones(3, 2), p), r"rows are \[3, 2\]; the permutation has 4 rows"),
        (lambda p: unpermute(torch.ones(4, 2), p, torch.ones(2, 3)), r"weights are \[2, 3\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(sort_by_expert(torch.tensor([[0, 1], [2, 1]]), 3))


def test_triton_kernels_match_the_reference_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreter_checks.py")],
        cwd=HERE.parents[1],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "TRITON_CACHE_DIR": str(tmp_path),
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; fp8 rounding is wrong in the interpreter"
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1000, 8, 256, 7168), (333, 3, 20, 1030)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(shape, dtype):
    num_tokens, num_per_token, num_experts, hidden_size = shape
    indices_TK = draw(num_tokens, num_per_token, num_experts)
    tokens_TD = torch.randn(num_tokens, hidden_size).to(dtype)
    weights_TK = torch.rand(num_tokens, num_per_token)
    found = []
    for device in ("cpu", "cuda"):
        permutation = sort_by_expert(indices_TK.to(device), num_experts, multiple=16)
        tokens = tokens_TD.to(device).requires_grad_()
        weights = weights_TK.to(device).requires_grad_()
        rows_ND = permute(tokens, permutation)
        back_TD = unpermute(rows_ND, permutation, weights)
        loss = back_TD.float().square().sum()
        values_ND, scale_NQ = permute_fp8(tokens.detach(), permutation)
        exact = (permutation.row_of_pair_TK, permutation.pair_of_row_N, rows_ND, scale_NQ, values_ND.float())
        found.append(
            [x.detach().cpu() for x in (*exact, back_TD, *torch.autograd.grad(loss, (tokens, weights)))]
        )
    for a, b in zip(found[0][:5], found[1][:5], strict=True):
        assert torch.equal(a, b)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(found[0][5:], found[1][5:], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))
