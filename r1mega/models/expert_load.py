"""How much each expert has to do: the load of the last passes, forward or forward and backward, as the routers see it.

Padding is left out; recomputation counts a token again, of every expert alike. Shares of a pass's tokens are averaged over
the window, so that every pass counts alike.

Dims: L layers with experts of this process, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.models.experts import GroupLimitedRouter


def routers_of(stages: Iterable[torch.nn.Module]) -> list[GroupLimitedRouter]:
    """In the order of the layers."""
    return [part for stage in stages for part in stage.modules() if isinstance(part, GroupLimitedRouter)]


class ExpertLoad:
    """The last `window` passes through the stages of this process."""

    def __init__(self, stages: Iterable[torch.nn.Module], window: int, group: Any) -> None:
        """group: the ranks that have different tokens for the same layers (tensor, context and data ranks)."""
        if window < 1:
            raise ValueError(f"a window of {window} passes: take at least 1")
        self.routers, self.group = routers_of(stages), group
        for router in self.routers:
            router.seen_E = torch.zeros_like(router.local_tokens_per_expert, dtype=torch.int64)
        self._passes: deque[Tensor] = deque(maxlen=window)

    def observe(self) -> None:
        """Take in what was seen since the last call, if anything. Collective."""
        if not self.routers:
            return
        seen = [router.seen_E for router in self.routers if router.seen_E is not None]
        counts_LE = torch.stack(seen)
        for counter in seen:
            counter.zero_()
        dist.all_reduce(counts_LE, group=self.group)  # whole numbers: the same in every rank
        total_L1 = counts_LE.sum(dim=1, keepdim=True).cpu()
        if total_L1.any():
            self._passes.append(counts_LE.double().cpu() / total_L1.clamp(min=1))

    def shares_LE(self) -> Tensor:
        """float64, on the CPU: each expert's share of its layer's load; the same for all before the first pass."""
        if not self._passes:
            experts = self.routers[0].local_tokens_per_expert.numel() if self.routers else 1
            return torch.full((len(self.routers), experts), 1.0 / experts, dtype=torch.float64)
        return torch.stack(list(self._passes)).mean(dim=0)
