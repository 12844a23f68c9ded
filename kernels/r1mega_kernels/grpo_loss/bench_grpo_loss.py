"""grpo_loss, forward and backward, beside its floor and its peers.

    python -m r1mega_kernels.grpo_loss.bench_grpo_loss [--device cpu|cuda] [--json FILE]

Correctness first: results and gradients are compared with the float64 reference on the first rows before anything is
timed. Providers take turns on fresh random data. floor: three bare products (logits, d_hidden, d_weight); four: one more,
what a backward that recomputes logits cannot undercut. linear_logprob: this project's own four-product path with autograd
through the log-probs. megatron, cut-cross-entropy: theirs, with the same loss behind it.

alive: share of rows that have a gradient; of the others half do not count and half have advantage 0.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega_kernels.bench import Measured, Trial, compiled, main, of_peak, peers, take_turns
from r1mega_kernels.grpo_loss import Objective, Tokens, grpo_loss, grpo_loss_reference
from r1mega_kernels.grpo_loss.logit_rows import logit_gradient_rows, softmax_rows
from r1mega_kernels.grpo_loss.objective import MAX_LOG_RATIO
from r1mega_kernels.grpo_loss.one_pass import plan_of
from r1mega_kernels.linear_logprob import linear_logprob
from r1mega_kernels.linear_logprob.bench_linear_logprob import (
    LOGPROB_ERROR,
    Op,
    differentiable_peers,
    only_logprobs,
)

SHAPES = {
    "cpu": [(4096, 128, 64), (8192, 128, 256), (1024, 32768, 256)],
    "cuda": [(8192, 129280, 7168), (32768, 129280, 7168), (8192, 16160, 7168), (32768, 16160, 7168)],
}
"""T, V, D. cpu: tiny models, and one vocabulary of usual size; cuda: DeepSeek-V3's head, whole and its TP8 shard."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ALIVE = (1.0, 0.5)
"""All of them first."""
OBJECTIVE = Objective(0.2, 0.2, kl_coef=0.0)
CHECKED_TOKENS = 64
VERL_TFLOPS = ((210, 375), (470, 510))
"""Of verl's Triton kernels, as published: the slowest (forward, backward) and the fastest. Their GPU is not known to us."""


@dataclass(frozen=True)
class Inputs:
    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    tokens: Tokens
    main_grad_VD: Tensor


Provider = Callable[[Inputs], Any]


def make_inputs(shape: tuple[int, int, int], device: str, alive: float) -> Inputs:
    num_tokens, num_rows, hidden_size = shape
    dtype = DTYPES[device]
    hidden_TD = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    weight_VD = (torch.randn(num_rows, hidden_size, device=device) * 2 / math.sqrt(hidden_size)).to(dtype)
    targets_T = torch.randint(0, num_rows, (num_tokens,), device=device)
    with torch.no_grad():
        logprobs_T, _ = linear_logprob(hidden_TD, weight_VD, targets_T)
    fate_T = torch.rand(num_tokens, device=device)
    advantages_T = torch.where(fate_T < (1 + alive) / 2, torch.randn(num_tokens, device=device), 0.0)
    advantages_T = torch.where(fate_T < alive, advantages_T, 0.0)
    old_T = logprobs_T + 0.05 * torch.randn(num_tokens, device=device)  # few tokens are clipped
    weights_T = torch.full((num_tokens,), 1 / num_tokens, device=device)
    tokens = Tokens(fate_T < (1 + alive) / 2, weights_T, advantages_T, old_T)
    main_grad_VD = torch.zeros(num_rows, hidden_size, device=device)
    return Inputs(hidden_TD.requires_grad_(), weight_VD.requires_grad_(), targets_T, tokens, main_grad_VD)


