"""grouped_topk in CUDA C++ (csrc/grouped_topk/grouped_topk.cu), where setup.py found nvcc and tuning found it the faster.

Never run on a GPU so far. It takes 32, 64, 128, 256 or 512 experts in 1, 2, 4, ... 32 groups and up to 32 of
them a token; kernel.py takes the rest.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from r1mega_kernels.tuning import Tunable, shape_class

IMPLEMENTATION = Tunable(
    "grouped_topk.implementation", ({"implementation": "triton"}, {"implementation": "cuda"})
)
LIBRARY = Path(__file__).parents[1] / "_C_cuda.so"


def is_faster_on(device: torch.device, num_experts: int) -> bool:
    """As measured (tuning.py); False where nothing was, and where the library was not built."""
    return IMPLEMENTATION.on(device, shape_class(E=num_experts))["implementation"] == "cuda" and load()


def takes(logits_TE: Tensor, num_groups: int, top_k: int, read: Tensor | None = None) -> bool:
    """Also whether the logits, and what else is read in rows of E (the bias, or grad_share), start on 16 bytes."""
    powers = logits_TE.shape[1] in (32, 64, 128, 256, 512) and num_groups in (1, 2, 4, 8, 16, 32)
    aligned = all(rows.data_ptr() % 16 == 0 for rows in (logits_TE, read) if rows is not None)
    return powers and top_k <= 32 and aligned


@cache
def load(library: Path = LIBRARY) -> bool:
    """Registers torch.ops.r1mega_cuda.grouped_topk and .grouped_topk_backward; False where they were not built."""
    if library.exists():
        torch.ops.load_library(library)
    return library.exists()


def forward(
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
    """As reference.forward."""
    weight_TK, expert_TK, slot_TK, load_E, chosen_SE, share_SE = torch.ops.r1mega_cuda.grouped_topk(
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
    share_SE = (share_SE.double() * 2.0**-40).to(logits_TE.dtype)
    return weight_TK, expert_TK, slot_TK, load_E, chosen_SE, share_SE


def backward(
    grad_weight_TK: Tensor,
    grad_share_SE: Tensor | None,
    logits_TE: Tensor,
    expert_TK: Tensor,
    sequence_T: Tensor | None,
    normalise: bool,
    scale: float,
) -> Tensor:
    """As reference.backward."""
    return torch.ops.r1mega_cuda.grouped_topk_backward(
        grad_weight_TK, grad_share_SE, logits_TE, expert_TK, sequence_T, normalise, scale
    )
