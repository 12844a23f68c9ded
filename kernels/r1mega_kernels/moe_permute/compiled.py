"""What runs on CPU: csrc/moe_permute where it has the dtype, else the reference. The same bits as the reference."""

from __future__ import annotations

import torch
from torch import Tensor

import r1mega_kernels._C as cpp
from r1mega_kernels.moe_permute import reference
from r1mega_kernels.moe_permute.reference import indices, permute_fp8, unpermute_backward

__all__ = ["indices", "permute", "permute_fp8", "slots", "unpermute", "unpermute_backward"]


def slots(
    indices_TK: Tensor, num_experts: int, multiple: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    if indices_TK.numel():
        lowest, highest = (int(bound) for bound in indices_TK.aminmax())
        if lowest < -1 or highest >= num_experts:
            raise ValueError(f"experts range from {lowest} to {highest}; they must be in [-1, {num_experts})")
    row_of_pair_TK = torch.empty_like(indices_TK, dtype=torch.int32)
    pair_of_row_N = torch.empty(num_rows, dtype=torch.int32)
    count_E = torch.empty(num_experts, dtype=torch.int64)
    sort = cpp.moe_slots_int32 if indices_TK.dtype == torch.int32 else cpp.moe_slots_int64
    outputs = (row_of_pair_TK, pair_of_row_N, count_E)
    sizes = (indices_TK.numel(), num_experts, multiple, num_rows)
    needed = sort(indices_TK.data_ptr(), *sizes, *(output.data_ptr() for output in outputs))
    if needed > num_rows:
        raise ValueError(f"the experts need {needed} rows, num_rows is {num_rows}")
    return outputs


def permute(tokens_TD: Tensor, row_of_pair_TK: Tensor, pair_of_row_N: Tensor) -> Tensor:
    num_rows, hidden_size = len(pair_of_row_N), tokens_TD.shape[1]
    rows_ND = tokens_TD.new_empty(num_rows, hidden_size)
    sizes = (num_rows, max(row_of_pair_TK.shape[1], 1), hidden_size * tokens_TD.element_size())
    cpp.moe_permute(tokens_TD.data_ptr(), pair_of_row_N.data_ptr(), *sizes, rows_ND.data_ptr())
    return rows_ND


def unpermute(rows_ND: Tensor, row_of_pair_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    if rows_ND.dtype != torch.float32:
        return reference.unpermute(rows_ND, row_of_pair_TK, weights_TK)
    tokens_TD = rows_ND.new_empty(len(row_of_pair_TK), rows_ND.shape[1])
    weights = None if weights_TK is None else weights_TK.float()
    cpp.moe_unpermute(
        rows_ND.data_ptr(),
        row_of_pair_TK.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        *row_of_pair_TK.shape,
        rows_ND.shape[1],
        tokens_TD.data_ptr(),
    )
    return tokens_TD
