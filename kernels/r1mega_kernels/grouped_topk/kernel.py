"""grouped_topk as Triton kernels, for NVIDIA GPUs (written for sm_90).

Never run on a GPU so far: checked against the reference in Triton's interpreter and compiled ahead of time to sm_90
(r1mega_kernels.aot).

A warp has a token: its experts lie in the warp's registers, groups side by side and each padded to a power of two, so a
maximum is a few shuffles, or one instruction where it is of integers. Scores are compared as integers that order like
them: of equal ones the least column wins, which is the lowest expert.

- forward: logits are read once. A program walks through TILES tiles of tokens and counts in registers; what it counted is
  added to memory by integer atomics, and the sums of scores as multiples of 2^-40, so that no order of programs shows.
- backward: zeros (or the gradient of the balance loss's shares), then the chosen experts' places over them, which are
  still in the cache.

Dims: T tokens, E experts, K chosen, S sequences, C columns: experts with every group padded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega_kernels.aot import AheadOfTime
from r1mega_kernels.tuning import Tunable, shape_class

FORWARD = Tunable(
    "grouped_topk.forward",
    tuple(
        {"ROWS": rows, "TILES": tiles, "num_warps": 1}
        for rows, tiles in ((2, 8), (1, 8), (1, 16), (1, 32), (2, 4), (2, 16), (4, 4), (4, 8))
    ),
)
"""Tokens of a tile and tiles of a program. It has one warp: with more, Triton lays a row over several, and every maximum
goes through shared memory."""
BACKWARD = Tunable(
    "grouped_topk.backward",
    tuple(
        {"ROWS": rows, "num_warps": warps}
        for rows, warps in ((8, 4), (1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (16, 4), (16, 8), (32, 8))
    ),
)
BACKWARD_OF_SHARES = Tunable(
    "grouped_topk.backward_of_shares",
    tuple(
        {"ROWS": rows, "num_warps": warps} for rows, warps in ((2, 1), (1, 1), (4, 1), (4, 2), (4, 4), (8, 4))
    ),
)
FIXED_POINT = 2.0**40
TINY = tl.constexpr(1e-20)
LEAST = tl.constexpr(-(2**31))
"""Below every score as an integer."""


def candidates() -> tuple[Tunable, ...]:
    return FORWARD, BACKWARD, BACKWARD_OF_SHARES


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
    num_tokens, num_experts = logits_TE.shape
    num_rows = num_sequences if sequence_T is not None else 0
    weight_TK = logits_TE.new_empty(num_tokens, top_k)
    expert_TK = bias_E.new_empty(num_tokens if replay_TK is None else 0, top_k, dtype=torch.int64)
    slot_TK = bias_E.new_empty(num_tokens if table_ER is not None else 0, top_k, dtype=torch.int64)
    load_E = bias_E.new_zeros(num_experts, dtype=torch.int64)
    chosen_SE, share_SE = bias_E.new_zeros(2, num_rows, num_experts, dtype=torch.int64)
    blocks = FORWARD.on(logits_TE.device, shape_class(E=num_experts))
    if num_tokens:
        with torch.cuda.device_of(logits_TE):
            forward_kernel[(triton.cdiv(num_tokens, blocks["ROWS"] * blocks["TILES"]),)](
                logits_TE,
                bias_E,
                counted_T,
                sequence_T,
                replay_TK,
                table_ER,
                count_E,
                weight_TK,
                expert_TK,
                slot_TK,
                load_E,
                chosen_SE,
                share_SE,
                num_tokens,
                scale,
                table_ER.shape[1] if table_ER is not None else 0,
                num_sequences,
                **columns(num_experts, num_groups),
                KEPT=kept_groups,
                K=top_k,
                K_COLUMNS=triton.next_power_of_2(top_k),
                NORMALISE=normalise,
                **blocks,
            )
    share_SE = (share_SE.double() / FIXED_POINT).to(logits_TE.dtype)
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
    num_tokens, num_experts = logits_TE.shape
    top_k = expert_TK.shape[1]
    grad_logits_TE = torch.empty_like(logits_TE)
    tunable = BACKWARD if sequence_T is None else BACKWARD_OF_SHARES
    blocks = tunable.on(logits_TE.device, shape_class(E=num_experts))
    if num_tokens:
        with torch.cuda.device_of(logits_TE):
            backward_kernel[(triton.cdiv(num_tokens, blocks["ROWS"]),)](
                grad_weight_TK,
                grad_share_SE,
                logits_TE,
                expert_TK,
                sequence_T,
                grad_logits_TE,
                num_tokens,
                scale,
                0 if grad_share_SE is None else len(grad_share_SE),
                E=num_experts,
                E_COLUMNS=triton.next_power_of_2(num_experts),
                K=top_k,
                K_COLUMNS=triton.next_power_of_2(top_k),
                NORMALISE=normalise,
                **blocks,
            )
    return grad_logits_TE


def columns(num_experts: int, num_groups: int) -> dict[str, int]:
    """How a token's experts lie in columns: G groups (padded) of J (padded)."""
    size = num_experts // num_groups
    return {
        "E": num_experts,
        "GROUPS": num_groups,
        "SIZE": size,
        "G": triton.next_power_of_2(num_groups),
        "J": triton.next_power_of_2(size),
    }


