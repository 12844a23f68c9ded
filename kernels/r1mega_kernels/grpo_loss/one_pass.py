"""The loss and its gradients in one pass over the tokens, with three matrix products: logits, d_hidden, d_weight.

A chunk of tokens gets its logits over the whole vocabulary, in float32, and with them its log-probs; the objective
then says which rows have a gradient. Only those go into a window of d_logits, in hidden's dtype. When the
window is full it turns into its rows of d_hidden and is added to d_weight, which so is read and written once a
window and not once a chunk. Rows whose gradient is exactly zero cost the first product and nothing else.

Dims: T tokens that count, R of a chunk, K of a window, V rows of this vocabulary shard, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega_kernels.grpo_loss.logit_rows import logit_gradient_rows, softmax_rows
from r1mega_kernels.grpo_loss.objective import Objective, Tokens
from r1mega_kernels.linear_logprob.rows import LogitGradient, SoftmaxPartials

WORKSPACE_BYTES = 2**30
"""Of a GPU's memory: logits, window and what goes with them, a quarter for the chunk."""
TILE_ROWS = 128
"""A chunk and a window are multiples of it where they are larger: whole tiles of a matrix product."""
CPU_CHUNK_LOGITS = 2**19
"""2 MiB of logits (logit_rows.py goes through them in pieces) ..."""
CPU_CHUNK_ROWS = 256
"""... and more where so few rows would share one pass over a large vocabulary that the product becomes slow."""


@dataclass(frozen=True)
class Plan:
    """Rows held at once."""

    chunk: int
    """Of logits."""
    window: int
    """Of d_logits; at least a chunk."""

    def bytes(self, num_rows: int, hidden_size: int, element_size: int, compute_size: int = 4) -> int:
        """Held at most, beside inputs, results and vectors [T]."""
        chunk, window = _bytes_of_rows(num_rows, hidden_size, element_size, compute_size)
        return self.chunk * chunk + self.window * window


