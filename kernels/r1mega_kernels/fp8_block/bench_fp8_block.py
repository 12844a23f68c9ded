"""fp8_block beside plain torch and a copy of the same bytes.

    python -m r1mega_kernels.fp8_block.bench_fp8_block [--device cpu|cuda] [--json FILE]

Correctness first: bytes and numbers are compared with the reference's before anything is timed. GB/s count what is read
and written: 3 bytes an element between fp8 and bfloat16. Two times: with a fresh output, as users call it (on CPU most of
that is the kernel's clearing of fresh pages), and the conversion alone. On CPU: CPU time, best of many; on a GPU the
median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from r1mega_kernels import fp8_block
from r1mega_kernels.bench import Trial, main, seconds
from r1mega_kernels.fp8_block import dequantize_reference, quantize_reference

SHAPES = {"cpu": (4096, 7168), "cuda": (18432, 7168)}
"""cuda: a dense layer's projection in DeepSeek-V3."""


def check(weight_OI: Any, block_rows: int) -> None:
    """Raises AssertionError where a bit differs from the reference's."""
    values_OI, scale_PQ = fp8_block._quantize(weight_OI, block_rows)
    expected_OI, expected_PQ = quantize_reference(weight_OI, block_rows)
    assert torch.equal(values_OI.view(torch.uint8), expected_OI.view(torch.uint8))
    assert torch.equal(scale_PQ, expected_PQ)
    back_OI = fp8_block._dequantize(values_OI, scale_PQ, block_rows, torch.bfloat16)
    assert torch.equal(back_OI, dequantize_reference(values_OI, scale_PQ, block_rows))


def run(device: str, repeats: int = 9) -> list[dict]:
    """Prints the table and returns its rows."""
    weight_OI = torch.randn(SHAPES[device], device=device).bfloat16()
    print(
        f"fp8_block on {device}, {list(weight_OI.shape)}, bfloat16, {torch.get_num_threads()} threads; GB/s"
    )
    print(
        f"{'operation':22}{'blocks':>11}{'own':>8}{'alone':>8}{'copy':>8}{'alone/copy':>12}{'torch':>8}{'own/torch':>11}"
    )
    rows = []
    target_OI = torch.empty_like(weight_OI)
    for block_rows in (fp8_block.BLOCK, 1):
        check(weight_OI, block_rows)
        values_OI, scale_PQ = fp8_block._quantize(weight_OI, block_rows)
        calls: dict[str, tuple[Callable[[], Any], ...]] = {
            "quantise": (
                partial(fp8_block._quantize, weight_OI, block_rows),
                partial(quantize_into, weight_OI, values_OI, scale_PQ, block_rows),
                partial(quantize_reference, weight_OI, block_rows),
            ),
            "dequantise": (
                partial(fp8_block._dequantize, values_OI, scale_PQ, block_rows, torch.bfloat16),
                partial(dequantize_into, values_OI, scale_PQ, target_OI, block_rows),
                partial(dequantize_reference, values_OI, scale_PQ, block_rows),
            ),
        }
        for operation, (own, alone, plain) in calls.items():
            copy_seconds = (
                best(partial(target_OI.copy_, weight_OI), device, repeats) * 3 / 4
            )  # 4 bytes an element
            taken = [best(call, device, n) for call, n in ((own, repeats), (alone, repeats), (plain, 2))]
            rate = [3e-9 * weight_OI.numel() / s for s in (*taken, copy_seconds)]
            names = ("own", "own_without_allocation", "torch", "copy")
            rows.append(
                {"operation": operation, "block_rows": block_rows, "device": device, "shape": SHAPES[device]}
            )
            rows[-1] |= {f"{name}_gb_per_second": value for name, value in zip(names, rate, strict=True)}
            print(
                f"{operation:22}{f'{block_rows} x 128':>11}{rate[0]:8.1f}{rate[1]:8.1f}{rate[3]:8.1f}"
                f"{rate[1] / rate[3]:12.2f}{rate[2]:8.2f}{rate[0] / rate[2]:10.1f}x"
            )
    return rows


def trials(device: str) -> list[Trial]:
    """Weights and rows, both ways."""
    from r1mega_kernels.fp8_block import kernel

    found = []
    for tunable, block_rows in ((kernel.OF_WEIGHTS, fp8_block.BLOCK), (kernel.OF_ROWS, 1)):

        def right(block_rows: int = block_rows) -> None:
            check(torch.randn(300, SHAPES[device][1], device=device).bfloat16(), block_rows)

        def make(block_rows: int = block_rows) -> tuple[Any, ...]:
            weight_OI = torch.randn(SHAPES[device], device=device).bfloat16()
            return weight_OI, *fp8_block._quantize(weight_OI, block_rows), torch.empty_like(weight_OI)

        def quantize(x: tuple[Any, ...], block_rows: int = block_rows) -> None:
            quantize_into(x[0], x[1], x[2], block_rows)

        def dequantize(x: tuple[Any, ...], block_rows: int = block_rows) -> None:
            dequantize_into(x[1], x[2], x[3], block_rows)

        found += [Trial(tunable, right, make, quantize), Trial(tunable, right, make, dequantize)]
    return found


def quantize_into(weight_OI: Any, values_OI: Any, scale_PQ: Any, block_rows: int) -> None:
    if weight_OI.device.type == "cpu":
        import r1mega_kernels._C as compiled

        arrays = fp8_block._array(weight_OI), fp8_block._array(values_OI), fp8_block._array(scale_PQ)
        compiled.fp8_quantize(*arrays, block_rows)
    else:
        from r1mega_kernels.fp8_block import kernel

        kernel.quantize(weight_OI, values_OI, scale_PQ, block_rows)


def dequantize_into(values_OI: Any, scale_PQ: Any, out_OI: Any, block_rows: int) -> None:
    if values_OI.device.type == "cpu":
        import r1mega_kernels._C as compiled

        compiled.fp8_dequantize(
            fp8_block._array(values_OI), fp8_block._array(scale_PQ), fp8_block._array(out_OI), block_rows
        )
    else:
        from r1mega_kernels.fp8_block import kernel

        kernel.dequantize(values_OI, scale_PQ, out_OI, block_rows)


def best(call: Callable[[], Any], device: str, repeats: int) -> float:
    measured = []
    for _ in range(repeats + 1):
        start = seconds(device)
        call()
        measured.append(seconds(device) - start)
    return min(measured[1:]) if device == "cpu" else statistics.median(measured[1:])


if __name__ == "__main__":
    main(run, __doc__, SHAPES, trials=trials)
