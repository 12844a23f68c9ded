"""fp8_block beside plain torch and a copy of the same bytes.

    python -m r1mega_kernels.fp8_block.bench_fp8_block [--device cpu|cuda] [--json FILE]

Correctness first: bytes and numbers are compared with the reference's before anything is timed, and not one bit may differ.
Providers take turns on fresh random data. GB/s count what is read and written: 3 bytes an element between fp8 and bfloat16;
the floor is a copy of as many bytes. own: with a fresh output, as users call it (on CPU most of that is the kernel's clearing
of fresh pages); own, alone: the conversion into memory that is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from r1mega_kernels import fp8_block
from r1mega_kernels.bench import Trial, compiled, main, of_peak, peers, take_turns
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


Inputs = tuple[Any, ...]
"""weight, its values and scales, and room for the weight."""


def make_inputs(device: str, block_rows: int) -> Inputs:
    weight_OI = torch.randn(SHAPES[device], device=device).bfloat16()
    return weight_OI, *fp8_block._quantize(weight_OI, block_rows), torch.full_like(weight_OI, math.nan)


def operations(device: str, block_rows: int) -> dict[str, dict[str, Callable[[Inputs], Any]]]:
    """Operation -> provider -> call."""

    def quantized_by(quantize: Callable) -> Callable[[Inputs], Any]:
        return lambda x: quantize(x[0], block_rows)

    def dequantized_by(dequantize: Callable, *dtype: torch.dtype) -> Callable[[Inputs], Any]:
        return lambda x: dequantize(x[1], x[2], block_rows, *dtype)

    rows, columns = SHAPES[device]
    source = torch.randint(0, 255, (3 * rows * columns // 2,), dtype=torch.uint8, device=device)
    floor = partial(torch.empty_like(source).copy_, source)
    table: dict[str, dict[str, Callable[[Inputs], Any]]] = {
        "quantise": {
            "floor": lambda x: floor(),
            "own": quantized_by(fp8_block._quantize),
            "own, alone": lambda x: quantize_into(x[0], x[1], x[2], block_rows),
            "torch": quantized_by(quantize_reference),
        },
        "dequantise": {
            "floor": lambda x: floor(),
            "own": dequantized_by(fp8_block._dequantize, torch.bfloat16),
            "own, alone": lambda x: dequantize_into(x[1], x[2], x[3], block_rows),
            "torch": dequantized_by(dequantize_reference),
        },
    }
    if device == "cuda":
        table["quantise"]["compiled"] = quantized_by(compiled(quantize_reference))
        table["dequantise"]["compiled"] = dequantized_by(compiled(dequantize_reference))
    return table


def run(device: str, repeats: int = 9) -> list[dict]:
    """Prints the table and returns its rows."""
    print(
        f"fp8_block on {device}, {SHAPES[device]}, bfloat16, {torch.get_num_threads()} threads, {peers()}\n"
        f"{'operation':12}{'blocks':>10}  {'provider':12}{'ms':>10}{'GB/s':>8}{'of floor':>10}{'own is x':>10}"
        f"{'MiB':>9}  bits that differ"
    )
    rows = []
    for block_rows in (fp8_block.BLOCK, 1):
        make = partial(make_inputs, device, block_rows)
        check(make()[0], block_rows)
        for operation, providers in operations(device, block_rows).items():
            found = take_turns(providers, make, device, repeats)
            for name, measured in found.items():
                row: dict[str, Any] = {
                    "operation": operation,
                    "block_rows": block_rows,
                    "device": device,
                    "provider": name,
                }
                row |= {"shape": SHAPES[device]} | measured.row(found["own"], found["floor"])
                row["gb_per_second"] = 3e-6 * math.prod(SHAPES[device]) / measured.milliseconds
                if name == "own":
                    row["bits_that_differ"] = 0
                rows.append(row)
                print(
                    f"{operation:12}{f'{block_rows} x 128':>10}  {name:12}{row['milliseconds']:10.2f}"
                    f"{row['gb_per_second']:8.2f}{row['share_of_floor']:10.2f}{row['own_is_faster_by']:10.2f}"
                    f"{of_peak(measured.peak_mebibytes)}{'  0' * (name == 'own')}"
                )
    return rows


def trials(device: str) -> list[Trial]:
    """Weights and rows, both ways."""
    from r1mega_kernels.fp8_block import kernel

    found = []
    for tunable, block_rows in ((kernel.OF_WEIGHTS, fp8_block.BLOCK), (kernel.OF_ROWS, 1)):

        def right(block_rows: int = block_rows) -> None:
            check(torch.randn(300, SHAPES[device][1], device=device).bfloat16(), block_rows)

        def quantize(x: Inputs, block_rows: int = block_rows) -> None:
            quantize_into(x[0], x[1], x[2], block_rows)

        def dequantize(x: Inputs, block_rows: int = block_rows) -> None:
            dequantize_into(x[1], x[2], x[3], block_rows)

        make = partial(make_inputs, device, block_rows)
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


if __name__ == "__main__":
    main("fp8_block", run, __doc__, SHAPES, trials=trials)
