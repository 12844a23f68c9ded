"""Layers are dealt to pipeline stages by cost."""

from __future__ import annotations

import itertools
import random

import pytest
from tiny_models import DEEPSEEK_V3, QWEN2

from r1mega.bench.schedules import DEEPSEEK_V3_SHAPE
from r1mega.config import ParallelConfig
from r1mega.parallel.dualpipe import v_placement
from r1mega.parallel.stages import (
    GRAIN,
    LayerCosts,
    costs_of,
    divide,
    plan_stages,
    rank_of_stage,
    stage_costs,
)


def rank_costs(costs: LayerCosts, bounds, rank_of) -> list[float]:
    relative = stage_costs(costs, bounds)
    return [sum(c for c, r in zip(relative, rank_of) if r == rank) for rank in range(max(rank_of) + 1)]


@pytest.mark.parametrize("rank_of", [(0, 1), (0, 1, 2, 3), (0, 1, 0, 1), v_placement(2), v_placement(3)])
def test_the_dearest_rank_is_as_cheap_as_any_division_makes_it(rank_of) -> None:
    """Against all divisions, to the grain that the search has."""
    rng = random.Random(len(rank_of))
    stages, paired = len(rank_of), rank_of == v_placement(len(rank_of) // 2)
    for _ in range(10):
        layers = tuple(rng.uniform(0.5, 2.0) for _ in range(9))
        costs = LayerCosts(layers, first=rng.uniform(0, 1), last=rng.uniform(0, 3))
        bounds = divide(costs, rank_of)
        assert [layer for stage in bounds for layer in stage] == list(range(9))

        def dearest(bounds) -> float:
            return max(rank_costs(costs, bounds, rank_of) if paired else stage_costs(costs, bounds))  # noqa: B023

        best = min(
            dearest([range(a, b) for a, b in itertools.pairwise((0, *ends, 9))])
            for ends in itertools.combinations_with_replacement(range(10), stages - 1)
            if all(a < b for a, b in itertools.pairwise(ends))
        )
        assert dearest(bounds) <= best + GRAIN * (2 if paired else 1) + 1e-9


def test_deepseek_v3s_head_and_mtp_take_the_place_of_layers() -> None:
    placement = v_placement(16)
    costs = costs_of(DEEPSEEK_V3_SHAPE, mtp=True)
    ranks = rank_costs(costs, divide(costs, placement), placement)
    assert max(ranks) / 2 < 1.25
    naive = [range(round(i * 61 / 32), round((i + 1) * 61 / 32)) for i in range(32)]
    assert max(rank_costs(costs, naive, placement)) / 2 > 1.9


@pytest.mark.parametrize("schedule", ["dualpipev", "zb-v", "1f1b", "zb1p", "interleaved"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_layer_has_one_stage_and_every_stage_a_rank(schedule: str, ranks: int) -> None:
    parallel = ParallelConfig(
        pipeline=ranks,
        schedule=schedule,
        virtual_pipeline=2 if schedule == "interleaved" and ranks > 1 else 1,
    )
    for shape in (DEEPSEEK_V3 | {"num_hidden_layers": 9}, QWEN2 | {"num_hidden_layers": 6}):
        parts = plan_stages(shape, parallel, mtp=False)
        assert [layer for part in parts for layer in part.layers] == list(range(shape["num_hidden_layers"]))
        assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert all(part.layers for part in parts[1:-1])
        assert set(rank_of_stage(parallel)) == set(range(ranks))


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="8 stages of 3 layers"):
        divide(LayerCosts((1.0, 1.0, 1.0)), v_placement(4))
