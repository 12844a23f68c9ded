"""grouped_topk against hand-made cases and an independent formula in float64."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1mega_kernels import nvcc
from r1mega_kernels.grouped_topk import Replicas, cuda, grouped_topk, reference

HERE = Path(__file__).parent
CASES = {  # T, E, K, groups, kept groups
    "DeepSeek-V3": (40, 256, 8, 8, 4),
    "tiny model": (200, 8, 2, 4, 2),
    "one group": (30, 12, 5, 1, 1),
    "groups of three": (50, 21, 4, 7, 2),
    "groups of one": (50, 9, 3, 9, 5),
    "all of the kept": (20, 12, 4, 6, 2),
    "one expert": (7, 1, 1, 1, 1),
    "no token": (0, 16, 2, 4, 2),
}


def log_odds(*scores: float) -> Tensor:
    """Logits of one token that has these scores."""
    return torch.tensor([scores], dtype=torch.float64).logit().float()


def by_sorting(logits_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, kept: int) -> Tensor:
    """The chosen experts by sorting (score, lowest index first) in Python numbers."""
    chosen = []
    for row in (logits_TE.sigmoid() + bias_E).tolist():
        size = len(row) // num_groups
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        value = [sum(sorted(group)[-2:]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: (-value[g], g))[:kept]
        experts = [e for e in range(len(row)) if e // size in best]
        chosen.append(sorted(experts, key=lambda e: (-row[e], e))[:top_k])
    return torch.tensor(chosen, dtype=torch.int64).reshape(len(chosen), top_k)


def paper_weights(logits_TE: Tensor, expert_TK: Tensor, normalise: bool, scale: float) -> Tensor:
    score_TK = logits_TE.sigmoid().gather(1, expert_TK)
    return scale * (score_TK / score_TK.sum(dim=-1, keepdim=True) if normalise else score_TK)


def make_inputs(case: tuple[int, ...], spread: float = 2.0) -> tuple[Tensor, Tensor]:
    return torch.randn(*case[:2]) * spread, torch.randn(case[1]) * 0.1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("normalise", [True, False])
def test_choice_weights_and_gradient_match_float64(case, normalise):
    num_tokens, _, top_k, num_groups, kept = case
    logits_TE, bias_E = make_inputs(case)
    # float64 logits leave no doubt about near-ties; float32 ones are looked at below
    exact_TE = logits_TE.double().requires_grad_()
    routing = grouped_topk(
        exact_TE, bias_E, top_k, num_groups=num_groups, kept_groups=kept, normalise=normalise, scale=2.5
    )
    expected_TK = by_sorting(exact_TE, bias_E.double(), top_k, num_groups, kept)
    assert torch.equal(routing.expert_TK, expected_TK)
    assert torch.equal(routing.slot_TK, routing.expert_TK)
    weight_TK = torch.randn(num_tokens, top_k).double()
    (expected_gradient_TE,) = torch.autograd.grad(
        (weight_TK * paper_weights(exact_TE, expected_TK, normalise, 2.5)).sum(), exact_TE
    )
    (gradient_TE,) = torch.autograd.grad((weight_TK * routing.weight_TK).sum(), exact_TE)
    torch.testing.assert_close(
        routing.weight_TK, paper_weights(exact_TE, expected_TK, normalise, 2.5), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(gradient_TE, expected_gradient_TE, rtol=1e-10, atol=1e-14)

    logits_TE.requires_grad_()
    own = grouped_topk(
        logits_TE, bias_E, top_k, num_groups=num_groups, kept_groups=kept, normalise=normalise, scale=2.5
    )
    same_T = (own.expert_TK == expected_TK).all(dim=-1)
    assert same_T.double().mean() > 0.95 or num_tokens == 0
    assert own.weight_TK.dtype == torch.float32
    torch.testing.assert_close(
        own.weight_TK[same_T].double(), routing.weight_TK[same_T].detach(), rtol=1e-6, atol=1e-6
    )
    (own_gradient_TE,) = torch.autograd.grad((weight_TK.float() * own.weight_TK).sum(), logits_TE)
    torch.testing.assert_close(
        own_gradient_TE[same_T].double(), expected_gradient_TE[same_T], rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_agree_with_finite_differences(normalise):
    case = (5, 12, 3, 4, 2)
    logits_TE, bias_E = make_inputs(case)
    sequence_T = torch.tensor([0, 0, 2, 2, 2])

    def function(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        routing = grouped_topk(
            logits_TE, bias_E, 3, num_groups=4, kept_groups=2, normalise=normalise, scale=2.5,
            sequence_T=sequence_T, num_sequences=3,
        )  # fmt: skip
        return routing.weight_TK, routing.share_SE

    assert torch.autograd.gradcheck(function, logits_TE.double().requires_grad_())


def test_a_case_worked_by_hand():
    # biased: .5 .7 | .9 .1 | .75 .35 | .6 .4; groups: 1.2, 1.0, 1.1, 1.0: groups 0 and 2 stay, though expert 2 is the best
    logits_TE = log_odds(0.5, 0.6, 0.9, 0.1, 0.8, 0.4, 0.6, 0.4)
    bias_E = torch.tensor([0.0, 0.1, 0.0, 0.0, -0.05, -0.05, 0.0, 0.0])
    routing = grouped_topk(logits_TE, bias_E, 2, num_groups=4, kept_groups=2, scale=2.5)
    assert routing.expert_TK.tolist() == [[4, 1]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0.8 / 1.4 * 2.5, 0.6 / 1.4 * 2.5]]))
    assert routing.load_E.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    plain = grouped_topk(logits_TE, bias_E, 2, num_groups=4, kept_groups=2, normalise=False)
    torch.testing.assert_close(plain.weight_TK, torch.tensor([[0.8, 0.6]]))


@pytest.mark.parametrize("logit", [0.0, -1000.0, 1000.0])
def test_of_equal_scores_the_lowest_index_wins(logit):
    for num_experts, top_k, num_groups, kept in ((256, 8, 8, 4), (12, 3, 4, 2), (9, 4, 9, 5), (6, 6, 1, 1)):
        logits_TE = torch.full((3, num_experts), logit)
        routing = grouped_topk(
            logits_TE, torch.zeros(num_experts), top_k, num_groups=num_groups, kept_groups=kept
        )
        assert routing.expert_TK.tolist() == [list(range(top_k))] * 3
        assert routing.weight_TK.isfinite().all()


def test_ties_between_and_within_groups_go_to_the_lowest_index():
    # group sums 1.1 1.1 .9 1.1: 0 and 1 stay; experts .3 .8 | .6 .5
    logits_TE = log_odds(0.3, 0.8, 0.6, 0.5, 0.5, 0.4, 0.55, 0.55)
    logits_TE[0, 6:] = logits_TE[0, 2:4]
    routing = grouped_topk(logits_TE, torch.zeros(8), 3, num_groups=4, kept_groups=2)
    assert routing.expert_TK.tolist() == [[1, 2, 3]]
    # 0.75 three times
    logits_TE = log_odds(0.2, 0.75, 0.75, 0.1, 0.75)
    assert grouped_topk(logits_TE, torch.zeros(5), 2).expert_TK.tolist() == [[1, 2]]


def test_negative_biases_choose_but_do_not_weigh():
    logits_TE = log_odds(0.9, 0.8, 0.3, 0.2)
    bias_E = torch.tensor([-3.0, -2.0, -1.0, -1.0])  # biased -2.1 -1.2 -0.7 -0.8
    routing = grouped_topk(logits_TE, bias_E, 3)
    assert routing.expert_TK.tolist() == [[2, 3, 1]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0.3, 0.2, 0.8]]) / 1.3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_load_is_a_count_of_the_tokens_that_count(case):
    num_tokens, num_experts, top_k, num_groups, kept = case
    counted_T = torch.rand(num_tokens) < 0.6
    routing = grouped_topk(
        *make_inputs(case), top_k, num_groups=num_groups, kept_groups=kept, counted_T=counted_T
    )
    expected_E = torch.bincount(routing.expert_TK[counted_T].flatten(), minlength=num_experts)
    assert torch.equal(routing.load_E, expected_E)


def test_all_tokens_may_go_to_one_expert():
    logits_TE = torch.randn(50, 6)
    logits_TE[:, 4] = 80.0
    assert grouped_topk(logits_TE, torch.zeros(6), 1).load_E.tolist() == [0, 0, 0, 0, 50, 0]


def test_statistics_are_those_of_the_papers_balance_loss():
    case = (60, 24, 3, 4, 2)
    logits_TE, bias_E = make_inputs(case)
    sequence_T = torch.randint(0, 4, (60,)) * 2  # unordered, and sequences without tokens
    exact_TE = logits_TE.double().requires_grad_()
    routing = grouped_topk(
        exact_TE, bias_E, 3, num_groups=4, kept_groups=2, sequence_T=sequence_T, num_sequences=8
    )
    score_TE = exact_TE.sigmoid()
    one_hot_ST = torch.nn.functional.one_hot(sequence_T, 8).T.double()
    rank_TE = (score_TE[:, None, :] > score_TE[:, :, None]).sum(dim=-1)  # how many are larger
    assert torch.equal(routing.chosen_SE.double(), one_hot_ST @ (rank_TE < 3).double())
    share_SE = one_hot_ST @ (score_TE / score_TE.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(routing.share_SE, share_SE, rtol=1e-12, atol=1e-14)
    a_TK, b_SE = torch.randn(60, 3).double(), torch.randn(8, 24).double()
    loss = (a_TK * paper_weights(exact_TE, routing.expert_TK, True, 1.0)).sum() + (b_SE * share_SE).sum()
    (expected_TE,) = torch.autograd.grad(loss, exact_TE)
    (own_TE,) = torch.autograd.grad(
        (a_TK * routing.weight_TK).sum() + (b_SE * routing.share_SE).sum(), exact_TE
    )
    torch.testing.assert_close(own_TE, expected_TE, rtol=1e-9, atol=1e-13)
    again = grouped_topk(
        exact_TE, bias_E, 3, num_groups=4, kept_groups=2, sequence_T=sequence_T, num_sequences=8
    )
    (alone_TE,) = torch.autograd.grad((b_SE * again.share_SE).sum(), exact_TE)
    torch.testing.assert_close(
        alone_TE, torch.autograd.grad((b_SE * (one_hot_ST @ (
            exact_TE.sigmoid() / exact_TE.sigmoid().sum(dim=-1, keepdim=True)))).sum(), exact_TE)[0],
        rtol=1e-9, atol=1e-13,
    )  # fmt: skip


def test_replay_gives_the_same_weights_and_gradients_for_the_same_experts():
    case = CASES["DeepSeek-V3"]
    logits_TE, bias_E = make_inputs(case)
    logits_TE.requires_grad_()
    options: dict[str, Any] = {"num_groups": 8, "kept_groups": 4, "scale": 2.5}
    first = grouped_topk(logits_TE, bias_E, 8, **options)
    replayed = grouped_topk(logits_TE, bias_E + torch.randn(256), 8, replay_TK=first.expert_TK, **options)
    assert torch.equal(replayed.expert_TK, first.expert_TK)
    assert torch.equal(replayed.weight_TK, first.weight_TK)
    assert torch.equal(replayed.load_E, first.load_E)
    grad_TK = torch.randn(40, 8)
    gradients = [torch.autograd.grad((grad_TK * r.weight_TK).sum(), logits_TE)[0] for r in (first, replayed)]
    assert torch.equal(*gradients)


def test_replicas_share_an_experts_tokens_evenly_and_by_the_tokens_index():
    logits_TE, bias_E = make_inputs((1200, 8, 2))
    table_ER = torch.tensor(
        [[0, 8, 9], [1, 0, 0], [2, 10, 0], [3, 0, 0], [4, 0, 0], [5, 0, 0], [6, 0, 0], [7, 0, 0]]
    )
    count_E = torch.tensor([3, 1, 2, 1, 1, 1, 1, 1])
    replicas = Replicas(table_ER, count_E)
    routing = grouped_topk(logits_TE, bias_E, 2, replicas=replicas)
    for token, (experts, slots) in enumerate(zip(routing.expert_TK.tolist(), routing.slot_TK.tolist())):
        for expert, slot in zip(experts, slots):
            assert slot == table_ER[expert, token % int(count_E[expert])]
    assert torch.equal(routing.slot_TK, grouped_topk(logits_TE, bias_E, 2, replicas=replicas).slot_TK)
    everyone = grouped_topk(torch.full((1200, 8), 1.0), torch.zeros(8), 1, replicas=replicas)
    assert torch.bincount(everyone.slot_TK.flatten(), minlength=11).tolist() == [400] + [0] * 7 + [
        400,
        400,
        0,
    ]


def test_torch_agrees_that_these_are_proper_operators():
    logits_TE, bias_E = make_inputs((9, 12))
    sequence_T = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    replay_TK = torch.rand(9, 12).argsort(dim=-1)[:, :3].contiguous()
    table_ER, count_E = torch.arange(24).view(12, 2), torch.full((12,), 2)
    for optional in (
        (None, None, 0, None, None, None),
        (sequence_T > 0, sequence_T, 3, None, None, None),
        (None, None, 0, replay_TK, table_ER, count_E),
    ):
        arguments = (logits_TE.clone().requires_grad_(), bias_E, 3, 4, 2, True, 2.5, *optional)
        torch.library.opcheck(torch.ops.r1mega.grouped_topk.default, arguments)
    for share, sequence in ((None, None), (torch.randn(3, 12), sequence_T)):
        gradients = (torch.randn(9, 3), share, logits_TE, replay_TK, sequence, True, 2.5)
        torch.library.opcheck(torch.ops.r1mega.grouped_topk_backward.default, gradients)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits_TE": torch.zeros(4, 6, 1)}, r"expected logits \[T, E\]; got \[4, 6, 1\]"),
        ({"logits_TE": torch.zeros(4, 6).bfloat16()}, r"logits are torch.bfloat16"),
        ({"logits_TE": torch.zeros(6, 4).T}, r"logits has strides \(1, 4\)"),
        ({"logits_TE": torch.zeros(4, 513), "bias_E": torch.zeros(513)}, r"513 experts"),
        ({"logits_TE": torch.zeros(4, 0), "bias_E": torch.zeros(0)}, r"0 experts"),
        ({"bias_E": torch.zeros(5)}, r"bias is torch.float32 \[5\]; it must be torch.float32 \[6\]"),
        ({"bias_E": torch.zeros(6).double()}, r"bias is torch.float64"),
        ({"bias_E": torch.zeros(6, requires_grad=True)}, r"bias requires a gradient"),
        ({"bias_E": torch.zeros(6, device="meta")}, r"bias is on meta, logits are on cpu"),
        ({"num_groups": 4}, r"1 of 4 groups of 6 experts"),
        ({"num_groups": 2, "kept_groups": 3}, r"3 of 2 groups"),
        ({"top_k": 4, "num_groups": 2}, r"top 4 of 1 groups of 3 experts"),
        ({"top_k": 0}, r"top 0"),
        ({"scale": math.nan}, r"scale is nan"),
        ({"counted_T": torch.ones(4)}, r"counted is torch.float32 \[4\]"),
        ({"sequence_T": torch.tensor([0, 1, 2, 1]), "num_sequences": 2}, r"sequence ranges from 0 to 2; .* \[0, 2\)"),
        ({"replay_TK": torch.full((4, 2), 6)}, r"replay ranges from 6 to 6; .* \[0, 6\)"),
        ({"replay_TK": torch.zeros(4, 3).long()}, r"replay is torch.int64 \[4, 3\]; it must be torch.int64 \[4, 2\]"),
        ({"replicas": Replicas(torch.zeros(6).long(), torch.ones(6).long())}, r"replica table is torch.int64 \[6\]"),
        (
            {"replicas": Replicas(torch.zeros(6, 2).long(), torch.full((6,), 3))},
            r"replica count ranges from 3 to 3; .* \[1, 3\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    arguments = {"logits_TE": torch.zeros(4, 6), "bias_E": torch.zeros(6), "top_k": 2}
    with pytest.raises(ValueError, match=message):
        grouped_topk(**{**arguments, **change})


def run(arguments: list[str], tmp_path: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_triton_kernels_match_the_reference_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    checks = str(HERE / "interpreter_checks.py")
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", checks], tmp_path, TRITON_INTERPRET="1")


def test_the_cuda_library_compiles_for_sm90_without_spills_and_loads_on_a_cpu(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    library = tmp_path / "_C_cuda.so"
    account = nvcc.compile_library(library)
    assert account.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") >= 10
    assert account.count("bytes stack frame") == account.count(" 0 bytes stack frame")
    program = (
        "import sys, torch; from pathlib import Path; from r1mega_kernels.grouped_topk import cuda;"
        "assert cuda.load(Path(sys.argv[1]));"
        "print(torch.ops.r1mega_cuda.grouped_topk.default._schema);"
        "print(torch.ops.r1mega_cuda.grouped_topk_backward.default._schema);"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('r1mega_cuda::grouped_topk', 'CUDA'))"
    )
    schema, schema_backward, on_gpus = run(["-c", program, str(library)], tmp_path).splitlines()[-3:]
    assert schema.startswith("r1mega_cuda::grouped_topk(Tensor logits, Tensor bias, int top_k")
    assert schema_backward.endswith("-> Tensor")
    assert on_gpus == "True"


class Forward(ctypes.Structure):
    """gate.cuh's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "logits", "bias", "counted", "sequence", "replay", "table", "count",
            "weight", "expert", "slot", "load", "chosen", "share",
        )),
        ("tokens", ctypes.c_int64), ("sequences", ctypes.c_int64), ("max_replicas", ctypes.c_int64),
        ("top_k", ctypes.c_int),
        ("num_groups", ctypes.c_int), ("kept_groups", ctypes.c_int), ("scale", ctypes.c_float),
        ("normalise", ctypes.c_bool),
    ]  # fmt: skip


