"""Compiles csrc/**/*.cu into one library of torch operators, for sm_90a.

    python kernels/r1mega_kernels/nvcc.py LIBRARY.so

The sources use torch's stable ABI (torch/csrc/stable) and the CUDA run time alone, so a CPU build of torch is enough to
compile them and to load the result, and a library goes on working with later torches. setup.py calls this where nvcc is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

CSRC = Path(__file__).parents[2] / "csrc"


def sources() -> list[Path]:
    return sorted(CSRC.rglob("*.cu"))


def compile_library(library: Path) -> str:
    """Returns the assembler's account of each kernel's registers, stack and spills. Raises RuntimeError."""
    root = Path(torch.__file__).parent
    command = [
        *("nvcc", "-shared", "-O3", "-std=c++20", "-Xcompiler=-fPIC", "-Xptxas=-v"),
        *("-gencode=arch=compute_90a,code=sm_90a", f"-I{CSRC}", f"-I{root / 'include'}"),
        *(str(source) for source in sources()),
        *(f"-L{root / 'lib'}", "-ltorch_cpu", "-o", str(library)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stderr


if __name__ == "__main__":
    print(compile_library(Path(sys.argv[1])))
