"""grpo_loss against its definition in float64, in one process and split over the vocabulary."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from r1mega_kernels.grpo_loss import Objective, Tokens, grpo_loss, grpo_loss_reference, one_pass
from r1mega_kernels.grpo_loss.logit_rows import logit_gradient_rows, softmax_rows
from r1mega_kernels.grpo_loss.one_pass import plan_of
from r1mega_kernels.linear_logprob import linear_logprob_reference

HERE = Path(__file__).parent
SHAPES = [(1, 1, 1), (5, 7, 3), (300, 129, 33), (64, 4099, 16)]  # T, V, D
OBJECTIVES = {
    "clip": Objective(0.2, 0.3),
    "clip and KL": Objective(0.2, 0.2, kl_coef=0.1),
    "epsilon 10": Objective(10.0, 10.0, kl_coef=0.001),
    "importance": Objective(0.2, 0.2, kl_coef=0.05, importance_cap=1.2),
    "entropy": Objective(0.2, 0.2, kl_coef=0.05, entropy_coef=0.3),
}
Problem = tuple[Tensor, Tensor, Tensor, Tokens]
"""(hidden, weight, targets, tokens)"""
NAMES = ("loss", "logprobs", "entropy", "d_hidden", "d_weight")


def make_problem(
    num_tokens: int,
    num_rows: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
) -> Problem:
    """A third of the tokens does not count, a third of the others has advantage 0."""
    hidden_TD = torch.randn(num_tokens, hidden_size).to(dtype)
    weight_VD = (torch.randn(num_rows, hidden_size) * 2 / math.sqrt(hidden_size)).to(dtype)
    targets_T = torch.randint(0, num_rows, (num_tokens,))
    logprobs_T, _ = linear_logprob_reference(hidden_TD, weight_VD, targets_T, temperature=temperature)
    near = [logprobs_T + scale * torch.randn(num_tokens) for scale in (0.2, 0.3, 0.3)]
    advantages_T = torch.randn(num_tokens) * (torch.rand(num_tokens) > 1 / 3)
    tokens = Tokens(torch.rand(num_tokens) > 1 / 3, torch.rand(num_tokens), advantages_T, *near)
    return hidden_TD, weight_VD, targets_T, tokens


def results_and_gradients(op, hidden_TD: Tensor, weight_VD: Tensor, *args, **kwargs) -> list[Tensor]:
    """NAMES in float64; d_weight from main_grad where there is one."""
    hidden_TD = hidden_TD.detach().clone().requires_grad_()
    weight_VD = weight_VD.detach().clone().requires_grad_()
    loss, logprobs_T, entropy_T = op(hidden_TD, weight_VD, *args, **kwargs)
    loss.backward()
    d_weight_VD = kwargs.get("main_grad_VD", weight_VD.grad)
    found = (loss, logprobs_T, entropy_T, hidden_TD.grad, d_weight_VD)
    return [torch.as_tensor(x).detach().double() for x in found]


def in_float64(problem: Problem) -> Problem:
    hidden_TD, weight_VD, targets_T, tokens = problem
    return hidden_TD.double(), weight_VD.double(), targets_T, tokens


def assert_close(own: list[Tensor], exact: list[Tensor], rounding: float) -> None:
    for name, a, b in zip(NAMES, own, exact, strict=True):
        eps = rounding if name.startswith("d_") else torch.finfo(torch.float32).eps
        error = float((a - b).abs().max())
        assert error <= 100 * eps * (1 + float(b.abs().max())), f"{name}: off by {error}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_match_float64(shape: tuple[int, int, int], temperature: float, name: str) -> None:
    problem = make_problem(*shape, torch.float32, temperature)
    exact = results_and_gradients(
        grpo_loss_reference, *in_float64(problem), OBJECTIVES[name], temperature=temperature
    )
    own = results_and_gradients(grpo_loss, *problem, OBJECTIVES[name], temperature=temperature)
    assert_close(own, exact, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("window", [1, 3])
def test_chunks_and_windows_change_nothing(chunk, window, monkeypatch):
    monkeypatch.setattr(one_pass, "plan_of", lambda *_: one_pass.Plan(chunk, chunk * window))
    problem = make_problem(150, 60, 12)
    exact = results_and_gradients(grpo_loss_reference, *in_float64(problem), OBJECTIVES["entropy"])
    own = results_and_gradients(grpo_loss, *problem, OBJECTIVES["entropy"])
    assert_close(own, exact, torch.finfo(torch.float32).eps)


def test_bfloat16_inputs_give_float32_exact_log_probs():
    problem = make_problem(200, 500, 64, torch.bfloat16)
    exact = results_and_gradients(grpo_loss_reference, *in_float64(problem), OBJECTIVES["clip and KL"])
    own = results_and_gradients(grpo_loss, *problem, OBJECTIVES["clip and KL"])
    assert (own[1] - exact[1]).abs().max() < 2e-5
    assert_close(own, exact, torch.finfo(torch.bfloat16).eps)


def test_slopes_are_the_objectives_derivatives():
    logprobs_T = -3 * torch.rand(4000, dtype=torch.float64)
    for scale in (0.3, 15.0):
        near = [logprobs_T + scale * torch.randn(4000, dtype=torch.float64) for _ in range(3)]
        tokens = Tokens(torch.ones(4000).bool(), torch.rand(4000).double(), torch.randn(4000).double(), *near)
        for objective in OBJECTIVES.values():
            step = 1e-6
            ones_T = torch.ones_like(logprobs_T)
            fixed = replace(objective, importance_cap=0.0)  # its weight depends on old, which is given here
            _, slope_T, entropy_slope_T = fixed.loss_and_slopes(logprobs_T, ones_T, tokens)
            above_T, below_T = (
                fixed.loss_and_slopes(logprobs_T + d, ones_T, tokens)[0] for d in (step, -step)
            )
            error_T = ((above_T - below_T) / (2 * step) - slope_T).abs() / (1 + above_T.abs() + slope_T.abs())
            assert (error_T > 1e-4).sum() <= 2  # a kink between the two points
            if entropy_slope_T is not None:
                torch.testing.assert_close(entropy_slope_T, -objective.entropy_coef * tokens.weights_T)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the bounds
        (1.5, 2.0, -2.4, 0.0),  # A > 0 beyond 1 + 0.2
        (0.5, 2.0, -1.0, -1.0),  # A > 0 below: the ratio may rise again
        (0.5, -2.0, 1.6, 0.0),  # A < 0 below 1 - 0.2
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, slope):
    zero_T = torch.zeros(1, dtype=torch.float64)
    tokens = Tokens(torch.ones(1).bool(), zero_T + 1, zero_T + advantage, zero_T - math.log(ratio))
    loss_T, slope_T, _ = Objective(0.2, 0.2).loss_and_slopes(zero_T, zero_T, tokens)
    assert loss_T.item() == pytest.approx(loss)
    assert slope_T.item() == pytest.approx(slope)


def test_an_on_policy_update_is_reinforce():
    hidden_TD, weight_VD, targets_T, tokens = make_problem(80, 40, 8)
    tokens = replace(tokens, old_logprobs_T=None, reference_logprobs_T=None, rollout_logprobs_T=None)
    own = results_and_gradients(grpo_loss, hidden_TD, weight_VD, targets_T, tokens, Objective())
    exact_TD = hidden_TD.double().requires_grad_()
    logprobs_T, _ = linear_logprob_reference(exact_TD, weight_VD.double(), targets_T)
    (-logprobs_T * tokens.advantages_T * tokens.weights_T * tokens.mask_T).sum().backward()
    torch.testing.assert_close(own[3], exact_TD.grad, rtol=1e-4, atol=1e-6)


def test_rows_without_a_gradient_are_skipped_exactly(monkeypatch):
    """Masked, clipped and zero-advantage rows reach no gradient product, whatever their hidden states hold."""
    hidden_TD, weight_VD, targets_T, tokens = make_problem(400, 50, 8)
    hidden_TD[~tokens.mask_T] = math.nan
    products = []
    multiply = one_pass._add_product

    def counted(total, a, b):
        products.append(a.shape[1])
        multiply(total, a, b)

    monkeypatch.setattr(one_pass, "_add_product", counted)
    own = results_and_gradients(grpo_loss, hidden_TD, weight_VD, targets_T, tokens, OBJECTIVES["clip"])
    clean_TD = torch.where(tokens.mask_T[:, None], hidden_TD, 0.0)
    exact = results_and_gradients(
        grpo_loss_reference, clean_TD.double(), weight_VD.double(), targets_T, tokens, OBJECTIVES["clip"]
    )
    assert_close(own, exact, torch.finfo(torch.float32).eps)
    alive_T = exact[3].abs().sum(dim=1) > 0
    assert sum(products) == alive_T.sum() < tokens.mask_T.sum()
    assert not own[3][~alive_T].any()


@pytest.mark.parametrize("gap", [80.0, -80.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_probs_80_nats_apart_stay_finite(gap, advantage):
    hidden_TD, weight_VD, targets_T, tokens = make_problem(20, 30, 8)
    tokens = Tokens(
        tokens.mask_T,
        tokens.weights_T,
        torch.full((20,), advantage),
        *(torch.full((20,), far) for far in (gap, gap, -gap)),
    )
    objective = Objective(0.2, 0.2, kl_coef=0.1, importance_cap=2.0)
    problem = (hidden_TD, weight_VD, targets_T, tokens)
    own = results_and_gradients(grpo_loss, *problem, objective)
    assert all(values.isfinite().all() for values in own)
    exact = results_and_gradients(grpo_loss_reference, *in_float64(problem), objective)
    for a, b in zip(own, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_shifting_all_logits_by_a_thousand_changes_nothing(shift):
    hidden_TD, weight_VD, targets_T, tokens = make_problem(50, 40, 8)
    objective = Objective(10.0, 10.0, kl_coef=0.1, entropy_coef=0.1)  # no clip nearby
    one_more_TD = torch.cat([hidden_TD, torch.ones(50, 1)], dim=1)
    shifted_VD = torch.cat([weight_VD, torch.full((40, 1), shift)], dim=1)
    plain = results_and_gradients(grpo_loss, hidden_TD, weight_VD, targets_T, tokens, objective)
    own = results_and_gradients(grpo_loss, one_more_TD, shifted_VD, targets_T, tokens, objective)
    for a, b in zip(own[:3], plain[:3], strict=True):
        assert (a - b).abs().max() < 1e-2 * (
            1 + b.abs().max()
        )  # float32 logits near 1000 have a spacing of 6e-5
    assert (own[3][:, :-1] - plain[3]).abs().max() < 1e-3 * (1 + plain[3].abs().max())


def test_logits_a_thousand_apart_stay_finite():
    weight_VD = torch.tensor([[1000.0], [0.0], [-1000.0]])
    tokens = Tokens(torch.ones(3).bool(), torch.ones(3), torch.ones(3))
    own = results_and_gradients(
        grpo_loss, torch.ones(3, 1), weight_VD, torch.tensor([0, 1, 2]), tokens, Objective(entropy_coef=0.1)
    )
    assert own[1].tolist() == [0.0, -1000.0, -2000.0]
    assert all(values.isfinite().all() for values in own)


def test_a_nan_advantage_reaches_the_gradient():
    hidden_TD, weight_VD, targets_T, tokens = make_problem(30, 20, 4)
    tokens.advantages_T[tokens.mask_T.nonzero()[0]] = math.nan
    own = results_and_gradients(grpo_loss, hidden_TD, weight_VD, targets_T, tokens, OBJECTIVES["clip"])
    assert own[0].isnan()
    assert own[4].isnan().any()


@pytest.mark.parametrize("num_tokens", [0, 9])
def test_nothing_to_train_gives_zeros(num_tokens):
    hidden_TD, weight_VD, targets_T, tokens = make_problem(num_tokens, 7, 3)
    tokens = replace(tokens, mask_T=torch.zeros(num_tokens).bool())
    own = results_and_gradients(grpo_loss, hidden_TD, weight_VD, targets_T, tokens, OBJECTIVES["clip"])
    assert own[3].shape == (num_tokens, 3)
    assert own[4].shape == (7, 3)
    assert not any(values.any() for values in own)


def test_main_grad_is_added_to_and_autograd_gets_none():
    problem = make_problem(70, 30, 8, torch.bfloat16)
    plain = results_and_gradients(grpo_loss, *problem, OBJECTIVES["clip and KL"])
    hidden_TD, weight_VD = (tensor.clone().requires_grad_() for tensor in problem[:2])
    main_grad_VD = torch.ones(30, 8)
    loss, _, _ = grpo_loss(
        hidden_TD, weight_VD, *problem[2:], OBJECTIVES["clip and KL"], main_grad_VD=main_grad_VD
    )
    loss.backward()
    assert weight_VD.grad is None
    assert hidden_TD.grad is not None
    assert torch.equal(hidden_TD.grad.double(), plain[3])
    torch.testing.assert_close((main_grad_VD - 1).bfloat16().double(), plain[4], rtol=2e-2, atol=1e-4)


def test_without_gradients_main_grad_stays_as_it_is():
    problem = make_problem(20, 10, 4)
    problem[1].requires_grad_()
    main_grad_VD = torch.zeros(10, 4)
    with torch.no_grad():
        grpo_loss(*problem, OBJECTIVES["clip"], main_grad_VD=main_grad_VD)
    assert not main_grad_VD.any()


def test_a_scaled_loss_is_refused_with_main_grad_and_scales_without():
    problem = make_problem(40, 10, 4)
    hidden_TD, weight_VD = (tensor.requires_grad_() for tensor in problem[:2])
    loss, _, _ = grpo_loss(*problem, OBJECTIVES["clip"], main_grad_VD=torch.zeros(10, 4))
    with pytest.raises(ValueError, match=r"incoming gradient is 2\.0"):
        (2 * loss).backward()
    gradients = []
    for scale in (1, 2):
        loss, _, _ = grpo_loss(*problem, OBJECTIVES["clip"])
        gradients.append(torch.autograd.grad(scale * loss, (hidden_TD, weight_VD)))
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(2 * once, twice)


def test_a_second_backward_gives_the_same_gradient():
    problem = make_problem(40, 30, 8)
    problem[0].requires_grad_()
    loss, _, _ = grpo_loss(*problem, OBJECTIVES["clip"])
    (first,) = torch.autograd.grad(loss, problem[0], retain_graph=True)
    (again,) = torch.autograd.grad(loss, problem[0])
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("num_rows", "hidden_size"), [(129280, 7168), (16160, 7168), (151936, 1536), (10**6, 8192)]
)
@pytest.mark.parametrize("num_tokens", [1, 500, 32768, 10**6])
def test_a_gpus_workspace_stays_below_its_bound(num_rows, hidden_size, num_tokens):
    for element_size in (2, 4):
        plan = plan_of(num_tokens, num_rows, hidden_size, element_size, "cuda")
        assert plan.bytes(num_rows, hidden_size, element_size) <= 1.1 * 2**30
        assert 1 <= plan.chunk <= plan.window <= max(num_tokens, plan.chunk)


def test_the_plan_of_deepseek_v3s_head_is_worth_its_products():
    plan = plan_of(32768, 129280, 7168, 2, "cuda")
    assert plan.chunk % 128 == plan.window % 128 == 0
    assert plan.chunk >= 384
    assert plan.window >= 2048  # d_weight, 3.7 GB, is read and written once a window


# ---------------------------------------------------------------- the two operators


def make_rows(dtype=torch.float32):
    logits_RV = torch.randn(9, 21, dtype=dtype) * 3
    targets_R = torch.tensor([0, 20, 5, -3, 21, 7, 8, 9, 10])
    rows_K = torch.tensor([1, 3, 4, 8])
    coefficients_4K = torch.randn(4, 4, dtype=dtype)
    return logits_RV, targets_R, rows_K, coefficients_4K


@pytest.mark.parametrize("with_entropy", [True, False])
def test_operators_pass_torchs_own_check(with_entropy):
    logits_RV, targets_R, rows_K, coefficients_4K = make_rows()
    torch.library.opcheck(softmax_rows, (logits_RV, targets_R, 0.7))
    arguments = (logits_RV, rows_K, targets_R[rows_K], coefficients_4K, 0.7, with_entropy, torch.empty(4, 21))
    torch.library.opcheck(logit_gradient_rows, arguments)


def test_softmax_rows_match_their_formulas():
    logits_RV, targets_R, _, _ = make_rows(torch.float64)
    max_R, sum_R, moment_R, target_R = softmax_rows(logits_RV, targets_R, 0.7)
    z_RV = logits_RV * 0.7
    torch.testing.assert_close(max_R, z_RV.max(dim=1).values)
    torch.testing.assert_close(max_R + sum_R.log(), z_RV.logsumexp(dim=1))
    torch.testing.assert_close(moment_R, ((z_RV - max_R[:, None]).exp() * (z_RV - max_R[:, None])).sum(dim=1))
    inside_R = (targets_R >= 0) & (targets_R < 21)
    torch.testing.assert_close(target_R[inside_R], z_RV[inside_R, targets_R[inside_R]])
    assert not target_R[~inside_R].any()


def test_a_shard_without_columns_has_no_partials():
    partials_4R = softmax_rows(torch.empty(3, 0), torch.tensor([0, 1, 2]), 1.0)
    assert partials_4R[0].tolist() == [-math.inf] * 3
    assert not partials_4R[1:].any()


# ---------------------------------------------------------------- vocabulary-parallel

SPLITS = {
    "even": ([0, 40, 80], 80),
    "uneven": ([0, 5, 80], 80),
    "padded": ([0, 40, 80], 61),
    "one shard all padding": ([0, 40, 80], 40),
}


def test_splitting_the_vocabulary_changes_neither_results_nor_gradients(tmp_path):
    problems = {}
    for name, (bounds, vocab_size) in SPLITS.items():
        hidden_TD, weight_VD, targets_T, tokens = make_problem(33, vocab_size, 8, temperature=0.9)
        exact = results_and_gradients(
            grpo_loss_reference,
            *in_float64((hidden_TD, weight_VD, targets_T, tokens)),
            OBJECTIVES["entropy"],
            temperature=0.9,
        )
        padding_VD = torch.full((80 - vocab_size, 8), 100.0)
        exact[4] = torch.cat([exact[4], torch.zeros(80 - vocab_size, 8).double()])
        whole_VD = torch.cat([weight_VD, padding_VD])
        problems[name] = (bounds, vocab_size, hidden_TD, whole_VD, targets_T, tokens, exact)
    mp.spawn(_vocabulary_parallel, (str(tmp_path / "store"), problems), nprocs=2)


def _vocabulary_parallel(rank: int, store: str, problems: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for chunk, (case, problem) in itertools.product(((4, 400), (256, 2**19)), problems.items()):
        one_pass.CPU_CHUNK_ROWS, one_pass.CPU_CHUNK_LOGITS = chunk  # the first: several chunks of tokens
        bounds, vocab_size, hidden_TD, weight_VD, targets_T, tokens, exact = problem
        start, end = bounds[rank : rank + 2]
        own = results_and_gradients(
            grpo_loss,
            hidden_TD,
            weight_VD[start:end].contiguous(),
            targets_T,
            tokens,
            OBJECTIVES["entropy"],
            temperature=0.9,
            group=dist.group.WORLD,
            vocab_start=start,
            vocab_size=vocab_size,
            main_grad_VD=torch.zeros(end - start, 8),
        )
        for name, a, b in zip(NAMES, own, [*exact[:4], exact[4][start:end]], strict=True):
            error = float((a - b).abs().max())
            assert error < 1e-4, f"{case}, {chunk}, rank {rank}, {name}: off by {error}"
    dist.destroy_process_group()


# ---------------------------------------------------------------- bad input and Triton


def tokens_of(**dtypes: torch.dtype) -> Tokens:
    """Four tokens, some of their fields of another dtype."""
    floats = {"weights_T": torch.float32, "advantages_T": torch.float32} | dtypes
    return Tokens(
        torch.ones(4).bool(), **{name: torch.ones(4, dtype=dtype) for name, dtype in floats.items()}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_TD": torch.zeros(4, 2)}, r"do not fit: hidden \[4, 2\], weight \[5, 3\]"),
        ({"targets_T": torch.tensor([0, 1, 5, 2])}, r"from 0 to 5, the vocabulary is \[0, 5\)"),
        ({"temperature": 0.0}, r"temperature is 0.0"),
        ({"tokens": Tokens(torch.ones(3).bool(), torch.ones(4), torch.ones(4))}, r"mask_T is \[3\] on cpu"),
        ({"tokens": Tokens(torch.ones(4), torch.ones(4), torch.ones(4))}, r"mask_T is torch.float32"),
        (
            {"tokens": tokens_of(old_logprobs_T=torch.int64)},
            r"old_logprobs_T is torch.int64; .* torch.float32",
        ),
        ({"tokens": tokens_of(old_logprobs_T=torch.bfloat16)}, r"old_logprobs_T is torch.bfloat16"),
        ({"tokens": tokens_of(advantages_T=torch.bool)}, r"advantages_T is torch.bool"),
        (
            {"tokens": tokens_of(weights_T=torch.float64), "objective": Objective(entropy_coef=0.1)},
            r"weights_T is torch.float64; with hidden torch.float32 it must be torch.float32",
        ),
        (
            {name: torch.zeros(5, 3, device="meta").double() for name in ("hidden_TD", "weight_VD")}
            | {"targets_T": torch.zeros(5, device="meta").long()},
            r"hidden is torch.float64 on meta",
        ),
        ({"objective": Objective(importance_cap=2.0)}, r"importance_cap is 2.0: it needs"),
        ({"objective": Objective(clip_low=-0.1)}, r"clip_low is -0.1"),
        ({"objective": Objective(kl_coef=math.nan)}, r"kl_coef is nan"),
        ({"main_grad_VD": torch.zeros(5, 3).bfloat16()}, r"main_grad is \[5, 3\] torch.bfloat16"),
        ({"main_grad_VD": torch.zeros(3, 5).T}, r"strides \(1, 5\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden_TD": torch.zeros(4, 3),
        "weight_VD": torch.zeros(5, 3),
        "targets_T": torch.zeros(4, dtype=torch.int64),
        "tokens": Tokens(torch.ones(4).bool(), torch.ones(4), torch.ones(4)),
        "objective": Objective(),
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**arguments, **change})


def test_a_kernel_whose_loads_are_scalar_fails_the_ahead_of_time_check():
    pytest.importorskip("triton")
    from r1mega_kernels.aot import compile_for_sm90
    from r1mega_kernels.grpo_loss.kernel import ahead_of_time

    softmax = ahead_of_time()[0]
    assert compile_for_sm90(softmax).num_wide_loads > 0
    with pytest.raises(AssertionError, match="no load of 16 bytes"):
        compile_for_sm90(replace(softmax, divisible_by_16=()))


def test_triton_kernels_match_float64_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "OPENBLAS_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    checks = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreter_checks.py"),
    ]
    result = subprocess.run(checks, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(700, 4099, 128), (2048, 16160, 512), (33, 129280, 256)])
@pytest.mark.parametrize("name", ["clip and KL", "entropy"])
def test_a_gpu_matches_float64(shape: tuple[int, int, int], name: str) -> None:
    hidden_TD, weight_VD, targets_T, tokens = make_problem(*shape, torch.bfloat16)
    tokens = Tokens(**{field: value.cuda() for field, value in vars(tokens).items()})
    problem = (hidden_TD.cuda(), weight_VD.cuda(), targets_T.cuda(), tokens)
    exact = results_and_gradients(grpo_loss_reference, *in_float64(problem), OBJECTIVES[name])
    main_grad_VD = torch.zeros(shape[1], shape[2], device="cuda")
    own = results_and_gradients(grpo_loss, *problem, OBJECTIVES[name], main_grad_VD=main_grad_VD)
    assert (own[1] - exact[1]).abs().max() < 2e-5
    assert_close(own, exact, torch.finfo(torch.bfloat16).eps)
