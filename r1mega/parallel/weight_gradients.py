"""Weight gradients put off: a backward pass first gives the gradient of its input, and its weights' when there is time.

Zero-bubble schedules need that split (I and W of schedule.py). While a `WeightGradients` collects, the backward of a
linear layer or of grouped experts leaves a closure instead of its weight gradient; calling it adds to `main_grad`, where
Megatron's data-parallel buffers keep gradients. Norms, the router, MLA's down-projections, the embedding and the
vocabulary head are small or belong to one operation with their input's gradient: they are not put off.

Where Transformer Engine is, its own delayed weight gradients serve its layers (`delay_wgrad_compute`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_collector: WeightGradients | None = None
"""Of the backward pass under way. Not a thread's own: on a GPU autograd runs in threads of its own."""


class WeightGradients:
    """What one backward pass has put off."""

    def __init__(self, only: frozenset[int] | None = None) -> None:
        """only: ids of the weights whose gradients are put off; None: all that can be."""
        self._only = only
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def takes(self, weight: Tensor) -> bool:
        return hasattr(weight, "main_grad") and (self._only is None or id(weight) in self._only)

    def add(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        self._waiting.append((weight, gradient))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around a backward pass."""
        global _collector
        assert _collector is None, "two backward passes at once"
        _collector = self
        try:
            yield
        finally:
            _collector = None

    @torch.no_grad()
    def compute(self) -> None:
        """In the order in which they were put off; frees what they held."""
        waiting, self._waiting = self._waiting, []
        for weight, gradient in waiting:
            weight.main_grad.add_(gradient())  # type: ignore[attr-defined]


def collector_of(weight: Tensor) -> WeightGradients | None:
    """Who takes this weight's gradient now; None: compute it now."""
    return _collector if _collector is not None and _collector.takes(weight) else None


@functools.cache
def teach_megatron() -> None:
    """Let the backward of Megatron's own linear layers put off; call it once Megatron is prepared."""
    from megatron.core.tensor_parallel import layers

    linear = layers.LinearWithGradAccumulationAndAsyncCommunication
    backward_now = linear.backward

    def backward(ctx: object, output_gradient: Tensor) -> tuple:
        inputs, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        collector = collector_of(weight)
        if collector is None:
            return backward_now(ctx, output_gradient)
        group = ctx.tp_group  # type: ignore[attr-defined]
        sequence_parallel = ctx.sequence_parallel  # type: ignore[attr-defined]

        def weight_gradient() -> Tensor:
            whole = _gathered(inputs, group) if sequence_parallel else inputs
            return output_gradient.flatten(0, -2).t().matmul(whole.flatten(0, -2))

        input_gradient = output_gradient.matmul(weight)
        if ctx.allreduce_dgrad:  # type: ignore[attr-defined]
            torch.distributed.all_reduce(input_gradient, group=group)
        if sequence_parallel:
            part = torch.empty_like(inputs)
            torch.distributed.reduce_scatter_tensor(part, input_gradient.contiguous(), group=group)
            input_gradient = part
        has_bias = ctx.use_bias  # type: ignore[attr-defined]
        bias_gradient = output_gradient.flatten(0, -2).sum(dim=0) if has_bias else None
        collector.add(weight, weight_gradient)
        return (input_gradient, None, bias_gradient) + (None,) * 6

    linear.backward = staticmethod(backward)


def _gathered(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole
