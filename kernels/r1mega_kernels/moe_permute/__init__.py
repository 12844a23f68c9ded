"""moe_permute: tokens to the rows that their experts read, sorted by expert, and the experts' rows back to tokens.

Each token has K experts (-1: none). Row n of the sorted matrix belongs to one pair of a token and one of its K
experts; rows of an expert lie together, in the order of the tokens, so that slots depend on nothing but the input.

- reference.py: the definition, in plain torch. On CPU compiled.py does the same, to the bit; on a GPU kernel.py
- slots are found by a histogram and a scan; unpermute gathers over k and adds in the order of k, in float32
  (float64 for float64, on CPU only). No addition is atomic

Source: the dispatch and combine of DeepSeek-V3, section 3.2; Megatron-core's permute and unpermute (moe_utils.py) give
the same, to the bit in float32 where a token's experts are in ascending order.
Dims: T tokens, K experts of a token, E experts, D hidden, N rows, Q = ceil(D / 128) scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1mega_kernels.moe_permute import compiled, reference
from r1mega_kernels.moe_permute.reference import padded

__all__ = [
    "Permutation",
    "indices_of",
    "permute",
    "permute_fp8",
    "permute_values",
    "sort_by_expert",
    "unpermute",
]


@dataclass(frozen=True)
class Permutation:
    """Which pair lies in which row."""

    row_of_pair_TK: Tensor
    """int32; -1 where the token has no k-th expert."""
    pair_of_row_N: Tensor
    """int32, t K + k; -1 in rows that pad."""
    tokens_per_expert_E: Tensor
    """int64, without padding."""
    multiple: int

    @property
    def rows_per_expert_E(self) -> Tensor:
        return padded(self.tokens_per_expert_E, self.multiple)


def indices_of(map_TE: Tensor, num_per_token: int) -> Tensor:
    """The experts of each token in ascending order, int32 [T, num_per_token], -1 after the last.

    map_TE: bool, true where the token goes to the expert. On CPU ValueError where a token has more experts than
    num_per_token; a GPU drops the last ones instead of waiting for the device.
    """
    if map_TE.dtype != torch.bool or map_TE.dim() != 2:
        raise ValueError(f"the map is {map_TE.dtype} {list(map_TE.shape)}; it must be torch.bool [T, E]")
    _check_contiguous("the map", map_TE)
    if num_per_token < 1:
        raise ValueError(f"num_per_token is {num_per_token}; it must be at least 1")
    return torch.ops.r1mega.moe_indices(map_TE, num_per_token)


def sort_by_expert(
    indices_TK: Tensor, num_experts: int, *, multiple: int = 1, num_rows: int | None = None
) -> Permutation:
    """Where each pair goes. indices_TK int32 or int64, experts in [0, num_experts) or -1 for none.

    multiple: each expert's rows are padded to a multiple of it, for grouped matrix products. num_rows: N, where the
    caller knows it; T K otherwise, or, with a multiple above 1, what the experts turn out to need (on a GPU that waits
    for the device). More rows than needed are padding at the end.
    Raises ValueError for dtype, shape, layout, and, on CPU, for experts out of range and too few rows. Asking would make a
    GPU wait: there an expert out of range is none, as -1 is, and pairs beyond the last row are lost.
    """
    if indices_TK.dtype not in (torch.int32, torch.int64) or indices_TK.dim() != 2:
        raise ValueError(
            f"indices are {indices_TK.dtype} {list(indices_TK.shape)}; they must be int32 or int64 [T, K]"
        )
    _check_contiguous("indices", indices_TK)
    if num_experts < 1 or multiple < 1:
        raise ValueError(f"num_experts is {num_experts} and multiple {multiple}; both must be at least 1")
    if indices_TK.numel() >= 2**31:
        raise ValueError(f"indices {list(indices_TK.shape)}: 2^31 pairs and more are not supported")
    if num_rows is None and multiple == 1:
        num_rows = indices_TK.numel()
    elif num_rows is None:
        flat = indices_TK.flatten().long()
        counts_E = (flat.clamp(-1, num_experts) + 1).bincount(minlength=num_experts + 2)[1:-1]
        num_rows = int(padded(counts_E, multiple).sum())
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}")
    row_of_pair_TK, pair_of_row_N, tokens_per_expert_E = torch.ops.r1mega.moe_slots(
        indices_TK, num_experts, multiple, num_rows
    )
    return Permutation(row_of_pair_TK, pair_of_row_N, tokens_per_expert_E, multiple)


def permute(tokens_TD: Tensor, permutation: Permutation) -> Tensor:
    """rows_ND: each token once for each of its experts; rows that pad are zero. Differentiable in tokens_TD."""
    _check_tokens(tokens_TD, permutation)
    return torch.ops.r1mega.moe_permute(tokens_TD, permutation.row_of_pair_TK, permutation.pair_of_row_N)


def permute_values(values_TK: Tensor, permutation: Permutation) -> Tensor:
    """values_N: one number of each pair (its probability) in the order of rows; 0 in rows that pad. Differentiable."""
    if values_TK.shape != permutation.row_of_pair_TK.shape:
        expected = list(permutation.row_of_pair_TK.shape)
        raise ValueError(f"values are {list(values_TK.shape)}; the permutation's pairs are {expected}")
    _check_floating("values", values_TK)
    _check_device("values", values_TK, permutation)
    return torch.ops.r1mega.moe_permute_values(
        values_TK, permutation.row_of_pair_TK, permutation.pair_of_row_N
    )


def permute_fp8(tokens_TD: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """permute and fp8_block.quantize_rows in one pass: (rows_ND float8_e4m3fn, scale_NQ float32).

    tokens_TD float32 or bfloat16. Not differentiable: ValueError where a gradient is asked for; detach the tokens.
    """
    _check_tokens(tokens_TD, permutation)
    if tokens_TD.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"tokens are {tokens_TD.dtype}; fp8 takes torch.float32 or torch.bfloat16")
    if tokens_TD.requires_grad and torch.is_grad_enabled():
        raise ValueError("fp8 rows have no gradient: detach the tokens, or call under torch.no_grad()")
    return torch.ops.r1mega.moe_permute_fp8(tokens_TD, permutation.row_of_pair_TK, permutation.pair_of_row_N)


def unpermute(rows_ND: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
    """tokens_TD: the sum over k of each token's rows, times weights_TK if given. Rows that pad count for nothing.

    Sums in float32 and rounds once to rows_ND's dtype. Differentiable in rows_ND and weights_TK.
    """
    _check_floating("rows", rows_ND)
    if rows_ND.dim() != 2 or len(rows_ND) != len(permutation.pair_of_row_N):
        raise ValueError(
            f"rows are {list(rows_ND.shape)}; the permutation has {len(permutation.pair_of_row_N)} rows"
        )
    _check_place("rows", rows_ND, permutation)
    if weights_TK is None:
        return torch.ops.r1mega.moe_unpermute(
            rows_ND, permutation.row_of_pair_TK, permutation.pair_of_row_N, None
        )
    if weights_TK.shape != permutation.row_of_pair_TK.shape:
        expected = list(permutation.row_of_pair_TK.shape)
        raise ValueError(f"weights are {list(weights_TK.shape)}; the permutation's pairs are {expected}")
    _check_floating("weights", weights_TK)
    _check_place("weights", weights_TK, permutation)
    return torch.ops.r1mega.moe_unpermute(
        rows_ND, permutation.row_of_pair_TK, permutation.pair_of_row_N, weights_TK
    )


def _check_tokens(tokens_TD: Tensor, permutation: Permutation) -> None:
    _check_floating("tokens", tokens_TD)
    if tokens_TD.dim() != 2 or len(tokens_TD) != len(permutation.row_of_pair_TK):
        tokens = len(permutation.row_of_pair_TK)
        raise ValueError(f"tokens are {list(tokens_TD.shape)}; the permutation has {tokens} tokens")
    _check_place("tokens", tokens_TD, permutation)


def _check_place(name: str, tensor: Tensor, permutation: Permutation) -> None:
    _check_contiguous(name, tensor)
    _check_device(name, tensor, permutation)


def _check_device(name: str, tensor: Tensor, permutation: Permutation) -> None:
    if tensor.device != permutation.pair_of_row_N.device:
        raise ValueError(
            f"{name} are on {tensor.device}, the permutation on {permutation.pair_of_row_N.device}"
        )


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}; pass a contiguous tensor")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} are {tensor.dtype}; they must be floating point")
    if tensor.dtype == torch.float64 and tensor.device.type != "cpu":
        raise ValueError(f"{name} are torch.float64 on {tensor.device}, where sums are in float32")


# ---------------------------------------------------------------- behind torch's dispatcher


def _implementation(tensor: Tensor) -> Any:
    if tensor.device.type == "cpu":
        return compiled
    from r1mega_kernels.moe_permute import kernel  # Triton is absent where there is no GPU

    return kernel


@torch.library.custom_op("r1mega::moe_indices", mutates_args=())
def _indices(map_TE: Tensor, num_per_token: int) -> Tensor:
    return _implementation(map_TE).indices(map_TE, num_per_token)


@_indices.register_fake
def _(map_TE: Tensor, num_per_token: int) -> Tensor:
    return map_TE.new_empty(len(map_TE), num_per_token, dtype=torch.int32)


@torch.library.custom_op("r1mega::moe_slots", mutates_args=())
def _slots(
    indices_TK: Tensor, num_experts: int, multiple: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(indices_TK).slots(indices_TK, num_experts, multiple, num_rows)


@_slots.register_fake
def _(indices_TK: Tensor, num_experts: int, multiple: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    row_of_pair_TK = torch.empty_like(indices_TK, dtype=torch.int32)
    pair_of_row_N = indices_TK.new_empty(num_rows, dtype=torch.int32)
    return row_of_pair_TK, pair_of_row_N, indices_TK.new_empty(num_experts, dtype=torch.int64)


@torch.library.custom_op("r1mega::moe_permute", mutates_args=())
def _permute(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return _implementation(tokens_TD).permute(tokens_TD, row_of_pair_TK, pair_of_row_N)


@_permute.register_fake
def _(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return tokens_TD.new_empty(len(pair_of_row_N), tokens_TD.shape[1])


def _keep_permutation(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _permute_backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.r1mega.moe_unpermute(d_rows_ND.contiguous(), *ctx.saved_tensors, None), None, None


_permute.register_autograd(_permute_backward, setup_context=_keep_permutation)


@torch.library.custom_op("r1mega::moe_permute_values", mutates_args=())
def _permute_values(values_TK: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return reference.gather(values_TK.flatten(), pair_of_row_N)


@_permute_values.register_fake
def _(values_TK: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return values_TK.new_empty(len(pair_of_row_N))


@torch.library.custom_op("r1mega::moe_unpermute_values", mutates_args=())
def _unpermute_values(values_N: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return reference.gather(values_N, row_of_pair_TK)


@_unpermute_values.register_fake
def _(values_N: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return values_N.new_empty(row_of_pair_TK.shape)


def _permute_values_backward(ctx: Any, d_values_N: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.r1mega.moe_unpermute_values(d_values_N, *ctx.saved_tensors), None, None


def _unpermute_values_backward(ctx: Any, d_values_TK: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.r1mega.moe_permute_values(d_values_TK, *ctx.saved_tensors), None, None


_permute_values.register_autograd(_permute_values_backward, setup_context=_keep_permutation)
_unpermute_values.register_autograd(_unpermute_values_backward, setup_context=_keep_permutation)


@torch.library.custom_op("r1mega::moe_permute_fp8", mutates_args=())
def _permute_fp8(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> tuple[Tensor, Tensor]:
    return _implementation(tokens_TD).permute_fp8(tokens_TD, row_of_pair_TK, pair_of_row_N)


@_permute_fp8.register_fake
def _(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, hidden_size = len(pair_of_row_N), tokens_TD.shape[1]
    rows_ND = tokens_TD.new_empty(num_rows, hidden_size, dtype=torch.float8_e4m3fn)
    return rows_ND, tokens_TD.new_empty(num_rows, -(-hidden_size // 128), dtype=torch.float32)


@torch.library.custom_op("r1mega::moe_unpermute", mutates_args=())
def _unpermute(
    rows_ND: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor, weights_TK: Tensor | None
) -> Tensor:
    return _implementation(rows_ND).unpermute(rows_ND, row_of_pair_TK, weights_TK)


@_unpermute.register_fake
def _(rows_ND: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor, weights_TK: Tensor | None) -> Tensor:
    return rows_ND.new_empty(len(row_of_pair_TK), rows_ND.shape[1])


@torch.library.custom_op("r1mega::moe_unpermute_backward", mutates_args=())
def _weighted_backward(
    d_tokens_TD: Tensor, rows_ND: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return _implementation(rows_ND).unpermute_backward(
        d_tokens_TD, rows_ND, row_of_pair_TK, pair_of_row_N, weights_TK
    )


@_weighted_backward.register_fake
def _(
    d_tokens_TD: Tensor, rows_ND: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_ND), torch.empty_like(weights_TK)


def _keep_rows_if_weighted(ctx: Any, inputs: tuple, output: Any) -> None:
    rows_ND, row_of_pair_TK, pair_of_row_N, weights_TK = inputs
    weighted = () if weights_TK is None else (rows_ND, weights_TK)
    ctx.save_for_backward(row_of_pair_TK, pair_of_row_N, *weighted)


def _unpermute_backward(ctx: Any, d_tokens_TD: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    row_of_pair_TK, pair_of_row_N, *weighted = ctx.saved_tensors
    d_tokens_TD = d_tokens_TD.contiguous()
    if not weighted:
        return torch.ops.r1mega.moe_permute(d_tokens_TD, row_of_pair_TK, pair_of_row_N), None, None, None
    rows_ND, weights_TK = weighted
    d_rows_ND, d_weights_TK = torch.ops.r1mega.moe_unpermute_backward(
        d_tokens_TD, rows_ND, row_of_pair_TK, pair_of_row_N, weights_TK
    )
    return d_rows_ND, None, None, d_weights_TK


_unpermute.register_autograd(_unpermute_backward, setup_context=_keep_rows_if_weighted)
