"""linear_logprob against its definition in float64, in one process and split over the vocabulary."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega_kernels.linear_logprob import chunked, linear_logprob, linear_logprob_reference

HERE = Path(__file__).parent
SHAPES = [(1, 1, 1), (5, 7, 3), (300, 129, 33), (64, 4099, 16)]  # T, V, D


def make_inputs(num_tokens: int, num_rows: int, hidden_size: int, dtype=torch.float32):
    hidden_TD = torch.randn(num_tokens, hidden_size).to(dtype)
    weight_VD = (torch.randn(num_rows, hidden_size) * 2 / math.sqrt(hidden_size)).to(dtype)
    return hidden_TD, weight_VD, torch.randint(0, num_rows, (num_tokens,))


def results_and_gradients(op, hidden_TD: Tensor, weight_VD: Tensor, *args, loss_weights, **kwargs):
    """[logprobs, entropy, d_hidden, d_weight] in float64, for the loss sum(a logprobs) + sum(b entropy)."""
    hidden_TD = hidden_TD.detach().requires_grad_()
    weight_VD = weight_VD.detach().requires_grad_()
    logprobs_T, entropy_T = op(hidden_TD, weight_VD, *args, **kwargs)
    a_T, b_T = loss_weights
    loss = (a_T * logprobs_T).sum() if b_T is None else (b_T * entropy_T).sum()
    if a_T is not None and b_T is not None:
        loss = loss + (a_T * logprobs_T).sum()
    loss.backward()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is not None
    return [x.detach().double() for x in (logprobs_T, entropy_T, hidden_TD.grad, weight_VD.grad)]


def assert_as_accurate_as_the_reference(inputs, loss_weights, **kwargs):
    """The op's error against float64 may be a few times that of the float32 reference."""
    hidden_TD, weight_VD, targets_T = inputs
    exact = results_and_gradients(
        linear_logprob_reference,
        hidden_TD.double(),
        weight_VD.double(),
        targets_T,
        loss_weights=loss_weights,
        **kwargs,
    )
    naive = results_and_gradients(
        linear_logprob_reference,
        hidden_TD.float(),
        weight_VD.float(),
        targets_T,
        loss_weights=loss_weights,
        **kwargs,
    )
    own = results_and_gradients(linear_logprob, *inputs, loss_weights=loss_weights, **kwargs)
    rounding = torch.finfo(hidden_TD.dtype).eps
    for name, a, b, c in zip(("logprobs", "entropy", "d_hidden", "d_weight"), own, naive, exact):
        result_eps = rounding if name.startswith("d_") else torch.finfo(torch.float32).eps
        bound = 4 * (b - c).abs().max() + 8 * result_eps * (1 + c.abs().max())
        assert (a - c).abs().max() <= bound, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_results_and_gradients_match_float64(shape, temperature):
    loss_weights = (torch.randn(shape[0]), torch.randn(shape[0]))
    assert_as_accurate_as_the_reference(make_inputs(*shape), loss_weights, temperature=temperature)


@pytest.mark.parametrize("parts", ["logprobs", "entropy"])
def test_either_result_alone_may_carry_the_loss(parts):
    weights_T = torch.randn(50)
    loss_weights = (weights_T, None) if parts == "logprobs" else (None, weights_T)
    assert_as_accurate_as_the_reference(make_inputs(50, 77, 9), loss_weights, temperature=0.7)


@pytest.mark.parametrize("kept_logits", [0, 2**30])
def test_keeping_and_recomputing_the_softmax_agree_with_float64(kept_logits, monkeypatch):
    monkeypatch.setattr(chunked, "KEPT_LOGITS", kept_logits)
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 1000)
    monkeypatch.setattr(chunked, "MIN_CHUNK_TOKENS", 1)
    loss_weights = (torch.randn(303), torch.randn(303))
    assert_as_accurate_as_the_reference(make_inputs(303, 71, 12), loss_weights, temperature=0.8)


