"""The definition of permute and unpermute, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from r1mega_kernels.fp8_block import quantize_rows


def padded(counts_E: Tensor, multiple: int) -> Tensor:
    """Each count rounded up to a multiple."""
    return (counts_E + multiple - 1) // multiple * multiple


def indices(map_TE: Tensor, num_per_token: int) -> Tensor:
    count_T = map_TE.sum(dim=1)
    if map_TE.numel() and int(count_T.max()) > num_per_token:
        token = int(count_T.argmax())
        raise ValueError(f"token {token} has {int(count_T[token])} experts, more than {num_per_token}")
    token_P, expert_P = map_TE.nonzero(as_tuple=True)
    if len(expert_P) == len(map_TE) * num_per_token:
        return expert_P.to(torch.int32).view(len(map_TE), num_per_token)
    k_P = torch.arange(len(token_P), device=map_TE.device) - (count_T.cumsum(0) - count_T)[token_P]
    indices_TK = map_TE.new_full((len(map_TE), num_per_token), -1, dtype=torch.int32)
    indices_TK[token_P, k_P] = expert_P.to(torch.int32)
    return indices_TK


def slots(
    indices_TK: Tensor, num_experts: int, multiple: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(row of each pair, pair of each row, tokens per expert)."""
    expert_P = indices_TK.flatten()
    count_E = (expert_P + 1).bincount(minlength=num_experts + 1)[1:].clone()
    size_E = padded(count_E, multiple)
    if int(size_E.sum()) > num_rows:
        raise ValueError(f"the experts need {int(size_E.sum())} rows, num_rows is {num_rows}")
    # experts' pairs one after another, without those of no expert, which come first
    pairs_P = expert_P.argsort(stable=True)[len(expert_P) - int(count_E.sum()) :].to(torch.int32)
    rows_P = torch.arange(len(pairs_P), device=expert_P.device)
    if multiple > 1:
        padding_E = (size_E - count_E).cumsum(0) - (size_E - count_E)  # of the experts before
        rows_P = rows_P + padding_E.repeat_interleave(count_E)
    row_of_pair_TK = expert_P.new_full(expert_P.shape, -1, dtype=torch.int32)
    row_of_pair_TK[pairs_P] = rows_P.to(torch.int32)
    pair_of_row_N = expert_P.new_full((num_rows,), -1, dtype=torch.int32)
    pair_of_row_N[rows_P] = pairs_P
    return row_of_pair_TK.view_as(indices_TK), pair_of_row_N, count_E


def gather(source: Tensor, index: Tensor) -> Tensor:
    """source[index] along dim 0, zero where the index is -1."""
    if len(source) == 0:
        return source.new_zeros(*index.shape, *source.shape[1:])
    found = source.index_select(0, index.flatten().clamp(min=0)).view(*index.shape, *source.shape[1:])
    absent = index < 0
    if index.device.type == "cpu" and not absent.any():  # on a GPU the question would wait for the device
        return found
    return found.masked_fill_(absent.view(*index.shape, *[1] * (source.dim() - 1)), 0)


def permute(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    return gather(tokens_TD, _token_of_row(row_of_pair_TK, pair_of_row_N))


def permute_fp8(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(permute(tokens_TD, row_of_pair_TK, pair_of_row_N))


def unpermute(rows_ND: Tensor, row_of_pair_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    exact = torch.promote_types(rows_ND.dtype, torch.float32)
    sum_TD = rows_ND.new_zeros(len(row_of_pair_TK), rows_ND.shape[1], dtype=exact)
    for k in range(row_of_pair_TK.shape[1]):
        part_TD = gather(rows_ND, row_of_pair_TK[:, k]).to(exact)
        sum_TD += part_TD if weights_TK is None else part_TD * weights_TK[:, k, None].to(exact)
    return sum_TD.to(rows_ND.dtype)


def unpermute_backward(
    d_tokens_TD: Tensor, rows_ND: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """(d_rows, d_weights)."""
    exact = torch.promote_types(rows_ND.dtype, torch.float32)
    d_sum_ND = permute(d_tokens_TD, row_of_pair_TK, pair_of_row_N).to(exact)
    weight_N = gather(weights_TK.flatten(), pair_of_row_N).to(exact)
    d_weight_N = (d_sum_ND * rows_ND.to(exact)).sum(dim=1)
    d_weights_TK = gather(d_weight_N, row_of_pair_TK).to(weights_TK.dtype)
    return (d_sum_ND * weight_N[:, None]).to(rows_ND.dtype), d_weights_TK


def _token_of_row(row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    """-1 in rows that pad."""
    return pair_of_row_N.div(max(row_of_pair_TK.shape[1], 1), rounding_mode="floor")
