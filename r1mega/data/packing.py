"""Packing: samples of any length -> equally many chunks of bounded length on every data rank.

The R1 paper (B.2) sorts by length, spreads over ranks and packs by best fit; here the sort and the best fit
are global (r1mega_kernels._C.pack_best_fit), so that no rank gets more micro-batches than another, and the
chunks are then levelled: packed again at the smallest capacity that needs no more chunks, which evens out
both the micro-batches of one rank and the ranks.

Nothing is cut, dropped or repeated. Dims: T packed tokens of one chunk, S sequences in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from r1mega.samples import PackedBatch, Sample
from r1mega_kernels import _C

ChunkIndices = list[list[list[int]]]
"""[rank][chunk] -> indices of the samples in that chunk, in the order in which they lie there."""

LEVEL_TOLERANCE = 1 / 128
"""Levelling stops searching once the capacity is known to within this share."""


def pack(
    samples: Sequence[Sample], num_ranks: int, tokens_per_chunk: int, align: int = 1
) -> list[list[PackedBatch]]:
    """Chunks of at most tokens_per_chunk tokens for every data rank: result[rank][chunk].

    A sample of n tokens fills n-1 positions. Every chunk's length is a multiple of `align`; what is missing
    is one last sequence of zeros with zero mask and weights. With fewer samples than ranks the ranks left
    over get a chunk of padding alone, so that every rank runs the same collectives.

    Raises ValueError for no samples, a sample without a token to predict, arrays of the wrong length, a
    field that only some samples have, and a sample longer than a chunk.
    """
    samples = list(samples)
    if not samples:
        raise ValueError("no samples to pack")
    _check_samples(samples)
    lengths = np.array([len(sample.token_ids) - 1 for sample in samples], dtype=np.int64)
    chunks_of_rank = pack_indices(lengths, num_ranks, tokens_per_chunk, align)
    return [[_build_batch(samples, chunk, align) for chunk in chunks] for chunks in chunks_of_rank]


def pack_indices(lengths: np.ndarray, num_ranks: int, tokens_per_chunk: int, align: int = 1) -> ChunkIndices:
    """Which sample goes where: the plan behind `pack`, a function of its arguments alone.

    lengths: int64 [n], the positions each sample fills (one less than its tokens).
    """
    if align < 1 or tokens_per_chunk < align:
        raise ValueError(
            f"tokens_per_chunk is {tokens_per_chunk} and chunks are padded to a multiple of {align}: "
            f"raise tokens_per_chunk to at least {max(align, 1)}"
        )
    capacity = tokens_per_chunk // align * align
    bin_of_sample, num_bins = _C.pack_best_fit(lengths, capacity, num_ranks)
    if len(lengths):
        bin_of_sample = _level(lengths, num_ranks, capacity, bin_of_sample, num_bins)
    return _deal(lengths, bin_of_sample, num_bins, num_ranks)


def unpack(values_T: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Splits per-token values of a chunk into one tensor per sample, in the chunk's order, without padding."""
    lengths = (batch.cu_seqlens_S[1:] - batch.cu_seqlens_S[:-1]).tolist()
    sequences = list(values_T.split(lengths))
    return sequences[:-1] if batch.num_padding else sequences


def _level(
    lengths: np.ndarray, num_ranks: int, capacity: int, bin_of_sample: np.ndarray, num_bins: int
) -> np.ndarray:
    """The packing into num_bins at the smallest capacity that best fit finds (bisection)."""
    too_small = max(int(lengths.max()), -(-int(lengths.sum()) // num_bins)) - 1
    enough = capacity
    while enough - too_small > max(1, int(capacity * LEVEL_TOLERANCE)):
        middle = (enough + too_small + 1) // 2
        candidate, bins_needed = _C.pack_best_fit(lengths, middle, num_ranks)
        if bins_needed <= num_bins:
            enough, bin_of_sample = middle, candidate
        else:
            too_small = middle
    return bin_of_sample


def _deal(lengths: np.ndarray, bin_of_sample: np.ndarray, num_bins: int, num_ranks: int) -> ChunkIndices:
    """Deals bins to ranks from the fullest to the emptiest, to and fro (0..R-1, R-1..0, ...)."""
    tokens_of_bin = np.bincount(bin_of_sample, weights=lengths, minlength=num_bins)
    by_bin = np.argsort(bin_of_sample, kind="stable")
    ends = np.cumsum(np.bincount(bin_of_sample, minlength=num_bins))
    members = np.split(by_bin, ends[:-1])
    chunks_of_rank: ChunkIndices = [[] for _ in range(num_ranks)]
    for position, number in enumerate(np.argsort(-tokens_of_bin, kind="stable")):
        lap, seat = divmod(position, num_ranks)
        rank = seat if lap % 2 == 0 else num_ranks - 1 - seat
        chunks_of_rank[rank].append(members[number].tolist())
    return chunks_of_rank


OPTIONAL_FIELDS = ("advantages", "rollout_logprobs", "routed_experts")


def _check_samples(samples: list[Sample]) -> None:
    for i, sample in enumerate(samples):
        positions = len(sample.token_ids) - 1
        if positions < 1:
            raise ValueError(f"sample {i} has {positions + 1} tokens; it needs two or more, drop it")
        for name in ("loss_mask", "token_weights", *OPTIONAL_FIELDS):
            values = getattr(sample, name)
            if (values is None) != (getattr(samples[0], name) is None):
                raise ValueError(f"samples 0 and {i} differ in having {name}: all or none must have it")
            if values is not None and len(values) != positions:
                raise ValueError(
                    f"sample {i} has {positions + 1} tokens and {len(values)} {name}; it needs {positions}"
                )


def _build_batch(all_samples: list[Sample], members: list[int], align: int) -> PackedBatch:
    """The chunk of these members; the first of all samples says which optional fields there are."""
    samples, like = [all_samples[i] for i in members], all_samples[0]
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    num_padding = -sum(lengths) % align if samples else -(-2 // align) * align
    if num_padding:
        lengths.append(num_padding)

    def joined(arrays: list[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate([*arrays, np.zeros(num_padding, dtype)], dtype=dtype))

    def optional(name: str) -> Tensor | None:
        if getattr(like, name) is None:
            return None
        return joined([getattr(sample, name) for sample in samples], np.float32)

    return PackedBatch(
        tokens_T=joined([sample.token_ids[:-1] for sample in samples], np.int64),
        targets_T=joined([sample.token_ids[1:] for sample in samples], np.int64),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens_S=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        loss_mask_T=joined([sample.loss_mask for sample in samples], np.float32),
        token_weights_T=joined([sample.token_weights for sample in samples], np.float32),
        num_padding=num_padding,
        members=tuple(members),
        advantages_T=optional("advantages"),
        rollout_logprobs_T=optional("rollout_logprobs"),
        experts_TLK=_experts(samples, like, num_padding),
    )


def _experts(samples: list[Sample], like: Sample, num_padding: int) -> Tensor | None:
    """[T, L, K]; padding goes to the first K experts, which are no worse than any others."""
    if like.routed_experts is None:
        return None
    _, layers, top_k = like.routed_experts.shape
    padding = np.broadcast_to(np.arange(top_k, dtype=like.routed_experts.dtype), (num_padding, layers, top_k))
    dtype = np.uint8 if like.routed_experts.dtype == np.uint8 else np.int16  # torch computes little in uint16
    arrays = [np.asarray(sample.routed_experts) for sample in samples]
    return torch.from_numpy(np.concatenate([*arrays, padding]).astype(dtype, copy=False))