def plan_of(num_tokens: int, num_rows: int, hidden_size: int, element_size: int, device: str) -> Plan:
    """element_size: bytes of hidden's dtype. A GPU's plan stays within WORKSPACE_BYTES, if four rows of each do."""
    num_tokens, num_rows = max(1, num_tokens), max(1, num_rows)
    if device == "cpu":
        chunk = min(num_tokens, max(CPU_CHUNK_ROWS, CPU_CHUNK_LOGITS // num_rows))
        return Plan(chunk, chunk)
    of_chunk, of_window = _bytes_of_rows(num_rows, hidden_size, element_size, 4)
    chunk = max(1, min(num_tokens, _whole_tiles(WORKSPACE_BYTES // 4 // of_chunk)))
    window = min(num_tokens, _whole_tiles((WORKSPACE_BYTES - chunk * of_chunk) // of_window))
    return Plan(chunk, max(chunk, window))


def _bytes_of_rows(num_rows: int, hidden_size: int, element_size: int, compute_size: int) -> tuple[int, int]:
    """(a chunk's: logits and hidden; a window's: d_logits, hidden in parts and joined, d_hidden in float32 and rounded)."""
    return (
        num_rows * compute_size + hidden_size * element_size,
        num_rows * element_size + hidden_size * (3 * element_size + compute_size),
    )


def _whole_tiles(rows: int) -> int:
    return rows // TILE_ROWS * TILE_ROWS or rows


@dataclass(frozen=True)
class Results:
    """Of all tokens; zeros where none was computed."""

    loss: Tensor
    """float64 scalar."""
    logprobs_T: Tensor
    entropy_T: Tensor
    d_hidden_TD: Tensor | None
    """This shard's part."""


def run(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    tokens: Tokens,
    objective: Objective,
    temperature: float,
    group: dist.ProcessGroup | None,
    *,
    needs_hidden: bool,
    d_weight_VD: Tensor | None,
) -> Results:
    """targets_T count from the shard's first row. d_weight_VD: added to; None where it is not needed."""
    if hidden_TD.device.type != "cpu":  # Triton is absent where there is no GPU
        from r1mega_kernels.grpo_loss import kernel  # noqa: F401 (the operators' kernels)

    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    # A CPU multiplies in float32 whatever the inputs are; a GPU's products of bfloat16 are exact and add in float32.
    operand = dtype if hidden_TD.device.type == "cpu" else hidden_TD.dtype
    weight_VD = weight_VD.to(operand)
    numbers_N = tokens.mask_T.nonzero().squeeze(1)
    whole = len(numbers_N) == len(hidden_TD)
    num_rows, hidden_size = weight_VD.shape
    plan = plan_of(
        len(numbers_N),
        _most_rows(num_rows, group, hidden_TD.device),
        hidden_size,
        weight_VD.element_size(),
        hidden_TD.device.type,
    )
    logits_RV = hidden_TD.new_empty(plan.chunk, num_rows, dtype=dtype)
    loss = hidden_TD.new_zeros((), dtype=torch.float64)
    logprobs_T, entropy_T = hidden_TD.new_zeros(2, len(hidden_TD), dtype=dtype).unbind(0)
    d_hidden_TD = None
    if needs_hidden:
        d_hidden_TD = torch.empty_like(hidden_TD) if whole else torch.zeros_like(hidden_TD)
    needs_gradient = needs_hidden or d_weight_VD is not None
    window = _Window(plan.window, weight_VD, d_hidden_TD, d_weight_VD) if needs_gradient else None
    for start in range(0, len(numbers_N), plan.chunk):
        numbers_R = numbers_N[start : start + plan.chunk]
        part_RD = hidden_TD[start : start + plan.chunk] if whole else hidden_TD.index_select(0, numbers_R)
        hidden_RD = part_RD.to(operand)
        targets_R, chunk_RV = targets_T.index_select(0, numbers_R), logits_RV[: len(numbers_R)]
        _product(hidden_RD, weight_VD.T, out=chunk_RV)
        partials = SoftmaxPartials(*softmax_rows(chunk_RV, targets_R, 1 / temperature).unbind(0))
        logprobs_R, entropy_R, lse_R = partials.merged_over(group).finish()
        logprobs_T.index_copy_(0, numbers_R, logprobs_R)
        entropy_T.index_copy_(0, numbers_R, entropy_R)
        loss_R, slope_R, entropy_slope_R = objective.loss_and_slopes(
            logprobs_R, entropy_R, tokens.at(numbers_R)
        )
        loss += loss_R.sum(dtype=torch.float64)
        if window is not None:
            gradient = LogitGradient.of(slope_R.to(dtype), entropy_slope_R, lse_R, entropy_R, temperature)
            window.add(_Chunk(numbers_R, hidden_RD, chunk_RV, targets_R), gradient, 1 / temperature)
    if window is not None:
        window.flush()
    return Results(loss, logprobs_T, entropy_T, d_hidden_TD)


def _most_rows(num_rows: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Of the group's shards, which uneven splits and padding make unequal: all must take the same chunks of tokens,
    because they merge each."""
    if group is None or group.size() == 1:
        return num_rows
    most = torch.tensor(num_rows, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)


@dataclass(frozen=True)
class _Chunk:
    numbers_R: Tensor
    """int64: which tokens they are."""
    hidden_RD: Tensor
    logits_RV: Tensor
    targets_R: Tensor


class _Window:
    """d_logits of rows from several chunks, on their way into d_hidden and d_weight."""

    def __init__(
        self, size: int, weight_VD: Tensor, d_hidden_TD: Tensor | None, d_weight_VD: Tensor | None
    ) -> None:
        self._weight_VD, self._d_hidden_TD, self._d_weight_VD = weight_VD, d_hidden_TD, d_weight_VD
        self._d_logits_KV = weight_VD.new_empty(size, len(weight_VD))
        self._hidden: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._used = 0

    def add(self, chunk: _Chunk, gradient: LogitGradient, inverse_temperature: float) -> None:
        """The chunk's rows that have a gradient; NaN is one."""
        entropy_R, targets_K = gradient.entropy_T, chunk.targets_R
        last_R = torch.zeros_like(gradient.lse_T) if entropy_R is None else entropy_R
        coefficients_4K = torch.stack([gradient.lse_T, gradient.target_T, gradient.softmax_T, last_R])
        alive_R = (gradient.target_T != 0) | (last_R != 0)
        alive_K, hidden_KD, numbers_K = alive_R.nonzero().squeeze(1), chunk.hidden_RD, chunk.numbers_R
        if len(alive_K) < len(alive_R):
            hidden_KD, numbers_K = hidden_KD.index_select(0, alive_K), numbers_K.index_select(0, alive_K)
            targets_K = targets_K.index_select(0, alive_K)
            coefficients_4K = coefficients_4K.index_select(1, alive_K)
            if self._d_hidden_TD is not None:
                self._d_hidden_TD.index_fill_(0, chunk.numbers_R, 0)
        if self._used + len(alive_K) > len(self._d_logits_KV):
            self.flush()
        place = slice(self._used, self._used + len(alive_K))
        logit_gradient_rows(
            chunk.logits_RV,
            alive_K,
            targets_K,
            coefficients_4K,
            inverse_temperature,
            entropy_R is not None,
            self._d_logits_KV[place],
        )
        self._hidden.append(hidden_KD)
        self._numbers.append(numbers_K)
        self._used = place.stop

    def flush(self) -> None:
        if self._used:
            d_logits_KV, numbers_K = self._d_logits_KV[: self._used], _joined(self._numbers)
            if self._d_hidden_TD is not None:
                self._write_d_hidden(self._d_hidden_TD, d_logits_KV, numbers_K)
            if self._d_weight_VD is not None:
                _add_product(self._d_weight_VD, d_logits_KV.T, _joined(self._hidden))
        self._used = 0
        self._hidden.clear()
        self._numbers.clear()

    def _write_d_hidden(self, d_hidden_TD: Tensor, d_logits_KV: Tensor, numbers_K: Tensor) -> None:
        if d_hidden_TD.device.type == "cpu" and d_hidden_TD.dtype == d_logits_KV.dtype:
            first, last = int(numbers_K[0]), int(numbers_K[-1])
            if last - first + 1 == len(numbers_K):  # a run of tokens needs no copy
                torch.mm(d_logits_KV, self._weight_VD, out=d_hidden_TD[first : last + 1])
                return
        d_hidden_TD.index_copy_(0, numbers_K, _product(d_logits_KV, self._weight_VD).to(d_hidden_TD.dtype))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with exact products and float32 sums (float64 for float64 inputs)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, torch.float32, out=out) if out is not None else torch.mm(a, b, torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.dtype == torch.float64:
        total.add_(a @ b)
    else:
        torch.addmm(total, a, b, torch.float32, out=total)
