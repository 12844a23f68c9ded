"""grouped_topk: DeepSeek-V3's gate, from the experts' logits to the chosen experts and their weights, in one pass.

- reference.py: the definition in plain torch, and what runs on CPU
- kernel.py: the Triton kernels; cuda.py: the same in CUDA C++ (csrc/grouped_topk/grouped_topk.cu)

V3 eq. 12-16 with groups of experts (section 2.1.2): scores are sigmoids; a correction bias is added to choose, not to weigh;
a group counts with the sum of its two largest biased scores. Departure: of equal scores the expert of lowest index wins.

Dims: T tokens, E experts, K chosen of each token, S sequences, R the most replicas of an expert.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1mega_kernels.grouped_topk import reference

__all__ = ["Replicas", "Routing", "grouped_topk"]

MAX_EXPERTS = 512


class Replicas(NamedTuple):
    """The physical experts that hold each logical one."""

    table_ER: Tensor
    """int64: physical experts; of row e the first count_E[e] count."""
    count_E: Tensor
    """int64, at least 1."""


class Routing(NamedTuple):
    weight_TK: Tensor
    """What each chosen expert's output is multiplied by; differentiable in the logits."""
    expert_TK: Tensor
    """int64, best biased score first (or as given)."""
    slot_TK: Tensor
    """int64: the physical experts; without replicas the logical ones."""
    load_E: Tensor
    """int64: how many counted tokens chose each expert."""
    chosen_SE: Tensor
    """int64: of how many tokens of sequence s expert e is among the K largest *unbiased* scores of all experts, which is
    f_i K T / E in V3 eq. 18. [0, E] without sequences."""
    share_SE: Tensor
    """Sum over the tokens of sequence s of e's score divided by the token's sum of scores: P_i T in V3 eq. 19-20.
    Differentiable in the logits. [0, E] without sequences."""


def grouped_topk(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    kept_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
    counted_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
    num_sequences: int = 0,
    replay_TK: Tensor | None = None,
    replicas: Replicas | None = None,
) -> Routing:
    """Route each token to `top_k` experts of its `kept_groups` best groups of num_groups equal ones.

    logits_TE [T, E], contiguous float32 (on CPU float64 too), E at most 512; bias_E [E] float32, finite, without gradient.
    normalise: divide the weights by their sum; scale: multiply them.
    counted_T: bool [T], the tokens that count in load_E; None: all.
    sequence_T: int64 [T] in [0, num_sequences): asks for the balance loss's statistics chosen_SE and share_SE.
    replay_TK: int64 [T, K], experts chosen before: takes the place of the selection.
    replicas: token t goes to replica t mod count of its expert.

    Results are deterministic: sums over tokens are of integers wherever their order is open.
    Raises ValueError for what cannot be. Indices out of range are found on CPU only (a GPU would have to wait); there a token
    with an expert in replay_TK that does not exist gets NaN for weights (NaN for this expert's alone where they are not
    normalised), this expert is counted nowhere and its slot is -1; a token with a sequence that does not exist is in none.
    """
    _check_settings(logits_TE, top_k, num_groups, kept_groups, scale)
    _check_tensors(logits_TE, bias_E, top_k, counted_T, sequence_T, num_sequences, replay_TK, replicas)
    table_ER, count_E = replicas or (None, None)
    arguments = (logits_TE, bias_E, top_k, num_groups, kept_groups, normalise, scale)
    weight_TK, expert_TK, slot_TK, load_E, chosen_SE, share_SE = torch.ops.r1mega.grouped_topk(
        *arguments, counted_T, sequence_T, num_sequences, replay_TK, table_ER, count_E
    )
    expert_TK = expert_TK if replay_TK is None else replay_TK
    return Routing(weight_TK, expert_TK, slot_TK if replicas else expert_TK, load_E, chosen_SE, share_SE)


