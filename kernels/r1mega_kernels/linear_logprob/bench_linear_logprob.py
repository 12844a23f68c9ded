"""linear_logprob beside plain autograd and beside its floor, the bare matrix products.

    python -m r1mega_kernels.linear_logprob.bench_linear_logprob [--device cpu|cuda] [--json FILE]

Correctness first: results and gradients are compared with the float64 reference on the first rows before
anything is timed. Providers take turns on fresh random data; numbers are medians. The floor of the forward is
one product, of forward and backward three (logits, d_hidden, d_weight): what nothing that computes
the same can undercut. On CPU the unit is CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega_kernels.bench import Trial, main, seconds
from r1mega_kernels.linear_logprob import linear_logprob, linear_logprob_reference

SHAPES = {
    "cpu": [(4096, 128, 64), (8192, 128, 128), (8192, 128, 256), (1024, 32768, 256)],
    "cuda": [(8192, 129280, 7168), (8192, 16160, 7168), (32768, 16160, 7168)],
}
"""T, V, D. cpu: tiny models, whose vocabulary is small; cuda: DeepSeek-V3's head, whole and its TP8 shard."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CHECKED_TOKENS = 300
"""More than a tile of any candidate, and no multiple of one."""


def plain(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd users write: keeps logits and log-probs in the inputs' dtype."""
    logprobs_TV = F.linear(hidden_TD, weight_VD).log_softmax(dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T


def make_inputs(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_rows, hidden_size = shape
    hidden_TD = torch.randn(num_tokens, hidden_size, device=device)
    weight_VD = torch.randn(num_rows, hidden_size, device=device) * 2 / math.sqrt(hidden_size)
    targets_T = torch.randint(0, num_rows, (num_tokens,), device=device)
    return (
        hidden_TD.to(DTYPES[device]).requires_grad_(),
        weight_VD.to(DTYPES[device]).requires_grad_(),
        targets_T,
    )


def check(shape: tuple[int, int, int], device: str) -> float:
    """Largest log-prob error against float64; raises where results or gradients are wrong."""
    hidden_TD, weight_VD, targets_T = make_inputs((CHECKED_TOKENS, *shape[1:]), device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    own_T, own_entropy_T = linear_logprob(hidden_TD, weight_VD, targets_T)
    exact_T, exact_entropy_T = linear_logprob_reference(exact[0], exact[1], targets_T)
    (own_T.sum() + own_entropy_T.sum()).backward()
    (exact_T.sum() + exact_entropy_T.sum()).backward()
    torch.testing.assert_close(own_T.double(), exact_T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_entropy_T.double(), exact_entropy_T, rtol=1e-4, atol=1e-4)
    tolerance = 1e-4 if DTYPES[device] == torch.float32 else 2e-2
    for own, reference in zip((hidden_TD, weight_VD), exact):
        assert own.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(
            own.grad.double(),
            reference.grad,
            rtol=tolerance,
            atol=tolerance * float(reference.grad.abs().max()),
        )
    return float((own_T - exact_T).detach().abs().max())


def time_providers(
    providers: dict[str, Callable[[tuple[Tensor, Tensor, Tensor]], None]],
    shape: tuple[int, int, int],
    device: str,
    repeats: int,
) -> dict[str, float]:
    """Median milliseconds of each, all taking turns on the same fresh inputs."""
    milliseconds: dict[str, list[float]] = {name: [] for name in providers}
    for repeat in range(repeats + 1):  # the first turn warms up
        inputs = make_inputs(shape, device)
        for name, provider in providers.items():
            start = seconds(device)
            provider(inputs)
            end = seconds(device)
            if repeat:
                milliseconds[name].append(1e3 * (end - start))
            inputs[0].grad = inputs[1].grad = None
    return {name: statistics.median(times) for name, times in milliseconds.items()}


def forward_of(op: Callable) -> Callable[[tuple[Tensor, Tensor, Tensor]], None]:
    def provider(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        with torch.no_grad():
            op(*inputs)

    return provider


def backward_of(op: Callable) -> Callable[[tuple[Tensor, Tensor, Tensor]], None]:
    def provider(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        logprobs_T, _ = op(*inputs)
        logprobs_T.sum().backward()

    return provider


def one_product(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        F.linear(inputs[0], inputs[1])


def three_products(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_TD, weight_VD, _ = inputs
    with torch.no_grad():
        logits_TV = F.linear(hidden_TD, weight_VD)
        torch.mm(logits_TV, weight_VD)
        torch.mm(logits_TV.T, hidden_TD)


def run(device: str, repeats: int = 9) -> list[dict]:
    """Prints the table and returns its rows."""
    print(f"linear_logprob on {device}, {DTYPES[device]}, {torch.get_num_threads()} threads; milliseconds")
    print(
        f"{'T':>7}{'V':>8}{'D':>6}{'pass':>10}{'floor':>9}{'plain':>9}{'own':>9}{'own/floor':>11}{'own/plain':>11}"
        f"{'error':>10}"
    )
    rows = []
    for shape in SHAPES[device]:
        error = check(shape, device)
        for name, floor, wrap in (
            ("forward", one_product, forward_of),
            ("+backward", three_products, backward_of),
        ):
            providers = {"floor": floor, "plain": wrap(plain), "own": wrap(linear_logprob)}
            times = time_providers(providers, shape, device, repeats)
            row = {
                "tokens": shape[0],
                "vocabulary": shape[1],
                "hidden": shape[2],
                "pass": name,
                "device": device,
                **{f"{key}_milliseconds": value for key, value in times.items()},
                "own_over_floor": times["own"] / times["floor"],
                "own_over_plain": times["own"] / times["plain"],
                "largest_logprob_error": error,
            }
            rows.append(row)
            print(
                f"{shape[0]:7}{shape[1]:8}{shape[2]:6}{name:>10}{times['floor']:9.2f}{times['plain']:9.2f}"
                f"{times['own']:9.2f}{row['own_over_floor']:11.2f}{row['own_over_plain']:11.2f}{error:10.1e}"
            )
    return rows


def trials(device: str) -> list[Trial]:
    """The forward for both sizes of a vocabulary; the backward, which takes any of them a stretch at a time, for one."""
    from r1mega_kernels.linear_logprob import kernel

    whole, shard = SHAPES[device][:2]
    found = [
        Trial(
            kernel.PARTIALS,
            partial(check, shape, device),
            partial(make_inputs, shape, device),
            forward_of(linear_logprob),
        )
        for shape in (whole, shard)
    ]

    def graph() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs = make_inputs(whole, device)
        return linear_logprob(*inputs)[0].sum(), inputs[:2]

    def gradients(of: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(*of, retain_graph=True)

    return [*found, Trial(kernel.LOGIT_GRADIENT, partial(check, whole, device), graph, gradients)]


if __name__ == "__main__":
    main(run, __doc__, SHAPES, trials=trials)