@triton.jit
def ordered(value):
    """int32 that orders like the float32; -0 counts as 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The float32 of an ordered integer."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keep_best_groups(
    key_TC, GROUPS: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr, J: tl.constexpr,
    KEPT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """LEAST outside the KEPT groups of largest sum of their two largest scores."""
    key_TGJ = tl.reshape(key_TC, (ROWS, G, J))
    first_TG = tl.max(key_TGJ, axis=2)
    if SIZE > 1:
        j = tl.arange(0, J)[None, None, :]
        place_TG = tl.min(tl.where(key_TGJ == first_TG[:, :, None], j, J), axis=2)
        second_TG = tl.max(tl.where(j == place_TG[:, :, None], LEAST, key_TGJ), axis=2)
        group_TG = ordered(unordered(first_TG) + unordered(second_TG))
    else:
        group_TG = first_TG
    g = tl.arange(0, G)[None, :]
    group_TG = tl.where(g < GROUPS, group_TG, LEAST)
    dropped_TG = tl.full((ROWS, G), 1, dtype=tl.int32)
    for _ in tl.static_range(KEPT):
        best_T = tl.max(group_TG, axis=1)
        place_T = tl.min(tl.where(group_TG == best_T[:, None], g, G), axis=1)
        dropped_TG = tl.where(g == place_T[:, None], 0, dropped_TG)
        group_TG = tl.where(g == place_T[:, None], LEAST, group_TG)
    key_TGJ = tl.where(dropped_TG[:, :, None] > 0, LEAST, key_TGJ)
    return tl.reshape(key_TGJ, (ROWS, G * J))


@triton.jit
def forward_kernel(
    logits, bias, counted, sequence, replay, table, count, weight, expert, slot, load, chosen, share,
    T, scale, R, S,
    E: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr, J: tl.constexpr,
    KEPT: tl.constexpr, K: tl.constexpr, K_COLUMNS: tl.constexpr, NORMALISE: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """share int64: multiples of 2^-40. What is given and out of range is no address: see grouped_topk."""
    C: tl.constexpr = G * J
    c = tl.arange(0, C)
    if SIZE == J:
        expert_C = c  # known to lie side by side: wide loads
    else:
        expert_C = c // J * SIZE + c % J
    real_C = (c % J < SIZE) & (c // J < GROUPS)
    bias_C = tl.load(bias + expert_C, mask=real_C, other=0.0)
    k = tl.arange(0, K_COLUMNS)
    load_TC = tl.zeros((ROWS, C), dtype=tl.int32)
    # of the balance loss: the sequence that the sums so far are of (-1: none) and these sums
    current = -1
    chosen_C = tl.zeros((C,), dtype=tl.int32)
    share_C = tl.zeros((C,), dtype=tl.float32)
    for tile in range(TILES):
        row_T = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        in_T = row_T < T
        far_T = row_T.to(tl.int64)
        in_TC = in_T[:, None] & real_C[None, :]
        logit_TC = tl.load(logits + far_T[:, None] * E + expert_C[None, :], mask=in_TC, other=float("-inf"))
        score_TC = 1.0 / (1.0 + tl.exp(-logit_TC))
        chosen_at_TK = far_T[:, None] * K + k[None, :]
        in_TK = in_T[:, None] & (k < K)[None, :]
        hit_TC = tl.zeros((ROWS, C), dtype=tl.int32)
        if replay is None:
            key_TC = tl.where(real_C[None, :], ordered(score_TC + bias_C[None, :]), LEAST)
            if KEPT < GROUPS:
                key_TC = keep_best_groups(key_TC, GROUPS, SIZE, G, J, KEPT, ROWS)
            place_TK = tl.zeros((ROWS, K_COLUMNS), dtype=tl.int32)
            for i in tl.static_range(K):
                best_T = tl.max(key_TC, axis=1)
                place_T = tl.min(tl.where(key_TC == best_T[:, None], c[None, :], C), axis=1)
                at_TC = c[None, :] == place_T[:, None]
                key_TC = tl.where(at_TC, LEAST, key_TC)
                hit_TC += at_TC.to(tl.int32)
                place_TK = tl.where(k[None, :] == i, place_T[:, None], place_TK)
            expert_TK = (place_TK // J * SIZE + place_TK % J).to(tl.int64)
            tl.store(expert + chosen_at_TK, expert_TK, mask=in_TK)
        else:
            expert_TK = tl.load(replay + chosen_at_TK, mask=in_TK, other=0)
            known_TK = (expert_TK >= 0) & (expert_TK < E)
            for i in tl.static_range(K):
                at_T = tl.load(replay + far_T * K + i, mask=in_T, other=-1)
                hit_TC += (expert_C[None, :] == at_T[:, None]).to(tl.int32)
            hit_TC = tl.where(real_C[None, :], hit_TC, 0)

        there_TK = in_TK if replay is None else in_TK & known_TK
        logit_TK = tl.load(logits + far_T[:, None] * E + expert_TK, mask=there_TK, other=float("-inf"))
        if replay is not None:
            logit_TK = tl.where(known_TK, logit_TK, float("nan"))
        weight_TK = 1.0 / (1.0 + tl.exp(-logit_TK))
        if NORMALISE:
            weight_TK = weight_TK / (tl.sum(weight_TK, axis=1) + TINY)[:, None]
        tl.store(weight + chosen_at_TK, weight_TK * scale, mask=in_TK)

        if table is not None:
            count_TK = tl.load(count + expert_TK, mask=there_TK, other=1)
            slot_TK = tl.load(table + expert_TK * R + far_T[:, None] % count_TK, mask=there_TK, other=-1)
            tl.store(slot + chosen_at_TK, slot_TK, mask=in_TK)

        if counted is None:
            load_TC += tl.where(in_T[:, None], hit_TC, 0)
        else:
            counted_T = tl.load(counted + row_T, mask=in_T, other=0).to(tl.int1)
            load_TC += tl.where(counted_T[:, None], hit_TC, 0)

        if sequence is not None:
            share_TC = score_TC / (tl.sum(score_TC, axis=1) + TINY)[:, None]
            key_TC = tl.where(real_C[None, :], ordered(score_TC), LEAST)
            hit_TC = tl.zeros((ROWS, C), dtype=tl.int32)
            for _ in tl.static_range(K):
                best_T = tl.max(key_TC, axis=1)
                place_T = tl.min(tl.where(key_TC == best_T[:, None], c[None, :], C), axis=1)
                at_TC = c[None, :] == place_T[:, None]
                key_TC = tl.where(at_TC, LEAST, key_TC)
                hit_TC += at_TC.to(tl.int32)
            sequence_T = tl.load(sequence + row_T, mask=in_T, other=-1)
            counts_T = (sequence_T >= 0) & (sequence_T < S)
            sequence_T = tl.where(counts_T, sequence_T, -1).to(tl.int32)
            # one turn of the loop where all tokens of the tile are of one sequence, as most are
            last = tl.max(sequence_T, axis=0)
            s = tl.min(tl.where(counts_T, sequence_T, 2147483647), axis=0)
            while s <= last:
                mine_T = sequence_T == s
                tile_chosen_C = tl.sum(tl.where(mine_T[:, None], hit_TC, 0), axis=0)
                tile_share_C = tl.sum(tl.where(mine_T[:, None], share_TC, 0.0), axis=0)
                if s == current:
                    chosen_C += tile_chosen_C
                    share_C += tile_share_C
                else:
                    add_statistics(chosen, share, current, chosen_C, share_C, expert_C, real_C, E)
                    current = s
                    chosen_C = tile_chosen_C
                    share_C = tile_share_C
                s = tl.min(tl.where(sequence_T > s, sequence_T, 2147483647), axis=0)

    load_C = tl.sum(load_TC, axis=0)
    tl.atomic_add(load + expert_C, load_C.to(tl.int64), mask=real_C & (load_C > 0), sem="relaxed")
    if sequence is not None:
        add_statistics(chosen, share, current, chosen_C, share_C, expert_C, real_C, E)


@triton.jit
def add_statistics(chosen, share, current, chosen_C, share_C, expert_C, real_C, E: tl.constexpr):
    """Add what was summed for sequence `current`, if any, to memory: integers, in any order the same."""
    at_C = tl.cast(current, tl.int64) * E + expert_C
    there_C = real_C & (current >= 0)
    tl.atomic_add(chosen + at_C, chosen_C.to(tl.int64), mask=there_C & (chosen_C > 0), sem="relaxed")
    fixed_C = (share_C * 1099511627776.0).to(tl.int64)  # 2^40: exact but for what lies below 2^-40
    tl.atomic_add(share + at_C, fixed_C, mask=there_C, sem="relaxed")


@triton.jit
def backward_kernel(
    grad_weight, grad_share, logits, expert, sequence, grad_logits, T, scale, S,
    E: tl.constexpr, E_COLUMNS: tl.constexpr, K: tl.constexpr, K_COLUMNS: tl.constexpr,
    NORMALISE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_T = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_T = row_T < T
    start_T1 = (row_T.to(tl.int64) * E)[:, None]
    e = tl.arange(0, E_COLUMNS)[None, :]
    k = tl.arange(0, K_COLUMNS)[None, :]
    in_TE = in_T[:, None] & (e < E)
    in_TK = in_T[:, None] & (k < K)
    at_TK = row_T.to(tl.int64)[:, None] * K + k
    expert_TK = tl.load(expert + at_TK, mask=in_TK, other=0)
    known_TK = (expert_TK >= 0) & (expert_TK < E)
    there_TK = in_TK & known_TK
    grad_TK = tl.load(grad_weight + at_TK, mask=in_TK, other=0.0)
    logit_TK = tl.load(logits + start_T1 + expert_TK, mask=there_TK, other=float("-inf"))
    score_TK = 1.0 / (1.0 + tl.exp(-tl.where(known_TK, logit_TK, float("nan"))))
    if NORMALISE:
        sum_T1 = (tl.sum(score_TK, axis=1) + TINY)[:, None]
        grad_TK = (grad_TK - tl.sum(grad_TK * score_TK, axis=1)[:, None] / sum_T1) / sum_T1
    grad_TK *= scale
    if sequence is None:
        grad_TE = tl.zeros((ROWS, E_COLUMNS), dtype=tl.float32)
    else:
        sequence_T = tl.load(sequence + row_T, mask=in_T, other=-1)
        counts_T1 = ((sequence_T >= 0) & (sequence_T < S))[:, None]
        share_at_T1 = (sequence_T * E)[:, None]
        score_TE = tl.load(logits + start_T1 + e, mask=in_TE, other=float("-inf"))
        score_TE = 1.0 / (1.0 + tl.exp(-score_TE))
        grad_TE = tl.load(grad_share + share_at_T1 + e, mask=in_TE & counts_T1, other=0.0)
        total_T1 = (tl.sum(score_TE, axis=1) + TINY)[:, None]
        mean_T1 = tl.sum(grad_TE * score_TE, axis=1)[:, None] / total_T1
        grad_TE = (grad_TE - mean_T1) / total_T1 * score_TE * (1.0 - score_TE)
        share_TK = tl.load(grad_share + share_at_T1 + expert_TK, mask=there_TK & counts_T1, other=0.0)
        grad_TK += (share_TK - mean_T1) / total_T1
    tl.store(grad_logits + start_T1 + e, grad_TE, mask=in_TE)
    tl.debug_barrier()  # the next store goes over this one
    tl.store(grad_logits + start_T1 + expert_TK, grad_TK * score_TK * (1.0 - score_TK), mask=there_TK)


def ahead_of_time(every_candidate: bool = False) -> list[AheadOfTime]:
    """DeepSeek-V3's gate as policies train, with balance loss and replicas, and with given experts; and odd sizes."""
    specifications = []
    v3 = {**columns(256, 8), "KEPT": 4, "K": 8, "K_COLUMNS": 8}
    odd = {**columns(21, 7), "KEPT": 2, "K": 3, "K_COLUMNS": 4}
    optional = {"counted": "*i1", **dict.fromkeys(("sequence", "replay", "table", "count"), "*i64")}
    for name, sizes, given, wide in (
        ("V3", v3, ("counted",), True),
        ("V3, statistics, replicas", v3, ("counted", "sequence", "table", "count"), True),
        ("V3, replay", v3, ("counted", "replay"), False),  # gathers the given experts' logits
        ("odd", odd, ("counted", "sequence", "table", "count"), False),
    ):
        pointers = dict.fromkeys(("logits", "bias", "weight"), "*fp32")
        pointers |= dict.fromkeys(("expert", "slot", "load", "chosen", "share"), "*i64")
        pointers |= {key: optional[key] for key in given}
        absent = dict.fromkeys(optional.keys() - set(given))
        specifications += [
            AheadOfTime(
                name=f"grouped_topk.forward_kernel[{name}]",
                kernel=forward_kernel,
                types=pointers | {"T": "i32", "scale": "fp32", "R": "i32", "S": "i32"},
                constants=sizes | absent | {"NORMALISE": True},
                parameters=parameters,
                divisible_by_16=tuple(pointers),
                tensor_cores=False,
                wide_loads=wide,
            )
            for parameters in FORWARD.listed(every_candidate)
        ]
    shape = {"E": 256, "E_COLUMNS": 256, "K": 8, "K_COLUMNS": 8, "NORMALISE": True}
    shares = {"grad_share": "*fp32", "sequence": "*i64"}
    for name, more, tunable in (("V3", {}, BACKWARD), ("V3, statistics", shares, BACKWARD_OF_SHARES)):
        pointers = (
            dict.fromkeys(("grad_weight", "logits", "grad_logits"), "*fp32") | {"expert": "*i64"} | more
        )
        specifications += [
            AheadOfTime(
                name=f"grouped_topk.backward_kernel[{name}]",
                kernel=backward_kernel,
                types=pointers | {"T": "i32", "scale": "fp32", "S": "i32"},
                constants=shape | dict.fromkeys(shares.keys() - more.keys()),
                parameters=parameters,
                divisible_by_16=tuple(pointers),
                tensor_cores=False,
                wide_loads=bool(more),  # without shares only the chosen experts' logits are gathered
            )
            for parameters in tunable.listed(every_candidate)
        ]
    return specifications
