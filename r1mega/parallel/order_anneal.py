"""A fast simulator of one rank's letters after another, and simulated annealing of an order with it; compiled by numba.

An order of the V placement is an array of kinds for each rank; micro-batches need no mention, because each stage takes
its own one after the other. Rank r has the stages r (chunk 0) and 2P-1-r (chunk 1). Kind 0, 1: F of chunk 0, 1;
2, 3: I; 4, 5: W; 6 ... 9: X, see FORWARD and BACKWARD. A whole backward is I and W, which is never slower.

Legend: P ranks, S = 2P stages, M micro-batches; orders [P, 6M] int8, lengths [P]; held and limit count half
activations of a stage, that is quarters of peak_activations' unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]

FORWARD = np.array([0, 1, -1, -1, -1, -1, 0, 1, 0, 1])
"""Of each kind: the chunk that goes forward, or -1."""
BACKWARD = np.array([-1, -1, 0, 1, -1, -1, 1, 0, 0, 1])
WEIGHTS = np.array([-1, -1, -1, -1, 0, 1, 1, 0, 0, 1])
OVERLAPPED = np.array([[8, 6], [7, 9]])
"""The kind X of [chunk that goes forward, chunk that goes backward]."""
NEVER = 1e18


@njit(nogil=True, cache=True)
def simulate_kinds(
    orders: Array,
    lengths: Array,
    micro_batches: int,
    duration: Array,
    after: Array,
    hops: Array,
    prefetch: bool,
) -> tuple[float, float]:
    """(makespan, mean end of a rank) by the rules of simulator.simulate, to the bit; NEVER if it waits for ever.

    duration, after [P, 10]: of each kind, and what it computes after it has sent. hops [2, S]: before the forward and
    the backward of a stage.
    """
    ranks = orders.shape[0]
    last = 2 * ranks - 1
    sent = np.zeros((2, last + 1, micro_batches))
    known = np.zeros((2, last + 1), np.int64)
    taken = np.zeros((2, last + 1), np.int64)
    known[0, 0] = micro_batches
    position = np.zeros(ranks, np.int64)
    free = np.zeros(ranks)
    left = lengths.sum()
    moved = True
    down = True
    while moved and left > 0:
        moved = False
        for turn in range(ranks):
            rank = turn if down else ranks - 1 - turn
            while position[rank] < lengths[rank]:
                kind = orders[rank, position[rank]]
                start = free[rank]
                waits = False
                for way in range(2):
                    chunk = FORWARD[kind] if way == 0 else BACKWARD[kind]
                    if chunk >= 0:
                        stage = last - rank if chunk else rank
                        n = taken[way, stage]
                        if n >= known[way, stage]:
                            waits = True
                            break
                        came = sent[way, stage, n]
                        if hops[way, stage] > 0.0:
                            if not prefetch:
                                came = max(came, free[rank])
                            came += hops[way, stage]
                        start = max(start, came)
                if waits:
                    break
                end = start + duration[rank, kind]
                leaves = end - after[rank, kind]
                chunk = FORWARD[kind]
                if chunk >= 0:
                    stage = last - rank if chunk else rank
                    n = taken[0, stage]
                    taken[0, stage] += 1
                    if stage == last:
                        known[1, last] += 1  # a loss is local: its gradient is there at once
                    else:
                        sent[0, stage + 1, n] = leaves
                        known[0, stage + 1] += 1
                chunk = BACKWARD[kind]
                if chunk >= 0:
                    stage = last - rank if chunk else rank
                    n = taken[1, stage]
                    taken[1, stage] += 1
                    if stage > 0:
                        sent[1, stage - 1, n] = leaves
                        known[1, stage - 1] += 1
                free[rank] = end
                position[rank] += 1
                left -= 1
                moved = True
        down = not down
    if left > 0:
        return NEVER, NEVER
    return free.max(), free.mean()


@njit(nogil=True, cache=True)
def legal(kinds: Array, length: int, limit: int) -> bool:
    """Memory is kept, and no W comes before its I."""
    held = 0
    waiting = np.zeros(2, np.int64)
    for position in range(length):
        kind = kinds[position]
        if FORWARD[kind] >= 0:
            held += 2
            if held > limit:
                return False
        if BACKWARD[kind] >= 0:
            held -= 1
            waiting[BACKWARD[kind]] += 1
        chunk = WEIGHTS[kind]
        if chunk >= 0:
            held -= 1
            waiting[chunk] -= 1
            if waiting[chunk] < 0:
                return False
    return True


@njit(nogil=True, cache=True)
def _take(kinds: Array, length: int, at: int) -> int:
    for position in range(at, length - 1):
        kinds[position] = kinds[position + 1]
    return length - 1


@njit(nogil=True, cache=True)
def _put(kinds: Array, length: int, at: int, kind: int) -> int:
    at = min(at, length)
    for position in range(length, at, -1):
        kinds[position] = kinds[position - 1]
    kinds[at] = kind
    return length + 1


@njit(nogil=True, cache=True)
def _find(kinds: Array, length: int, kind: int, at: int) -> int:
    for position in range(at, length):
        if kinds[position] == kind:
            return position
    return -1


@njit(nogil=True, cache=True)
def _steps(mean: float) -> int:
    return int(np.random.exponential(mean))


@njit(nogil=True, cache=True)
def _split(kinds: Array, length: int, at: int, forward_first: bool, later: int) -> int:
    """An X becomes F, I, and W after `later` others."""
    forward, backward = FORWARD[kinds[at]], BACKWARD[kinds[at]]
    kinds[at] = forward if forward_first else 2 + backward
    length = _put(kinds, length, at + 1, 2 + backward if forward_first else forward)
    return _put(kinds, length, at + 2 + later, 4 + backward)


@njit(nogil=True, cache=True)
def _merge(kinds: Array, length: int, at: int, other: int) -> int:
    """The F and the I at two places become an X at the first named, which takes the next W; -1 if there is none."""
    forward_at, backward_at = (at, other) if kinds[at] < 2 else (other, at)
    forward, backward = kinds[forward_at], kinds[backward_at] - 2
    weights_at = _find(kinds, length, 4 + backward, backward_at)
    if weights_at < 0:
        return -1
    kinds[at] = OVERLAPPED[forward, backward]
    length = _take(kinds, length, max(other, weights_at))
    return _take(kinds, length, min(other, weights_at))


@njit(nogil=True, cache=True)
def _is_partner(kind: int, other: int) -> bool:
    return other in (2, 3) if kind < 2 else other < 2


@njit(nogil=True, cache=True)
def change_rank(kinds: Array, length: int) -> int:
    """One random change of one rank's order, in place; its new length, or -1 if the change drawn does not exist."""
    what = np.random.random()
    at = np.random.randint(length)
    kind = kinds[at]
    if what < 0.45:  # elsewhere
        step = 1 + _steps(2.8)
        to = at + step if np.random.random() < 0.5 else at - step
        if to < 0 or to >= length or kinds[to] == kind:
            return -1
        return _put(kinds, _take(kinds, length, at), to, kind)
    if what < 0.70:
        if kind > 3:
            return -1
        other = at + np.random.randint(-8, 9)
        if other < 0 or other >= length or not _is_partner(kind, kinds[other]):
            return -1
        return _merge(kinds, length, at, other)
    if what < 0.90:
        if kind < 6:
            return -1
        if what < 0.80:
            return _split(kinds, length, at, np.random.random() < 0.5, _steps(3.3))
        forward, backward = FORWARD[kind], BACKWARD[kind]
        other = at + np.random.randint(-10, 11)  # another partner
        if other < 0 or other >= length or kinds[other] > 3:
            return -1
        if kinds[other] < 2:
            kinds[at] = forward
            kinds[other] = OVERLAPPED[kinds[other], backward]
            return length
        chunk = kinds[other] - 2
        weights_at = _find(kinds, length, 4 + chunk, other)
        if weights_at < 0:
            return -1
        kinds[at] = 2 + backward
        kinds[other] = OVERLAPPED[forward, chunk]
        kinds[weights_at] = 4 + backward
        return length
    other = at + 1 + _steps(3.3)
    if other >= length or kinds[other] == kind:
        return -1
    kinds[at], kinds[other] = kinds[other], kind
    return length


