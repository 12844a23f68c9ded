"""Packing of texts that get one score each, read at their last token.

Unlike samples of next-token prediction these are whole: a sequence of n tokens fills n positions. The sequences of
one example (the two of a pair) always lie side by side in one chunk, so its loss needs nothing from elsewhere.
Dims: T packed tokens, S sequences, N sequences with a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1mega.data.packing import pack_indices
from r1mega.samples import PackedBatch

Sequences = Sequence[Sequence[int]]
"""The token ids of one example's texts."""


@dataclass(frozen=True)
class PreferenceBatch:
    """A chunk of examples: pairs (sequences 2k and 2k+1 are chosen and rejected) or labelled responses."""

    packed: PackedBatch
    labels_N: Tensor | None
    """float32, 1 safe, 0 unsafe; None for pairs."""


def pack_preferences(
    examples: Sequence[Sequences],
    labels: Sequence[float] | None,
    num_ranks: int,
    tokens_per_chunk: int,
    align: int = 1,
) -> list[list[PreferenceBatch]]:
    """One global batch as chunks for every data rank; labels None means pairs. Raises as `pack_whole` does."""

    def with_labels(chunk: PackedBatch) -> PreferenceBatch:
        if labels is None:
            return PreferenceBatch(chunk, None)
        return PreferenceBatch(chunk, torch.tensor([labels[i] for i in chunk.members], dtype=torch.float32))

    packed = pack_whole(examples, num_ranks, tokens_per_chunk, align)
    return [[with_labels(chunk) for chunk in chunks] for chunks in packed]


def pack_whole(
    examples: Sequence[Sequences], num_ranks: int, tokens_per_chunk: int, align: int = 1
) -> list[list[PackedBatch]]:
    """Chunks for every data rank, equally many: result[rank][chunk], whose `members` are indices of `examples`.

    loss_mask_T is 1 at each sequence's last token, where its score is read; token_weights_T is 1 / len(examples)
    there. targets_T repeats tokens_T, for nothing is predicted. A rank without examples gets padding alone.
    Raises ValueError for no examples, an empty sequence, and an example longer than a chunk.
    """
    if not examples or any(not sequence for example in examples for sequence in example):
        raise ValueError(
            f"{len(examples)} examples: one or more are needed, and none may hold an empty sequence"
        )
    lengths = np.array([sum(map(len, example)) for example in examples], dtype=np.int64)
    plan = pack_indices(lengths, num_ranks, tokens_per_chunk, align)
    return [[_chunk(examples, members, align) for members in chunks] for chunks in plan]


def _chunk(examples: Sequence[Sequences], members: list[int], align: int) -> PackedBatch:
    sequences = [sequence for i in members for sequence in examples[i]]
    lengths = [len(sequence) for sequence in sequences]
    padding = -sum(lengths) % align if sequences else align
    tokens_T = torch.tensor([token for sequence in sequences for token in sequence] + [0] * padding)
    mask_T = torch.zeros(len(tokens_T))
    mask_T[np.cumsum(lengths, dtype=np.int64) - 1] = 1.0
    bounds = np.cumsum([0, *lengths, *([padding] if padding else [])])
    return PackedBatch(
        tokens_T=tokens_T,
        targets_T=tokens_T,
        positions_T=torch.cat([torch.arange(length) for length in np.diff(bounds)]),
        cu_seqlens_S=torch.from_numpy(bounds.astype(np.int32)),
        loss_mask_T=mask_T,
        token_weights_T=mask_T / len(examples),
        num_padding=padding,
        members=tuple(members),
    )