def test_bfloat16_inputs_give_float32_exact_logits():
    inputs = make_inputs(200, 500, 64, torch.bfloat16)
    logprobs_T, entropy_T = linear_logprob(*inputs)
    exact = linear_logprob_reference(inputs[0].double(), inputs[1].double(), inputs[2])
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    assert (logprobs_T - exact[0]).abs().max() < 1e-5
    assert (entropy_T - exact[1]).abs().max() < 1e-5
    assert_as_accurate_as_the_reference(inputs, (torch.randn(200), torch.randn(200)))


def test_gradients_agree_with_finite_differences():
    hidden_TD, weight_VD, targets_T = make_inputs(4, 6, 3, torch.float64)
    arguments = (hidden_TD.requires_grad_(), weight_VD.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets_T, temperature=0.7), arguments)


def test_a_second_backward_gives_the_same_gradient():
    hidden_TD, weight_VD, targets_T = make_inputs(40, 30, 8)
    hidden_TD.requires_grad_()
    logprobs_T, entropy_T = linear_logprob(hidden_TD, weight_VD, targets_T)
    loss = logprobs_T.sum() + entropy_T.sum()
    (first,) = torch.autograd.grad(loss, hidden_TD, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden_TD)
    assert torch.equal(first, again)


def test_ties_share_the_probability():
    logprobs_T, entropy_T = linear_logprob(torch.randn(3, 4), torch.zeros(5, 4), torch.tensor([0, 2, 4]))
    torch.testing.assert_close(logprobs_T, torch.full((3,), -math.log(5)))
    torch.testing.assert_close(entropy_T, torch.full((3,), math.log(5)))


def test_a_case_worked_by_hand():
    # logits ln 1, ln 2, ln 5 at temperature 1: p = 1/8, 2/8, 5/8
    weight_VD = torch.tensor([[1.0], [2.0], [5.0]]).log()
    logprobs_T, entropy_T = linear_logprob(torch.ones(3, 1), weight_VD, torch.tensor([0, 1, 2]))
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8])
    torch.testing.assert_close(logprobs_T, p.log())
    torch.testing.assert_close(entropy_T, -(p * p.log()).sum().expand(3))


def test_a_vocabulary_of_one_is_certain():
    inputs = make_inputs(6, 1, 5)
    logprobs_T, entropy_T, d_hidden_TD, d_weight_VD = results_and_gradients(
        linear_logprob, *inputs, loss_weights=(torch.randn(6), torch.randn(6))
    )
    for values in (logprobs_T, entropy_T, d_hidden_TD, d_weight_VD):
        assert not values.any()


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_shifting_all_logits_by_a_thousand_changes_nothing(shift):
    hidden_TD, weight_VD, targets_T = make_inputs(50, 40, 8)
    one_more_TD = torch.cat([hidden_TD, torch.ones(50, 1)], dim=1)
    shifted_VD = torch.cat([weight_VD, torch.full((40, 1), shift)], dim=1)
    for own, plain in zip(
        linear_logprob(one_more_TD, shifted_VD, targets_T), linear_logprob(hidden_TD, weight_VD, targets_T)
    ):
        assert (own - plain).abs().max() < 1e-3  # float32 logits near 1000 have a spacing of 6e-5


def test_logits_a_thousand_apart_stay_finite():
    weight_VD = torch.tensor([[1000.0], [0.0], [-1000.0]])
    results = results_and_gradients(
        linear_logprob,
        torch.ones(3, 1),
        weight_VD,
        torch.tensor([0, 1, 2]),
        loss_weights=(torch.ones(3), torch.ones(3)),
    )
    assert results[0].tolist() == [0.0, -1000.0, -2000.0]
    assert results[1].tolist() == [0.0, 0.0, 0.0]
    assert all(values.isfinite().all() for values in results)


