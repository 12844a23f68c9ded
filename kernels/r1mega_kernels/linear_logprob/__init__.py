from __future__ import annotations

from torch import Tensor

from r1mega_kernels.linear_logprob.reference import linear_logprob_reference

__all__ = ["linear_logprob", "linear_logprob_reference"]


def linear_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0, group=None,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor]:
    if group is not None and group.size() > 1:
        raise NotImplementedError("vocabulary-parallel linear_logprob")
    return linear_logprob_reference(hidden_TD, weight_VD, targets_T, temperature=temperature)