class Backward(ctypes.Structure):
    """gate.cuh's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "grad_weight", "grad_share", "logits", "expert", "sequence", "grad_logits",
        )),
        ("tokens", ctypes.c_int64), ("sequences", ctypes.c_int64), ("top_k", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("normalise", ctypes.c_bool),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def warp(tmp_path_factory):
    """The CUDA C++ code of a warp, compiled for the CPU."""
    library = tmp_path_factory.mktemp("warp") / "warp.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    source = HERE / "warp_on_cpu.cpp"
    subprocess.run([*command, f"-I{nvcc.CSRC}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


WARP_CASES = {  # T, E, K, groups, kept groups
    "DeepSeek-V3": (21, 256, 8, 8, 4),
    "a group a lane": (9, 32, 3, 32, 20),
    "two a lane, one group": (11, 64, 6, 1, 1),
    "groups of eight": (10, 128, 16, 16, 5),
    "512 experts in two groups": (10, 512, 32, 2, 1),
}


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def of_warps(
    library, logits_TE, bias_E, case, counted_T, sequence_T, num_sequences, replay_TK, replicas
) -> list[Tensor]:
    num_tokens, num_experts, top_k, num_groups, kept = case
    rows = num_sequences if sequence_T is not None else 0
    out = [
        torch.full((num_tokens, top_k), math.nan),
        torch.full((0 if replay_TK is not None else num_tokens, top_k), -1),
        torch.full((num_tokens if replicas else 0, top_k), -1),
        torch.zeros(num_experts).long(),
        torch.zeros(rows, num_experts).long(),
        torch.zeros(rows, num_experts).long(),
    ]
    table_ER, count_E = replicas or (None, None)
    num_replicas = 0 if table_ER is None else table_ER.shape[1]
    inputs = (logits_TE, bias_E, counted_T, sequence_T, replay_TK, table_ER, count_E)
    arguments = Forward(
        *map(pointer, (*inputs, *out)), num_tokens, rows, num_replicas, top_k, num_groups, kept, 2.5, True
    )  # fmt: skip
    library.forward(num_experts, ctypes.byref(arguments))
    out[5] = (out[5] * 2.0**-40).float()
    return out


@pytest.mark.parametrize("case", WARP_CASES.values(), ids=WARP_CASES)
@pytest.mark.parametrize("inputs", ["scores", "ties", "replay"])
def test_the_cuda_code_of_a_warp_matches_the_reference(case, inputs, warp):
    num_tokens, num_experts, top_k, num_groups, kept = case
    grid_E = torch.linspace(0.05, 0.95, num_experts).pow(1.1).logit()
    logits_TE = grid_E[torch.rand(num_tokens, num_experts).argsort(dim=-1)]
    bias_E = torch.randint(-3, 4, (num_experts,)) * 0.0371
    if inputs == "ties":
        logits_TE, bias_E = (
            torch.randint(-2, 3, (num_tokens, num_experts)).float() * 30,
            torch.zeros(num_experts),
        )
    sequence_T = torch.randint(0, 4, (num_tokens,)).sort().values
    replay_TK = torch.rand(num_tokens, num_experts).argsort(dim=-1)[:, :top_k].contiguous()
    replicas = Replicas(torch.randint(0, 99, (num_experts, 3)), torch.randint(1, 4, (num_experts,)))
    options: list[Any] = [
        torch.rand(num_tokens) < 0.7,
        sequence_T,
        5,
        replay_TK if inputs == "replay" else None,
    ]
    for counted_T, sequence, num_sequences, replay, physical in (
        (*options, replicas), (None, None, 0, options[3], None)
    ):  # fmt: skip
        own = of_warps(warp, logits_TE, bias_E, case, counted_T, sequence, num_sequences, replay, physical)
        expected = reference.forward(
            logits_TE, bias_E, top_k, num_groups, kept, True, 2.5,
            counted_T, sequence, num_sequences, replay, *(physical or (None, None)),
        )  # fmt: skip
        for a, b in zip(own, expected):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def strangers(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(replay_TK, sequence_T in [0, 5)) with what does not exist in tokens 0 to 4, and where that is."""
    replay_TK = torch.rand(num_tokens, num_experts).argsort(dim=-1)[:, :top_k].contiguous()
    sequence_T = torch.randint(0, 5, (num_tokens,)).sort().values
    replay_TK[:3, 1] = torch.tensor([num_experts, -1, 2**32 + 1])
    sequence_T[2:5] = torch.tensor([5, -1, 2**33])
    known_TK = (replay_TK >= 0) & (replay_TK < num_experts)
    return replay_TK, sequence_T, known_TK, (sequence_T >= 0) & (sequence_T < 5)