@torch.library.custom_op("r1mega::grouped_topk", mutates_args=())
def _forward(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    num_groups: int,
    kept_groups: int,
    normalise: bool,
    scale: float,
    counted_T: Tensor | None,
    sequence_T: Tensor | None,
    num_sequences: int,
    replay_TK: Tensor | None,
    table_ER: Tensor | None,
    count_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routing's tensors; expert_TK is empty where it was given, slot_TK where there are no replicas."""
    return _implementation(logits_TE, num_groups, top_k, bias_E).forward(
        logits_TE,
        bias_E,
        top_k,
        num_groups,
        kept_groups,
        normalise,
        scale,
        counted_T,
        sequence_T,
        num_sequences,
        replay_TK,
        table_ER,
        count_E,
    )


@_forward.register_fake
def _(
    logits_TE, bias_E, top_k, num_groups, kept_groups, normalise, scale,
    counted_T, sequence_T, num_sequences, replay_TK, table_ER, count_E,
):  # fmt: skip
    num_tokens, num_experts = logits_TE.shape
    rows = num_sequences if sequence_T is not None else 0

    def indices(*shape: int) -> Tensor:
        return logits_TE.new_empty(shape, dtype=torch.int64)

    return (
        logits_TE.new_empty(num_tokens, top_k),
        indices(num_tokens, top_k) if replay_TK is None else indices(0, top_k),
        indices(num_tokens, top_k) if table_ER is not None else indices(0, top_k),
        indices(num_experts),
        indices(rows, num_experts),
        logits_TE.new_empty(rows, num_experts),
    )


@torch.library.custom_op("r1mega::grouped_topk_backward", mutates_args=())
def _backward(
    grad_weight_TK: Tensor,
    grad_share_SE: Tensor | None,
    logits_TE: Tensor,
    expert_TK: Tensor,
    sequence_T: Tensor | None,
    normalise: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits. grad_share_SE and sequence_T: both or neither."""
    return _implementation(logits_TE, 1, expert_TK.shape[1], grad_share_SE).backward(
        grad_weight_TK, grad_share_SE, logits_TE, expert_TK, sequence_T, normalise, scale
    )


@_backward.register_fake
def _(grad_weight_TK, grad_share_SE, logits_TE, expert_TK, sequence_T, normalise, scale):
    return torch.empty_like(logits_TE)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits_TE, _, _, _, _, normalise, scale, _, sequence_T, _, replay_TK, _, _ = inputs
    expert_TK = output[1] if replay_TK is None else replay_TK
    ctx.save_for_backward(logits_TE, expert_TK, sequence_T)
    ctx.set_materialize_grads(False)
    ctx.settings = (normalise, scale)


def _gradient(ctx: Any, grad_weight_TK: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    logits_TE, expert_TK, sequence_T = ctx.saved_tensors
    grad_share_SE = others[-1]
    if grad_weight_TK is None and grad_share_SE is None:
        return (None,) * 13
    if grad_weight_TK is None:
        grad_weight_TK = logits_TE.new_zeros(expert_TK.shape)
    if grad_share_SE is None or sequence_T is None:
        grad_share_SE = sequence_T = None
    grad_logits_TE = torch.ops.r1mega.grouped_topk_backward(
        grad_weight_TK.contiguous(),
        None if grad_share_SE is None else grad_share_SE.contiguous(),
        logits_TE,
        expert_TK,
        sequence_T,
        *ctx.settings,
    )
    return grad_logits_TE, *(None,) * 12


_forward.register_autograd(_gradient, setup_context=_keep)


def _implementation(logits_TE: Tensor, num_groups: int, top_k: int, read: Tensor | None) -> ModuleType:
    """read: what is read beside the logits in rows of E."""
    if logits_TE.device.type == "cpu":
        return reference
    from r1mega_kernels.grouped_topk import cuda

    if cuda.is_faster_on(logits_TE.device, logits_TE.shape[1]) and cuda.takes(
        logits_TE, num_groups, top_k, read
    ):
        return cuda
    from r1mega_kernels.grouped_topk import kernel  # Triton is absent where there is no GPU

    return kernel


def _check_settings(logits_TE: Tensor, top_k: int, num_groups: int, kept_groups: int, scale: float) -> None:
    if logits_TE.dim() != 2:
        raise ValueError(f"expected logits [T, E]; got {list(logits_TE.shape)}")
    num_experts = logits_TE.shape[1]
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts; there must be 1 to {MAX_EXPERTS}")
    if not 1 <= kept_groups <= num_groups or num_experts % num_groups:
        raise ValueError(
            f"{kept_groups} of {num_groups} groups of {num_experts} experts: groups must be of equal size, and one kept"
        )
    if not 1 <= top_k <= kept_groups * (num_experts // num_groups):
        raise ValueError(
            f"top {top_k} of {kept_groups} groups of {num_experts // num_groups} experts: not that many"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")


def _check_tensors(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    counted_T: Tensor | None,
    sequence_T: Tensor | None,
    num_sequences: int,
    replay_TK: Tensor | None,
    replicas: Replicas | None,
) -> None:
    num_tokens, num_experts = logits_TE.shape
    exact = (torch.float32, torch.float64) if logits_TE.device.type == "cpu" else (torch.float32,)
    if logits_TE.dtype not in exact:
        raise ValueError(f"logits are {logits_TE.dtype}; the gate works in float32")
    if bias_E.requires_grad:
        raise ValueError("bias requires a gradient, and has none: it moves with the load; pass bias.detach()")
    table_ER, count_E = replicas or (None, None)
    num_replicas = table_ER.shape[1] if table_ER is not None and table_ER.dim() == 2 else 1
    for name, tensor, dtype, shape in (
        ("logits", logits_TE, logits_TE.dtype, logits_TE.shape),
        ("bias", bias_E, torch.float32, (num_experts,)),
        ("counted", counted_T, torch.bool, (num_tokens,)),
        ("sequence", sequence_T, torch.int64, (num_tokens,)),
        ("replay", replay_TK, torch.int64, (num_tokens, top_k)),
        ("replica table", table_ER, torch.int64, (num_experts, num_replicas)),
        ("replica count", count_E, torch.int64, (num_experts,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {list(shape)}"
            )
        if tensor.device != logits_TE.device:
            raise ValueError(f"{name} is on {tensor.device}, logits are on {logits_TE.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pass {name}.contiguous()")
    if logits_TE.device.type == "cpu":
        for name, indices, start, end in (
            ("sequence", sequence_T, 0, num_sequences),
            ("replay", replay_TK, 0, num_experts),
            ("replica count", count_E, 1, num_replicas + 1),
        ):
            _check_range(name, indices, start, end)


def _check_range(name: str, indices: Tensor | None, start: int, end: int) -> None:
    if indices is None or indices.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in indices.aminmax())
    if lowest < start or highest >= end:
        raise ValueError(f"{name} ranges from {lowest} to {highest}; it must be in [{start}, {end})")
