"""What runs on CPU: csrc/moe_permute where it has the dtype, else the reference. The same bits as the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from r1mega_kernels import _C
from r1mega_kernels.moe_permute import reference
from r1mega_kernels.moe_permute.reference import indices, permute_fp8, unpermute_backward

__all__ = ["indices", "permute", "permute_fp8", "slots", "unpermute", "unpermute_backward"]


def slots(
    indices_TK: Tensor, num_experts: int, multiple: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    row_of_pair_TK = torch.empty_like(indices_TK, dtype=torch.int32)
    pair_of_row_N = torch.empty(num_rows, dtype=torch.int32)
    count_E = torch.empty(num_experts, dtype=torch.int64)
    arrays = (row_of_pair_TK.numpy(), pair_of_row_N.numpy(), count_E.numpy())
    needed = _C.moe_slots(indices_TK.numpy(), multiple, *arrays)
    if needed > num_rows:
        raise ValueError(f"the experts need {needed} rows, num_rows is {num_rows}")
    return row_of_pair_TK, pair_of_row_N, count_E


def permute(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    rows_ND = tokens_TD.new_empty(len(pair_of_row_N), tokens_TD.shape[1])
    if rows_ND.numel():
        tokens, rows = (x.detach().view(torch.uint8).numpy() for x in (tokens_TD, rows_ND))
        _C.moe_permute(tokens, pair_of_row_N.numpy(), max(row_of_pair_TK.shape[1], 1), rows)
    return rows_ND


def unpermute(rows_ND: Tensor, row_of_pair_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    if rows_ND.dtype != torch.float32:
        return reference.unpermute(rows_ND, row_of_pair_TK, weights_TK)
    tokens_TD = rows_ND.new_empty(len(row_of_pair_TK), rows_ND.shape[1])
    weights = None if weights_TK is None else weights_TK.detach().float().numpy()
    _C.moe_unpermute(rows_ND.detach().numpy(), row_of_pair_TK.numpy(), weights, tokens_TD.numpy())
    return tokens_TD
