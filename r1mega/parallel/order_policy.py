"""Orders from a policy: every free rank takes the cheapest of what it could do, by how long it would wait for it and
by a bias for each kind. The biases are searched by evolution. Compiled by numba.

A policy is an array of numbers: for each of three phases of a rank (no X yet; then; near its last forward of chunk 0)
and each kind two numbers, a bias and its slope along the ranks; then those named in SETTINGS. Biases are in units of
an overlapped action's duration. Legend as in order_anneal.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from r1mega.parallel.order_anneal import BACKWARD, FORWARD, NEVER, WEIGHTS, Array

KINDS = 12
"""Ten, W where memory forbids a forward, and a second X of the same kind."""
SETTINGS = 10
"""Forwards of chunk 1 before the first X and their slope; forwards of chunk 0 left in the last phase, and slope;
chunk 0's part of the memory, and slope; what chunk 0 leaves free; and the time until which a given order is
followed, and its slope."""
SIZE = 3 * KINDS * 2 + SETTINGS


@njit(nogil=True, cache=True)
def random_policy(ranks: int, follow: bool) -> Array:
    policy = np.zeros(SIZE)
    for phase in range(3):
        for kind in range(KINDS):
            at = (phase * KINDS + kind) * 2
            if kind < 4:
                policy[at] = np.random.uniform(-0.5, 0.6)
            elif kind < 6:
                policy[at] = np.random.uniform(0.1, 1.0)
            elif kind < 10:
                policy[at] = np.random.uniform(-1.5, 0.5)
            else:
                policy[at] = np.random.uniform(-0.5, 0.5)
            policy[at + 1] = np.random.normal() * 0.1
    settings = policy[3 * KINDS * 2 :]
    settings[0] = np.random.uniform(-0.6, 0.3)
    settings[1] = np.random.uniform(-0.5, 0.5)
    settings[2] = np.random.uniform(0.0, 1.5)
    settings[3] = np.random.uniform(-1.0, 1.0)
    settings[4] = np.random.uniform(-0.2, 0.3)
    settings[5] = np.random.uniform(0.0, 1.5)
    settings[6] = np.random.uniform(0.0, 4.0)
    settings[7] = np.random.uniform(0.3, 1.0) if follow else 0.0
    settings[8] = np.random.uniform(-0.3, 0.3) if follow else 0.0
    return policy


@njit(nogil=True, cache=True)
def follow_policy(
    policy: Array,
    orders: Array,
    lengths: Array,
    given: Array,
    given_starts: Array,
    given_lengths: Array,
    micro_batches: int,
    duration: Array,
    after: Array,
    hops: Array,
    limit: int,
) -> float:
    """Write the policy's order into `orders` and `lengths`; its makespan with prefetch, NEVER if it gets stuck."""
    ranks = orders.shape[0]
    last = 2 * ranks - 1
    settings = policy[3 * KINDS * 2 :]
    unit = duration[0, 6]
    arrives = np.zeros((2, last + 1, micro_batches))
    known = np.zeros((2, last + 1), np.int64)
    taken = np.zeros((2, last + 1), np.int64)
    weights = np.zeros((ranks, 2), np.int64)
    known[0, 0] = micro_batches
    held = np.zeros(ranks, np.int64)
    free = np.zeros(ranks)
    wake = np.zeros(ranks)
    done = np.zeros(ranks, np.int64)
    lengths[:] = 0
    latest = np.full(ranks, -1, np.int64)
    until = np.zeros(ranks)
    first_x = np.zeros(ranks)
    ending = np.zeros(ranks)
    most = np.zeros(ranks)
    extra = limit / 2 - (2 * ranks + 1)
    horizon = 0.0
    for rank in range(ranks):
        if given_lengths[rank]:
            horizon = max(horizon, given_starts[rank, given_lengths[rank] - 1])
    for rank in range(ranks):
        place = rank / max(1, ranks - 1) - 0.5
        first_x[rank] = round(ranks * (1 + settings[0] + settings[1] * place))
        ending[rank] = round(ranks * (settings[2] + settings[3] * place))
        part = 2 * ranks * (1 + settings[4]) - settings[5] * rank + extra
        most[rank] = max(1, min(limit // 2 - 1, round(part)))
        until[rank] = -1.0
        if settings[7] > 0.0:
            until[rank] = horizon - 4 * ranks * unit * max(0.0, 1 - settings[7] + settings[8] * place)
    arrival = np.zeros((2, 2))
    stages = np.zeros(2, np.int64)
    reserve = round(settings[6])
    for _ in range(60 * micro_batches * ranks):
        rank = 0
        now = wake[0]
        for other in range(1, ranks):
            if wake[other] < now:
                now = wake[other]
                rank = other
        if now >= NEVER:
            break
        stages[0], stages[1] = rank, last - rank
        n = lengths[rank]
        kind = -1
        start = NEVER
        blocked = False
        for chunk in range(2):
            stage = stages[chunk]
            arrival[0, chunk] = NEVER
            arrival[1, chunk] = NEVER
            if taken[1, stage] < known[1, stage]:
                arrival[1, chunk] = max(now, arrives[1, stage, taken[1, stage]])
            if taken[0, stage] < known[0, stage]:
                arrival[0, chunk] = max(now, arrives[0, stage, taken[0, stage]])
        if n < given_lengths[rank] and given_starts[rank, n] < until[rank]:
            kind = given[rank, n]
            start = now
            if FORWARD[kind] >= 0:
                start = max(start, arrival[0, FORWARD[kind]])
            if BACKWARD[kind] >= 0:
                start = max(start, arrival[1, BACKWARD[kind]])
            if start >= NEVER:
                kind = -1
        else:
            room = limit - held[rank]
            if room < 2 and arrival[0, 1] < NEVER:
                blocked = True
                arrival[0, 1] = NEVER
            if room < 2:
                arrival[0, 0] = NEVER
            elif arrival[0, 0] < NEVER:
                if room < 2 + reserve:
                    blocked = True
                    arrival[0, 0] = NEVER
                elif taken[0, rank] - taken[1, rank] >= most[rank]:
                    arrival[0, 0] = NEVER
            if taken[0, rank] >= micro_batches - ending[rank]:
                phase = 2
            elif taken[0, last - rank] < first_x[rank]:
                phase = 0
            else:
                phase = 1
            place = rank / max(1, ranks - 1) - 0.5
            best = NEVER
            for candidate in range(10):
                forward, backward = FORWARD[candidate], BACKWARD[candidate]
                begins = now
                if forward >= 0:
                    begins = max(begins, arrival[0, forward])
                if backward >= 0:
                    begins = max(begins, arrival[1, backward])
                row = candidate
                if candidate == 4 or candidate == 5:
                    chunk = candidate - 4
                    if weights[rank, chunk] >= taken[1, stages[chunk]]:
                        continue
                    if blocked:
                        row = 10
                if begins >= NEVER:
                    continue
                at = (phase * KINDS + row) * 2
                cost = begins + unit * (policy[at] + policy[at + 1] * place)
                if candidate > 5 and candidate == latest[rank]:
                    at = (phase * KINDS + 11) * 2
                    cost += unit * (policy[at] + policy[at + 1] * place)
                if cost < best:
                    best = cost
                    kind = candidate
                    start = begins
        if kind < 0:
            wake[rank] = NEVER
            continue
        if start > now:
            wake[rank] = start
            continue
        end = now + duration[rank, kind]
        leaves = end - after[rank, kind]
        orders[rank, n] = kind
        lengths[rank] += 1
        if kind > 5:
            latest[rank] = kind
        chunk = FORWARD[kind]
        if chunk >= 0:
            stage = stages[chunk]
            m = taken[0, stage]
            taken[0, stage] += 1
            held[rank] += 2
            if stage == last:
                arrives[1, last, m] = end
                known[1, last] += 1
            else:
                arrives[0, stage + 1, m] = leaves + hops[0, stage + 1]
                known[0, stage + 1] += 1
                other = min(stage + 1, last - stage - 1)
                wake[other] = min(wake[other], max(now, free[other]))
        chunk = BACKWARD[kind]
        if chunk >= 0:
            stage = stages[chunk]
            m = taken[1, stage]
            taken[1, stage] += 1
            held[rank] -= 1
            if stage > 0:
                arrives[1, stage - 1, m] = leaves + hops[1, stage - 1]
                known[1, stage - 1] += 1
                other = min(stage - 1, last - stage + 1)
                wake[other] = min(wake[other], max(now, free[other]))
        chunk = WEIGHTS[kind]
        if chunk >= 0:
            held[rank] -= 1
            weights[rank, chunk] += 1
            done[rank] += 1
        free[rank] = end
        wake[rank] = end if done[rank] < 2 * micro_batches else NEVER
    for rank in range(ranks):
        if done[rank] < 2 * micro_batches:
            return NEVER
    return free.max()


@njit(nogil=True, cache=True)
def evolve(
    given: Array,
    given_starts: Array,
    given_lengths: Array,
    micro_batches: int,
    duration: Array,
    after: Array,
    hops: Array,
    limit: int,
    trials: int,
    follow: bool,
    keep: int,
    seed: int,
) -> tuple[Array, Array]:
    """(policies [keep, SIZE], makespans), best first, no two makespans alike; NEVER where there are fewer.

    follow: policies that follow the given order until some time of their own.
    """
    np.random.seed(seed)
    ranks = given.shape[0]
    orders = np.zeros((ranks, 6 * micro_batches), np.int8)
    lengths = np.zeros(ranks, np.int64)
    policies = np.zeros((keep, SIZE))
    makespans = np.full(keep, NEVER)
    for trial in range(trials):
        if trial < trials // 8 or makespans[0] >= NEVER:
            policy = random_policy(ranks, follow)
        else:
            parent = min(int(np.random.exponential(2.0)), keep - 1)
            while makespans[parent] >= NEVER:
                parent -= 1
            policy = policies[parent].copy()
            fresh = random_policy(ranks, follow)
            share = 0.02 + 0.25 * np.random.random() ** 2
            width = 0.3 * np.random.random()
            for k in range(SIZE):
                if np.random.random() < share:
                    if np.random.random() < 0.15:
                        policy[k] = fresh[k]
                    elif policy[k] != 0.0:
                        policy[k] += np.random.normal() * width * (4.0 if k == SIZE - SETTINGS + 6 else 1.0)
        makespan = follow_policy(
            policy,
            orders,
            lengths,
            given,
            given_starts,
            given_lengths,
            micro_batches,
            duration,
            after,
            hops,
            limit,
        )
        if makespan >= makespans[keep - 1]:
            continue
        at = 0
        while at < keep and makespans[at] < makespan - 1e-9:
            at += 1
        if makespans[at] < makespan + 1e-9:
            policies[at] = policy  # as good: drift
            continue
        for k in range(keep - 1, at, -1):
            policies[k] = policies[k - 1]
            makespans[k] = makespans[k - 1]
        policies[at] = policy
        makespans[at] = makespan
    return policies, makespans