def check(shape: tuple[int, int, int], device: str) -> float:
    """Largest log-prob error against float64; raises where results or gradients are wrong."""
    inputs = make_inputs((CHECKED_TOKENS, *shape[1:]), device, 0.5)
    exact_TD, exact_VD = (x.detach().double().requires_grad_() for x in (inputs.hidden_TD, inputs.weight_VD))
    objective = replace(OBJECTIVE, clip_low=10.0, clip_high=10.0)  # no kink for rounding to fall over
    loss, own_T, _ = grpo_loss(
        inputs.hidden_TD,
        inputs.weight_VD,
        inputs.targets_T,
        inputs.tokens,
        objective,
        main_grad_VD=inputs.main_grad_VD,
    )
    loss.backward()
    exact_loss, exact_T, _ = grpo_loss_reference(
        exact_TD, exact_VD, inputs.targets_T, inputs.tokens, objective
    )
    exact_loss.backward()
    error = float((own_T - exact_T).abs().max())
    assert error <= LOGPROB_ERROR, f"log-probs are off by {error}"
    tolerance = 1e-4 if DTYPES[device] == torch.float32 else 2e-2
    for own, reference in ((inputs.hidden_TD.grad, exact_TD.grad), (inputs.main_grad_VD, exact_VD.grad)):
        assert own is not None
        assert reference is not None
        largest = float(reference.abs().max())
        torch.testing.assert_close(own.double(), reference, rtol=tolerance, atol=tolerance * largest)
    return error


def own(inputs: Inputs) -> None:
    loss, _, _ = grpo_loss(
        inputs.hidden_TD,
        inputs.weight_VD,
        inputs.targets_T,
        inputs.tokens,
        OBJECTIVE,
        main_grad_VD=inputs.main_grad_VD,
    )
    loss.backward()


def token_losses(logprobs_T: Tensor, tokens: Tokens) -> Tensor:
    assert tokens.old_logprobs_T is not None
    ratio_T = (logprobs_T - tokens.old_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_T = ratio_T.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    gain_T = torch.minimum(ratio_T * tokens.advantages_T, clipped_T * tokens.advantages_T)
    return -torch.where(tokens.mask_T, gain_T * tokens.weights_T, 0.0)


def through_logprobs(op: Op) -> Provider:
    def provider(inputs: Inputs) -> None:
        logprobs_T = op(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T)
        token_losses(logprobs_T, inputs.tokens).sum().backward()
        _into_main_grad(inputs)

    return provider


def plain_loss(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, tokens: Tokens) -> Tensor:
    """What autograd's users write: logits in the inputs' dtype, a float32 log-softmax of all of them."""
    logprobs_TV = F.linear(hidden_TD, weight_VD).float().log_softmax(dim=-1)
    return token_losses(logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), tokens).sum()


def plain(inputs: Inputs) -> None:
    plain_loss(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.tokens).backward()
    _into_main_grad(inputs)


def compiled_plain() -> Provider:
    loss_of = compiled(plain_loss)

    def provider(inputs: Inputs) -> None:
        loss_of(inputs.hidden_TD, inputs.weight_VD, inputs.targets_T, inputs.tokens).backward()
        _into_main_grad(inputs)

    return provider


