"""How much each expert has to do: the load of the last steps, as the routers count it for their biases.

A router counts the tokens of a step that chose each of its experts (padding and recomputation left out); the optimizer
step zeroes the counts. Shares of a step's tokens are averaged over the window, so that every step counts alike.

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
    """The last `window` steps of the stages of this process."""

    def __init__(self, stages: Iterable[torch.nn.Module], window: int, group: Any) -> None:
        """group: the ranks that have different tokens for the same layers (tensor, context and data ranks)."""
        if window < 1:
            raise ValueError(f"a window of {window} steps: take at least 1")
        self.routers, self.group = routers_of(stages), group
        self._steps: deque[Tensor] = deque(maxlen=window)

    def observe(self) -> None:
        """Take in a step's counts. Collective; between its last forward pass and its optimizer step."""
        if not self.routers:
            return
        counts_LE = torch.stack([router.local_tokens_per_expert for router in self.routers]).long()
        dist.all_reduce(counts_LE, group=self.group)  # whole numbers: the same in every rank
        total_L1 = counts_LE.sum(dim=1, keepdim=True)
        self._steps.append(counts_LE.double().cpu() / total_L1.cpu().clamp(min=1))

    def shares_LE(self) -> Tensor:
        """float64, on the CPU: each expert's share of its layer's load; the same for all before the first step."""
        if not self._steps:
            experts = self.routers[0].local_tokens_per_expert.numel() if self.routers else 1
            return torch.full((len(self.routers), experts), 1.0 / experts, dtype=torch.float64)
        return torch.stack(list(self._steps)).mean(dim=0)
