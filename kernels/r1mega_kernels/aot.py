"""Compiles every Triton kernel to sm_90 on a machine without a GPU, and checks what came out.

    python -m r1mega_kernels.aot [--all-candidates]

Each kernel as it is launched by default, or with every candidate of the parameters that tuning tries (tuning.py).

What it asserts: kernels that multiply matrices use Hopper's wgmma instructions, no kernel spills registers to local
memory, and loads of global memory take 16 bytes or more a thread. What it cannot show: that they run, and
how fast.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from r1mega_kernels.tuning import Parameters

SM90 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_LIMIT = 227 * 1024
"""Bytes one block of threads can have on sm_90."""

WIDE_LOAD = re.compile(
    r"ld\.global[\w.:]*\.v4\.[bfsu]32|ld\.global[\w.:]*\.v2\.[bfsu]64"
    r"|cp\.async\.c[ag]\.shared\.global[^;]*, 0x10,|cp\.async\.bulk"
)
"""As Triton writes them in PTX."""


@dataclass(frozen=True)
class AheadOfTime:
    """One kernel with the types and constants it is compiled for."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Run-time argument -> Triton type: "*bf16", "*i64", "i32", "fp32"."""
    constants: dict[str, Any]
    """tl.constexpr argument -> value."""
    parameters: Parameters
    """The constants that are tuned, with num_warps and num_stages."""
    divisible_by_16: tuple[str, ...]
    """Arguments known to be multiples of 16 (addresses, sizes); without it loads are not vectorised."""
    tensor_cores: bool
    """Whether the kernel must come out with wgmma instructions."""
    wide_loads: bool = True
    """Whether it must load global memory 16 bytes at a time; not so where every load is a scalar or a gather."""


@dataclass(frozen=True)
class Compiled:
    name: str
    seconds: float
    num_wgmma: int
    num_wide_loads: int
    """Loads of 16 bytes a thread, and bulk copies to shared memory."""
    registers: int
    stack_bytes: int
    """Local memory per thread: spilled registers."""
    shared_bytes: int


def binary_of(specification: AheadOfTime) -> Any:
    """Triton's result for sm_90: `asm` holds "ptx" and "cubin"."""
    names, options = specification.kernel.arg_names, specification.parameters
    source = ASTSource(
        specification.kernel,
        signature={name: specification.types.get(name, "constexpr") for name in names},
        constexprs=specification.constants | {name: options[name] for name in options if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in specification.divisible_by_16},
    )
    return triton.compile(
        source, target=SM90, options={name: options[name] for name in options if name not in names}
    )


def compile_for_sm90(specification: AheadOfTime) -> Compiled:
    """Raises AssertionError when the code lacks wgmma where it needs it, spills, or wants too much memory."""
    start = time.perf_counter()
    binary = binary_of(specification)
    seconds = time.perf_counter() - start
    registers, stack_bytes = _resource_usage(binary.asm["cubin"])
    compiled = Compiled(
        specification.name,
        seconds,
        binary.asm["ptx"].count("wgmma.mma_async"),
        len(WIDE_LOAD.findall(binary.asm["ptx"])),
        registers,
        stack_bytes,
        binary.metadata.shared,
    )
    assert compiled.num_wgmma > 0 or not specification.tensor_cores, f"{compiled}: no wgmma instruction"
    assert compiled.num_wide_loads > 0 or not specification.wide_loads, f"{compiled}: no load of 16 bytes"
    assert compiled.stack_bytes == 0, f"{compiled}: registers spilled to local memory"
    assert compiled.shared_bytes <= SHARED_MEMORY_LIMIT, f"{compiled}: more than {SHARED_MEMORY_LIMIT} bytes"
    return compiled


def all_kernels(every_candidate: bool = False) -> list[AheadOfTime]:
    from r1mega_kernels.fp8_block import kernel as fp8_block
    from r1mega_kernels.grouped_topk import kernel as grouped_topk
    from r1mega_kernels.grpo_loss import kernel as grpo_loss
    from r1mega_kernels.linear_logprob import kernel as linear_logprob
    from r1mega_kernels.moe_permute import kernel as moe_permute

    modules = (linear_logprob, grpo_loss, grouped_topk, moe_permute, fp8_block)
    return [kernel for module in modules for kernel in module.ahead_of_time(every_candidate)]


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread, as the disassembler inside the Triton wheel reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert usage, f"cuobjdump reported no resource usage:\n{report}"
    return int(usage[1]), int(usage[2])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all-candidates", action="store_true", help="not the defaults alone")
    every_candidate = parser.parse_args().all_candidates
    print(
        f"{'kernel':54}{'seconds':>8}{'wgmma':>7}{'wide loads':>12}{'registers':>11}{'stack':>7}{'shared':>9}"
    )
    failures = 0
    for specification in all_kernels(every_candidate):
        try:
            row = compile_for_sm90(specification)
        except AssertionError as error:
            failures += 1
            print(f"FAILED {error}, {specification.parameters}", file=sys.stderr)
            continue
        print(
            f"{row.name:54}{row.seconds:8.1f}{row.num_wgmma:7}{row.num_wide_loads:12}{row.registers:11}"
            f"{row.stack_bytes:7}{row.shared_bytes:9}{f'  {specification.parameters}' * every_candidate}"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