def liger() -> Provider:
    """Liger's chunked loss (logits in the inputs' dtype); tokens as sequences of 1,024, one advantage each."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=0.0, compiled=True, use_ref_model=False, loss_type="bnpo")

    def provider(inputs: Inputs) -> None:
        tokens, length = inputs.tokens, min(1024, len(inputs.targets_T))
        assert tokens.old_logprobs_T is not None
        loss, _ = module(
            inputs.hidden_TD.view(-1, length, inputs.hidden_TD.shape[1]),
            inputs.weight_VD,
            inputs.targets_T.view(-1, length),
            tokens.mask_T.float().view(-1, length),
            tokens.advantages_T.view(-1, length)[:, 0],
            old_per_token_logps=tokens.old_logprobs_T.view(-1, length),
        )
        loss.backward()
        _into_main_grad(inputs)

    return provider


def products(count: int) -> Provider:
    def provider(inputs: Inputs) -> None:
        with torch.no_grad():
            for _ in range(count - 2):
                logits_TV = F.linear(inputs.hidden_TD, inputs.weight_VD)
            torch.mm(logits_TV, inputs.weight_VD)
            torch.mm(logits_TV.T, inputs.hidden_TD)

    return provider


def providers(device: str) -> dict[str, Provider]:
    found: dict[str, Provider] = {
        "floor": products(3),
        "four": products(4),
        "own": own,
        "linear_logprob": through_logprobs(only_logprobs(linear_logprob)),
        "plain": plain,
    }
    found |= {name: through_logprobs(op) for name, op in differentiable_peers(device).items()}
    if device == "cuda":
        found["compiled"] = compiled_plain()
        if importlib.util.find_spec("liger_kernel"):
            found["liger"] = liger()
    return {name: without_gradients(provider) for name, provider in found.items()}


def without_gradients(provider: Provider) -> Provider:
    """Leaves none to the next one."""

    def cleared(inputs: Inputs) -> None:
        try:
            provider(inputs)
        finally:
            inputs.hidden_TD.grad = inputs.weight_VD.grad = None

    return cleared


def verl_milliseconds(shape: tuple[int, int, int]) -> list[float]:
    """Slowest and fastest by its published rates; its backward makes the logits again: three products."""
    product = 2e-9 * math.prod(shape)  # teraflop for milliseconds
    return [product / forward + 3 * product / backward for forward, backward in VERL_TFLOPS]


def run(device: str, repeats: int = 9) -> list[dict[str, Any]]:
    """Prints the table and returns its rows."""
    print(
        f"grpo_loss forward + backward on {device}, {DTYPES[device]}, {torch.get_num_threads()} threads, {peers()}"
    )
    print(
        f"{'T':>7}{'V':>8}{'D':>6}{'alive':>7}  {'provider':18}{'ms':>10}{'of floor':>10}{'own is x':>10}{'MiB':>9}"
    )
    rows = []
    for shape in SHAPES[device]:
        error = check(shape, device)
        ours: dict[float, Measured] = {}
        for alive in ALIVE:
            found = take_turns(providers(device), partial(make_inputs, shape, device, alive), device, repeats)
            ours[alive] = found["own"]
            for name, measured in found.items():
                row: dict[str, Any] = {
                    "tokens": shape[0],
                    "vocabulary": shape[1],
                    "hidden": shape[2],
                    "alive": alive,
                    "device": device,
                    "provider": name,
                    **measured.row(found["own"], found["floor"]),
                }
                if name == "own":
                    row |= {"largest_logprob_error": error}
                    row["all_alive_over_this"] = ours[1.0].milliseconds / measured.milliseconds
                    if device == "cuda":
                        row["times_verls_published"] = [
                            verl / measured.milliseconds for verl in verl_milliseconds(shape)
                        ]
                rows.append(row)
                print(
                    f"{shape[0]:7}{shape[1]:8}{shape[2]:6}{alive:7.1f}  {name:18}{measured.milliseconds:10.2f}"
                    f"{row['share_of_floor']:10.2f}{row['own_is_faster_by']:10.2f}{of_peak(measured.peak_mebibytes)}"
                )
            if device == "cuda":
                slow, fast = (verl / ours[alive].milliseconds for verl in verl_milliseconds(shape))
                print(
                    f"{'':28}  {fast:.2f} to {slow:.2f} times verl's published rates (of a GPU not known to us)"
                )
        print(
            f"{'':28}  all alive / half of them: {ours[1.0].milliseconds / ours[0.5].milliseconds:.2f};"
            f" largest log-prob error {error:.1e}"
        )
    return rows


def make_rows(shape: tuple[int, int, int], device: str) -> tuple[Any, ...]:
    """logit_gradient_rows' arguments: a chunk of logits, all rows of which have a gradient."""
    num_tokens, num_rows, hidden_size = shape
    dtype = DTYPES[device]
    num_chunk = plan_of(num_tokens, num_rows, hidden_size, dtype.itemsize, device).chunk
    logits_RV = torch.randn(num_chunk, num_rows, device=device)
    targets_R = torch.randint(0, num_rows, (num_chunk,), device=device)
    coefficients_4R = torch.rand(4, num_chunk, device=device)
    d_logits_RV = torch.empty_like(logits_RV, dtype=dtype)
    rows_R = torch.arange(num_chunk, device=device)
    return logits_RV, rows_R, targets_R, coefficients_4R, 1.0, False, d_logits_RV


def trials(device: str) -> list[Trial]:
    """Both passes, for both sizes of a vocabulary."""
    from r1mega_kernels.grpo_loss import kernel

    found = []
    for shape in SHAPES[device][::2]:
        right, make = partial(check, shape, device), partial(make_rows, shape, device)
        found += [
            Trial(kernel.SOFTMAX_ROWS, right, make, lambda rows: softmax_rows(rows[0], rows[2], rows[4])),
            Trial(kernel.LOGIT_GRADIENT_ROWS, right, make, lambda rows: logit_gradient_rows(*rows)),
        ]
    return found


def _into_main_grad(inputs: Inputs) -> None:
    """What Megatron's hooks do with a gradient that autograd brings."""
    if inputs.weight_VD.grad is not None:
        inputs.main_grad_VD.add_(inputs.weight_VD.grad)


if __name__ == "__main__":
    main("grpo_loss", run, __doc__, SHAPES, trials=trials)