def assert_strangers_harm_nobody(forward: Callable, backward: Callable, case: tuple[int, ...]) -> None:
    """forward(logits_TE, sequence_T, replay_TK, table_ER, count_E), with five sequences; backward(grad_weight_TK,
    grad_share_SE, logits_TE, replay_TK, sequence_T). Weights are normalised; scale 2.5."""
    num_tokens, num_experts, top_k, num_groups, kept = case
    replay_TK, sequence_T, known_TK, counts_T = strangers(num_tokens, num_experts, top_k)
    logits_TE, good_T = torch.randn(num_tokens, num_experts), known_TK.all(dim=1)
    replicas = (torch.randint(0, 99, (num_experts, 3)), torch.randint(1, 4, (num_experts,)))
    tame_TK, tame_T = (
        torch.where(known_TK, replay_TK, 0),
        torch.where(counts_T, sequence_T, 5),
    )  # a sixth sequence
    own = forward(logits_TE, sequence_T, replay_TK, *replicas)
    expected = reference.forward(
        logits_TE, torch.zeros(num_experts), top_k, num_groups, kept, True, 2.5, None, tame_T, 6, tame_TK, *replicas
    )  # fmt: skip
    weight_TK, _, slot_TK, load_E, chosen_SE, share_SE = own
    torch.testing.assert_close(weight_TK[good_T], expected[0][good_T], rtol=2e-6, atol=1e-6)
    assert weight_TK[~good_T].isnan().all()
    assert torch.equal(slot_TK, torch.where(known_TK, expected[2], -1))
    assert torch.equal(load_E, replay_TK[known_TK].bincount(minlength=num_experts))
    assert torch.equal(chosen_SE, expected[4][:5])
    torch.testing.assert_close(share_SE, expected[5][:5], rtol=2e-6, atol=1e-6)

    grad_TK, grad_SE = torch.randn(num_tokens, top_k), torch.randn(5, num_experts)
    own_TE = backward(grad_TK, grad_SE, logits_TE, replay_TK, sequence_T)
    grad_of_six_SE = torch.cat([grad_SE, torch.zeros(1, num_experts)]).double()
    exact_TE = reference.backward(
        grad_TK.double(), grad_of_six_SE, logits_TE.double(), tame_TK, tame_T, True, 2.5
    )
    torch.testing.assert_close(own_TE[good_T].double(), exact_TE[good_T], rtol=1e-5, atol=2e-6)
    assert own_TE[~good_T].isnan().any(dim=1).all()


