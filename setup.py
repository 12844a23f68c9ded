"""Builds two packages and one extension: `r1mega`, `r1mega_kernels` and `r1mega_kernels._C`.

`kernels/` is a source root, not a package: it must never get an `__init__.py`, because it would
shadow the `kernels` distribution that transformers and vLLM import.

CUDA sources (csrc/**/*.cu) become a library of torch operators, `r1mega_kernels/_C_cuda.so`, where nvcc is (with any
build of torch: r1mega_kernels/nvcc.py), and are left out silently elsewhere. Where nvcc fails there is a warning.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

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


CUDA = "r1mega_kernels._C_cuda"


def cuda_extensions() -> list[Extension]:
    if shutil.which("nvcc") is None or importlib.util.find_spec("torch") is None:
        return []
    return [Extension(CUDA, sources("*.cu"), depends=sources("*.cuh"), optional=True)]


class BuildWithNvcc(build_ext):
    def get_ext_filename(self, name: str) -> str:
        """No tag of a Python version: it is no Python module."""
        own = {CUDA, CUDA.rpartition(".")[2]}
        return name.replace(".", "/") + ".so" if name in own else super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        if extension.name != CUDA:
            super().build_extension(extension)
            return
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        program = str(ROOT / "kernels" / "r1mega_kernels" / "nvcc.py")
        result = subprocess.run([sys.executable, "-P", program, str(library)], stdout=subprocess.DEVNULL)
        if result.returncode:
            raise CompileError("nvcc failed: the CUDA C++ kernels are left out, the Triton ones serve")


setup(
    name="r1mega",
    version="0.1.0",
    description="DeepSeek-R1's training system, from a laptop to a 671B mixture of experts",
    python_requires=">=3.11",
    packages=find_packages(include=["r1mega", "r1mega.*"])
    + find_packages(where="kernels", include=["r1mega_kernels", "r1mega_kernels.*"]),
    package_dir={"r1mega": "r1mega", "r1mega_kernels": "kernels/r1mega_kernels"},
    package_data={
        "r1mega": ["report_page/*", "parallel/searched/*.json"],
        "r1mega_kernels": ["tuned/*.json"],
    },
    ext_modules=[cpu_extension(), *cuda_extensions()],
    cmdclass={"build_ext": BuildWithNvcc},
    entry_points={"console_scripts": ["r1mega = r1mega.cli:main"]},
    zip_safe=False,
)