def test_no_tokens_give_empty_results_and_zero_gradients():
    logprobs_T, entropy_T, d_hidden_TD, d_weight_VD = results_and_gradients(
        linear_logprob, *make_inputs(0, 7, 3), loss_weights=(torch.ones(0), torch.ones(0))
    )
    assert logprobs_T.shape == entropy_T.shape == (0,)
    assert d_hidden_TD.shape == (0, 3)
    assert d_weight_VD.shape == (7, 3)
    assert not d_weight_VD.any()


def test_rows_beyond_the_vocabulary_count_for_nothing():
    hidden_TD, weight_VD, targets_T = make_inputs(60, 50, 8)
    loss_weights = (torch.randn(60), torch.randn(60))
    padded_VD = torch.cat([weight_VD, 100 * torch.ones(14, 8)])
    plain = results_and_gradients(linear_logprob, hidden_TD, weight_VD, targets_T, loss_weights=loss_weights)
    padded = results_and_gradients(
        linear_logprob, hidden_TD, padded_VD, targets_T, loss_weights=loss_weights, vocab_size=50
    )
    assert not padded[3][50:].any()
    padded[3] = padded[3][:50]
    for a, b in zip(plain, padded):
        assert torch.equal(a, b)


def test_all_logits_never_exist_at_once():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    inputs = make_inputs(2048, 8192, 4)
    with Watch():
        results_and_gradients(linear_logprob, *inputs, loss_weights=(torch.ones(2048), torch.ones(2048)))
    assert largest <= 2048 * 8192 // 16


SPLITS = {
    "even": ([0, 40, 80], 80),
    "uneven": ([0, 5, 80], 80),
    "padded": ([0, 40, 80], 61),
    "one shard all padding": ([0, 40, 80], 40),
}


def test_splitting_the_vocabulary_changes_neither_results_nor_gradients(tmp_path):
    problems = {name: _split_problem(*split) for name, split in SPLITS.items()}
    mp.spawn(_vocabulary_parallel, (str(tmp_path / "store"), problems), nprocs=2)


def _split_problem(bounds: list[int], vocab_size: int) -> dict:
    hidden_TD, weight_VD, _ = make_inputs(33, 80, 8)
    targets_T = torch.randint(0, vocab_size, (33,))
    loss_weights = (torch.randn(33), torch.randn(33))
    exact = results_and_gradients(
        linear_logprob_reference,
        hidden_TD.double(),
        weight_VD[:vocab_size].double(),
        targets_T,
        loss_weights=loss_weights,
        temperature=0.9,
    )
    exact[3] = torch.cat([exact[3], torch.zeros(80 - vocab_size, 8).double()])
    return {
        "bounds": bounds,
        "vocab_size": vocab_size,
        "hidden_TD": hidden_TD,
        "weight_VD": weight_VD,
        "targets_T": targets_T,
        "loss_weights": loss_weights,
        "temperature": 0.9,
        "expected": exact,
    }


