"""The window of expert loads, and placements that do not fit a model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_models import DEEPSEEK_V3, mesh_of

from r1mega.config import ModelConfig, ParallelConfig
from r1mega_kernels.eplb import rebalance_experts


def test_passes_count_alike_and_old_ones_leave_the_window():
    with mesh_of(ParallelConfig()):
        from r1mega.models.expert_load import ExpertLoad, routers_of
        from r1mega.models.hot_experts import replicated_experts
        from r1mega.models.language_model import build_model

        model = build_model(
            DEEPSEEK_V3, ModelConfig(dtype="float32", init="random"), ParallelConfig(), seed=5
        )
        load = ExpertLoad([model], window=2, group=dist.group.WORLD)
        assert torch.equal(load.shares_LE(), torch.full((2, 8), 1 / 8, dtype=torch.float64))
        for counts in ([8, 0, 0, 0, 0, 0, 0, 0], [0, 100, 300, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 1]):
            for router in routers_of([model]):
                router.seen_E += torch.tensor(counts)
            load.observe()
        load.observe()  # nothing was seen since
        expected = torch.tensor([0, 1 / 8, 3 / 8, 1 / 4, 0, 0, 0, 1 / 4], dtype=torch.float64)
        assert torch.equal(load.shares_LE(), expected.expand(2, -1))
        with pytest.raises(ValueError, match="a window of 0 passes"):
            ExpertLoad([model], window=0, group=dist.group.WORLD)
        placement = rebalance_experts(torch.ones(3, 8), 8, 1, 1, 1)
        with (
            pytest.raises(ValueError, match="a placement of 3 layers for 2 expert layers"),
            replicated_experts([model], placement),
        ):
            pass