@njit(nogil=True, cache=True)
def _change_of(
    kinds: Array, length: int, what: int, table: Array, chunk: int, nth: int, step: int, later: int
) -> int:
    """Move, split or merge the nth task of a chunk (table: FORWARD or BACKWARD); -1 if that does not exist."""
    at = -1
    for position in range(length):
        if table[kinds[position]] == chunk:
            if nth == 0:
                at = position
                break
            nth -= 1
    if at < 0:
        return -1
    kind = kinds[at]
    if what == 0:
        if at + step < 0 or at + step >= length:
            return -1
        return _put(kinds, _take(kinds, length, at), at + step, kind)
    if what == 1:
        return _split(kinds, length, at, step > 0, later) if kind > 5 else -1
    if kind > 3:
        return -1
    other = at
    for _ in range(8):
        other += 1 if step > 0 else -1
        if other < 0 or other >= length:
            return -1
        if _is_partner(kind, kinds[other]):
            return _merge(kinds, length, at, other)
    return -1


@njit(nogil=True, cache=True)
def anneal(
    orders: Array,
    lengths: Array,
    micro_batches: int,
    duration: Array,
    after: Array,
    hops: Array,
    prefetch: bool,
    limit: int,
    trials: int,
    hot: float,
    cold: float,
    waves: float,
    spread: float,
    seed: int,
) -> float:
    """The best order seen replaces `orders` and `lengths`; its makespan.

    What falls is the makespan plus `spread` times the ranks' mean end. hot, cold: first and last temperature. waves:
    share of the changes that are made to the same task in several ranks, as they meet it.
    """
    np.random.seed(seed)
    ranks, room = orders.shape
    now, now_lengths = orders.copy(), lengths.copy()
    before, before_lengths = orders.copy(), lengths.copy()
    best, mean = simulate_kinds(now, now_lengths, micro_batches, duration, after, hops, prefetch)
    cost = best + spread * mean
    for trial in range(trials):
        temperature = hot * (cold / hot) ** (trial / trials)
        first = np.random.randint(ranks)
        final = first
        changed = False
        if np.random.random() < waves:
            what, way, chunk = np.random.randint(3), np.random.randint(2), np.random.randint(2)
            step = (1 + _steps(2.0)) * (1 if np.random.random() < 0.5 else -1)
            later, times = _steps(4.0), 1 + _steps(2.8)
            nth = np.random.randint(micro_batches)
            slope = 0 if np.random.random() < 0.5 else np.random.randint(-1, 2)
            final = ranks - 1 if np.random.random() < 0.3 else min(ranks - 1, first + _steps(4.0))
            if np.random.random() < 0.2:
                first = 0
            table = FORWARD if way == 0 else BACKWARD
            fits = True
            for rank in range(first, final + 1):
                before[rank], before_lengths[rank] = now[rank], now_lengths[rank]
            for rank in range(first, final + 1):
                length = now_lengths[rank]
                for k in range(times):
                    task = nth + k + slope * (rank - first)
                    if task < 0 or task >= micro_batches or length + 2 > room:
                        continue
                    done = _change_of(now[rank], length, what, table, chunk, task, step, later)
                    if done > 0:
                        length = done
                        changed = True
                now_lengths[rank] = length
                if not legal(now[rank], length, limit):
                    fits = False
                    final = rank
                    break
            if not fits:
                for rank in range(first, final + 1):
                    now[rank], now_lengths[rank] = before[rank], before_lengths[rank]
                continue
        else:
            before[first], before_lengths[first] = now[first], now_lengths[first]
            length = change_rank(now[first], now_lengths[first])
            if length < 0 or not legal(now[first], length, limit):
                now[first] = before[first]
                continue
            now_lengths[first] = length
            changed = True
        if not changed:
            continue
        makespan, mean = simulate_kinds(now, now_lengths, micro_batches, duration, after, hops, prefetch)
        then = makespan + spread * mean
        if makespan < NEVER and (then <= cost or np.random.random() < np.exp((cost - then) / temperature)):
            cost = then
            if makespan < best - 1e-9:
                best = makespan
                orders[:], lengths[:] = now, now_lengths
        else:
            for rank in range(first, final + 1):
                now[rank], now_lengths[rank] = before[rank], before_lengths[rank]
    return best