@pytest.mark.parametrize("case", WARP_CASES.values(), ids=WARP_CASES)
def test_experts_and_sequences_that_do_not_exist_harm_no_other_in_a_warp(case, warp):
    def forward(logits_TE, sequence_T, replay_TK, *replicas):
        bias_E, physical = torch.zeros(case[1]), Replicas(*replicas)
        return of_warps(warp, logits_TE, bias_E, case, None, sequence_T, 5, replay_TK, physical)

    def backward(*tensors):
        own_TE = torch.full_like(tensors[2], math.nan)
        arguments = Backward(*map(pointer, (*tensors, own_TE)), case[0], 5, case[2], 2.5, True)
        warp.backward(case[1], ctypes.byref(arguments))
        return own_TE

    assert_strangers_harm_nobody(forward, backward, case)


def test_cuda_takes_only_what_starts_on_16_bytes():
    logits_TE, rows = torch.zeros(3, 256), torch.zeros(260)
    assert cuda.takes(logits_TE, 8, 8)
    assert cuda.takes(logits_TE, 8, 8, rows[4:])
    assert not cuda.takes(logits_TE, 8, 8, rows[1:257])
    assert not cuda.takes(torch.zeros(769)[1:].view(3, 256), 8, 8)


@pytest.mark.parametrize("case", WARP_CASES.values(), ids=WARP_CASES)
@pytest.mark.parametrize("normalise", [True, False])
def test_the_cuda_gradient_of_a_warp_matches_float64(case, normalise, warp):
    num_tokens, num_experts, top_k = case[:3]
    logits_TE = torch.randn(num_tokens, num_experts) * 2
    expert_TK = torch.rand(num_tokens, num_experts).argsort(dim=-1)[:, :top_k].contiguous()
    grad_TK, grad_SE = torch.randn(num_tokens, top_k), torch.randn(3, num_experts)
    sequence_T = torch.randint(0, 3, (num_tokens,))
    for share, sequence in ((grad_SE, sequence_T), (None, None)):
        own_TE = torch.full_like(logits_TE, math.nan)
        tensors = (grad_TK, share, logits_TE, expert_TK, sequence, own_TE)
        arguments = Backward(
            *map(pointer, tensors), num_tokens, 0 if share is None else 3, top_k, 2.5, normalise
        )
        warp.backward(num_experts, ctypes.byref(arguments))
        exact_TE = reference.backward(
            grad_TK.double(), None if share is None else share.double(), logits_TE.double(), expert_TK, sequence,
            normalise, 2.5,
        )  # fmt: skip
        torch.testing.assert_close(own_TE.double(), exact_TE, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["kernel", "cuda"])
