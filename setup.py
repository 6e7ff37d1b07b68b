"""Package layout and native operations: the repository root is the import package ``moescale`` (docs/layout.md).

csrc/ is built where torch and a C++ compiler are found, its CUDA kernels where nvcc is found too; elsewhere the
package installs without it and uses reference operations, as ``moescale doctor`` says. torch must be visible to the
build: ``pip install --no-build-isolation``.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

FOLDERS = (
    "base", "compat", "parallel", "parallel.exchange", "data", "scaling", "moe", "moe.routers", "models", "models.cost",
    "checkpoint", "checkpoint.convert", "training", "benchmarks", "launch", "launch.slurm",
)  # fmt: skip
SOURCES = Path(__file__).parent / "csrc"
# The oldest torch whose stable ABI has what csrc/ uses: the library serves every newer one.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI]
NVCC = [
    "-std=c++20", "-O3", "-DUSE_CUDA", STABLE_ABI,
    *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90, 100)),
    "-gencode=arch=compute_100,code=compute_100",  # for what comes later, compiled when first loaded
]  # fmt: skip


def native() -> dict[str, Any]:
    """Arguments of ``setup`` that build csrc/, or none."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return _left_out("there is no C++ compiler")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return _left_out("the build does not see torch (pip install --no-build-isolation)")
    # The launchers need functions of a torch that was built for CUDA.
    cuda = torch.version.cuda is not None and CUDA_HOME is not None
    sources = [*_files("cpu/*.cpp"), *_files("bindings/*.cpp"), *(_files("cuda/*.cu") if cuda else [])]
    nccl = _nccl() if cuda else {}
    extension = (CUDAExtension if cuda else CppExtension)(
        "moescale.compat._native",
        [*sources, *(_files("cuda/exchange_nccl.cpp") if nccl else [])],
        depends=[*_files("**/*.h"), *_files("**/*.cuh")],
        extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA"] if cuda else CXX, "nvcc": NVCC},
        **nccl,
        py_limited_api=True,
        optional=True,  # a compiler that fails costs speed, not the installation
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def _nccl() -> dict[str, Any]:
    """Arguments of the extension that find NCCL: torch's CUDA wheels bring it, other builds use the system's."""
    wheel = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    for folder in (Path(path) for path in (wheel.submodule_search_locations or () if wheel else ())):
        if (folder / "include" / "nccl.h").is_file():
            # torch has loaded this very file before the extension asks for it by name.
            return {
                "include_dirs": [str(folder / "include")],
                "library_dirs": [str(folder / "lib")],
                "extra_link_args": ["-l:libnccl.so.2"],
            }
    if Path("/usr/include/nccl.h").is_file():
        return {"libraries": ["nccl"]}
    print("moescale: the exchange over NCCL is left out: there is no nccl.h", file=sys.stderr)
    return {}


def _files(pattern: str) -> list[str]:
    return [str(path.relative_to(SOURCES.parent)) for path in sorted(SOURCES.glob(pattern))]


def _left_out(why: str) -> dict[str, Any]:
    print(f"moescale: the native operations are left out: {why}", file=sys.stderr)
    return {}


setup(
    package_dir={"moescale": "."},
    packages=["moescale", *(f"moescale.{folder}" for folder in FOLDERS), "moescale.configs"],
    package_data={
        "moescale": ["py.typed"],
        "moescale.configs": ["*/*.yaml"],
        "moescale.launch": ["scripts/*", "templates/*"],
        "moescale.scaling": ["templates/*"],
    },
    **native(),
)