def _vocabulary_parallel(rank: int, store: str, problems: dict[str, dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case, problem in problems.items():
        start, end = problem["bounds"][rank : rank + 2]
        own = results_and_gradients(
            linear_logprob,
            problem["hidden_TD"],
            problem["weight_VD"][start:end].contiguous(),
            problem["targets_T"],
            loss_weights=problem["loss_weights"],
            temperature=problem["temperature"],
            group=dist.group.WORLD,
            vocab_start=start,
            vocab_size=problem["vocab_size"],
        )
        expected = [*problem["expected"][:3], problem["expected"][3][start:end]]
        for name, a, b in zip(("logprobs", "entropy", "d_hidden", "d_weight"), own, expected):
            error = float((a - b).abs().max())
            assert error < 2e-5, f"{case}, rank {rank}, {name}: off by {error}"
    dist.destroy_process_group()


def test_training_a_head_gives_plain_torchs_losses():
    """Fifteen steps of Adam on an embedding and a head: what the next token is, and an entropy bonus."""
    tokens_T, targets_T = torch.randint(0, 40, (2, 300))
    start_ED, start_VD = torch.randn(40, 12), torch.randn(53, 12) / 3
    curves = []
    for op in (linear_logprob, linear_logprob_reference):
        embedding_ED, weight_VD = (start.clone().requires_grad_() for start in (start_ED, start_VD))
        optimizer, losses = torch.optim.Adam([embedding_ED, weight_VD], lr=0.03), []
        for _ in range(15):
            logprobs_T, entropy_T = op(embedding_ED[tokens_T], weight_VD, targets_T, temperature=0.9)
            loss = -logprobs_T.mean() - 0.01 * entropy_T.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    own, plain = curves
    assert own[-1] < own[0] - 0.5
    assert own == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_TD": torch.zeros(4, 3, 1)}, r"hidden \[4, 3, 1\], weight \[5, 3\], targets \[4\]"),
        ({"hidden_TD": torch.zeros(4, 2)}, r"do not fit: hidden \[4, 2\], weight \[5, 3\]"),
        ({"targets_T": torch.zeros(3, dtype=torch.int64)}, r"do not fit: .*targets \[3\]"),
        ({"hidden_TD": torch.zeros(4, 3).bfloat16()}, r"hidden is torch.bfloat16, weight torch.float32"),
        ({"targets_T": torch.zeros(4, dtype=torch.int32)}, r"targets are torch.int32"),
        (
            {name: torch.zeros(4, 3, device="meta").double() for name in ("hidden_TD", "weight_VD")},
            r"hidden is torch.float64 on meta",
        ),
        ({"weight_VD": torch.zeros(5, 3, device="meta")}, r"hidden is on cpu, weight on meta"),
        ({"hidden_TD": torch.zeros(3, 4).T}, r"hidden has strides \(1, 4\); pass hidden.contiguous\(\)"),
        ({"targets_T": torch.tensor([0, 1, 5, 2])}, r"from 0 to 5, the vocabulary is \[0, 5\)"),
        ({"targets_T": torch.tensor([0, -1, 4, 2])}, r"from -1 to 4, the vocabulary is \[0, 5\)"),
        ({"temperature": 0.0}, r"temperature is 0.0"),
        ({"temperature": math.nan}, r"temperature is nan"),
        ({"vocab_size": 0}, r"no vocabulary: weight has 5 rows from 0, vocab_size is 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden_TD": torch.zeros(4, 3),
        "weight_VD": torch.zeros(5, 3),
        "targets_T": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**arguments, **change})


def run(arguments: list[str], tmp_path: Path, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_triton_kernels_match_float64_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    checks = str(HERE / "interpreter_checks.py")
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", checks], tmp_path, TRITON_INTERPRET="1")


def test_triton_kernels_compile_to_sm90_with_wgmma_and_without_spills(tmp_path):
    pytest.importorskip("triton")
    run(["-m", "r1mega_kernels.aot"], tmp_path, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(700, 4099, 128), (2048, 16160, 512), (33, 129280, 256)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_gpu_matches_float64(shape, temperature):
    num_tokens, num_rows, hidden_size = shape
    inputs = make_inputs(num_tokens, num_rows, hidden_size, torch.bfloat16)
    hidden_TD, weight_VD, targets_T = (x.cuda() for x in inputs)
    loss_weights = (torch.randn(shape[0], device="cuda"), torch.randn(shape[0], device="cuda"))
    rest = {"loss_weights": loss_weights, "temperature": temperature}
    exact = results_and_gradients(
        linear_logprob_reference, hidden_TD.double(), weight_VD.double(), targets_T, **rest
    )
    own = results_and_gradients(linear_logprob, hidden_TD, weight_VD, targets_T, **rest)
    assert (own[0] - exact[0]).abs().max() <= 2e-5
    assert (own[1] - exact[1]).abs().max() <= 2e-5
    for a, b in zip(own[2:], exact[2:]):
        assert (a - b).abs().max() <= 100 * torch.finfo(torch.bfloat16).eps * (1 + b.abs().max())