def test_on_a_gpu_results_and_gradients_match_the_reference(implementation):
    from r1mega_kernels.grouped_topk import kernel

    if implementation == "cuda" and not cuda.load():
        pytest.skip("the CUDA library was not built: nvcc was not found")
    module: Any = {"kernel": kernel, "cuda": cuda}[implementation]
    grid_E = torch.linspace(0.05, 0.95, 256).pow(1.1).logit()
    logits_TE = grid_E[torch.rand(5003, 256).argsort(dim=-1)]
    bias_E = torch.randint(-3, 4, (256,)) * 0.0371
    sequence_T = torch.randint(0, 9, (5003,)).sort().values
    replicas = Replicas(torch.randint(0, 99, (256, 3)), torch.randint(1, 4, (256,)))
    options: Any = (8, 8, 4, True, 2.5, torch.rand(5003) < 0.7, sequence_T, 10, None, *replicas)
    there = [option.cuda() if isinstance(option, Tensor) else option for option in options]
    runs = [module.forward(logits_TE.cuda(), bias_E.cuda(), *there) for _ in range(2)]
    expected = reference.forward(logits_TE, bias_E, *options)
    for first, again, exact in zip(*runs, expected):
        assert torch.equal(first, again)
        torch.testing.assert_close(first.cpu(), exact, rtol=4e-6, atol=2e-6)
    grad_TK, grad_SE = torch.randn(5003, 8), torch.randn(10, 256)
    for share, sequence in ((grad_SE, sequence_T), (None, None)):
        tensors: Any = (grad_TK, share, logits_TE, expected[1], sequence)
        own_TE = module.backward(*(t if t is None else t.cuda() for t in tensors), True, 2.5)
        exact_TE = reference.backward(
            grad_TK.double(), None if share is None else share.double(), logits_TE.double(), expected[1], sequence,
            True, 2.5,
        )  # fmt: skip
        torch.testing.assert_close(own_TE.cpu().double(), exact_TE, rtol=1e-5, atol=4e-6)
