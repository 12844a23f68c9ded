"""Builds two packages and one extension: `r1mega`, `r1mega_kernels` and `r1mega_kernels._C`.

`kernels/` is a source root, not a package: it must never get an `__init__.py`, because it would
shadow the `kernels` distribution that transformers and vLLM import.

CUDA sources (csrc/**/*.cu) are built into a second extension, `r1mega_kernels._C_cuda`, where nvcc and
a CUDA build of torch are both present, and left out silently elsewhere: on a CPU they could not run.
"""

import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def cpu_extension() -> Pybind11Extension:
    return Pybind11Extension(
        "r1mega_kernels._C",
        sources("*.cpp"),
        depends=sources("*.h"),
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off"],  # the same bits on every machine
    )


def cuda_extensions() -> list:
    if not sources("*.cu") or shutil.which("nvcc") is None:
        return []
    try:
        import torch
        from torch.utils.cpp_extension import CUDAExtension
    except ImportError:
        return []
    if torch.version.cuda is None:
        return []
    return [
        CUDAExtension(
            "r1mega_kernels._C_cuda",
            sources("*.cu"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": ["-O3", "-std=c++17"],
                "nvcc": ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"],
            },
        )
    ]


def build_command(cuda: list) -> type:
    if not cuda:
        return build_ext
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


CUDA = cuda_extensions()

setup(
    name="r1mega",
    version="0.1.0",
    description="DeepSeek-R1's training system, from a laptop to a 671B mixture of experts",
    python_requires=">=3.11",
    packages=find_packages(include=["r1mega", "r1mega.*"])
    + find_packages(where="kernels", include=["r1mega_kernels", "r1mega_kernels.*"]),
    package_dir={"r1mega": "r1mega", "r1mega_kernels": "kernels/r1mega_kernels"},
    package_data={"r1mega": ["report_page/*", "parallel/searched/*.json"]},
    ext_modules=[cpu_extension(), *CUDA],
    cmdclass={"build_ext": build_command(CUDA)},
    entry_points={"console_scripts": ["r1mega = r1mega.cli:main"]},
    zip_safe=False,
)
