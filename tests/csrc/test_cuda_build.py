"""What nvcc makes of the CUDA kernels: no warnings, no spills, few registers, 16-byte loads and stores.

Everything is read from compiled code; no GPU is needed.
"""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import moescale

CSRC = Path(moescale.__file__).parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TOOLKITS = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
TOOLKITS.append(Path("/usr/local/cuda"))
TORCH = Path(torch.__file__).parent / "include"
NCCL = [Path(torch.__file__).parent.parent / "nvidia/nccl/include", Path("/usr/include")]
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings"]

# Most registers a thread may use. 65536 / (registers x threads a block) blocks share a multiprocessor.
REGISTERS = {
    "route_kernel<1>": 64,
    "route_kernel<2>": 64,
    "route_kernel<4>": 72,
    "route_kernel<8>": 96,
    "route_kernel<16>": 144,
    "route_kernel<32>": 248,
    "add_shares_kernel": 40,
    "route_backward_kernel": 72,
    "count_visits_kernel": 40,
    "scan_chunks_kernel": 40,
    "scan_experts_kernel": 32,
    "place_visits_kernel": 48,
    "permute_kernel": 48,
    "combine_kernel": 48,
    "combine_backward_kernel": 56,
    "swiglu_kernel": 56,
    "swiglu_backward_kernel": 72,
}
# Kernels that move rows: the 16-byte loads and stores that the loop over a row needs at least.
MOVERS = {
    "permute_kernel": (1, 1),
    "combine_kernel": (4, 1),
    "combine_backward_kernel": (2, 1),
    "swiglu_kernel": (2, 1),
    "swiglu_backward_kernel": (3, 3),
}


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit: on the path, in a toolkit, or in a package of NVIDIA's."""
    folders = [toolkit / "bin" for toolkit in TOOLKITS]
    packages = Path(torch.__file__).parent.parent
    folders += [*packages.glob("nvidia/*/bin"), packages / "triton/backends/nvidia/bin"]
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    if found is None:
        pytest.skip(f"{name} is not installed (CUDA toolkit; nvdisasm also comes as nvidia-cuda-nvdisasm)")
    return found


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def kernel_of(mangled: str) -> str:
    """``combine_kernel`` of a mangled name, with a template's number: ``route_kernel<8>``."""
    name = re.search(r"\d+([a-z_]+_kernel)(?:ILi(\d+)E)?", mangled)
    assert name is not None, mangled
    return name[1] if name[2] is None else f"{name[1]}<{name[2]}>"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The kernels as machine code of one architecture, and what ptxas said about them."""
    cubin = tmp_path_factory.mktemp(request.param) / "kernels.cubin"
    source = Path(__file__).with_name("instances.cu")
    command = [tool("nvcc"), *FLAGS, f"-arch={request.param}", "-cubin", "-Xptxas", "-v"]
    return cubin, run([*command, f"-I{CSRC / 'include' / 'cuda'}", str(source), "-o", str(cubin)])


def test_kernels_do_not_spill_and_use_few_registers(compiled: tuple[Path, str]) -> None:
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        compiled[1],
        flags=re.DOTALL,
    )
    seen = set()
    for mangled, *counts in report:
        kernel = kernel_of(mangled)
        stack, stores, loads, registers = map(int, counts)
        seen.add(kernel)
        assert (stack, stores, loads) == (0, 0, 0), f"{mangled} spills"
        assert registers <= REGISTERS[kernel], f"{mangled} uses {registers} registers"
    assert seen == set(REGISTERS)
    assert len(report) == len(REGISTERS) + 2 * 4, "four kernels come in three dtypes"


def test_rows_move_16_bytes_at_a_time(compiled: tuple[Path, str]) -> None:
    kernel = ""
    count: dict[tuple[str, str, bool], int] = defaultdict(int)
    for line in run([tool("nvdisasm"), str(compiled[0])]).splitlines():
        if line.startswith(".text."):
            kernel = line.split()[0].rstrip(":").removeprefix(".text.")
        elif access := re.search(r"\b(LDG|STG)\.E(\.\S*)?", line):
            wide = ".128" in (access[2] or "")
            count[kernel, access[1], wide] += 1
    names = {name for name, *_ in count}
    for mover, (loads, stores) in MOVERS.items():
        instances = [name for name in names if kernel_of(name) == mover]
        assert len(instances) == (1 if mover == "permute_kernel" else 3)
        for name in instances:
            assert count[name, "LDG", True] >= loads, name
            assert count[name, "STG", True] >= stores, name
            # What is not a row: the row's visit and its weight; the gradient of the weight.
            assert count[name, "LDG", False] <= 4, name
            assert count[name, "STG", False] <= 1, name


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_the_launchers_compile_without_warnings(source: Path, tmp_path: Path) -> None:
    """Against the torch that is installed, be it built for CUDA or not."""
    generate = [f"-gencode=arch=compute_{a.removeprefix('sm_')},code={a}" for a in ARCHITECTURES]
    out = tmp_path / "launchers.o"
    command = [tool("nvcc"), *FLAGS, *launcher_defines(), *generate, "-Xcompiler", "-fPIC,-Wall"]
    run([*command, "-isystem", str(TORCH), "-c", str(source), "-o", str(out)])
    assert_calls_only_the_stable_abi(out)


@pytest.mark.slow
def test_the_exchange_compiles_against_nccl(tmp_path: Path) -> None:
    header = next((f for f in NCCL if (f / "nccl.h").is_file()), None)
    if header is None:
        pytest.skip("nccl.h is not installed (it comes with torch's CUDA wheels, and as nvidia-nccl-cu13)")
    toolkit = next((t for t in TOOLKITS if (t / "include" / "cuda_runtime.h").is_file()), None)
    if toolkit is None:
        pytest.skip("there is no CUDA toolkit")
    out = tmp_path / "exchange.o"
    includes = [part for folder in (TORCH, header, toolkit / "include") for part in ("-isystem", str(folder))]
    command = ["g++", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", *launcher_defines(), *includes]
    run([*command, "-c", str(CSRC / "cuda" / "exchange_nccl.cpp"), "-o", str(out)])
    assert_calls_only_the_stable_abi(out)


def launcher_defines() -> list[str]:
    """As setup.py compiles the launchers."""
    version = re.search(r'STABLE_ABI = "(.*)"', (CSRC.parent / "setup.py").read_text())
    assert version is not None
    return ["-DUSE_CUDA", version[1]]


def assert_calls_only_the_stable_abi(compiled: Path) -> None:
    symbols = run(["nm", "-u", str(compiled)])
    assert "aoti_torch_library_init_impl" in symbols
    assert not re.search(r"_ZNK?(2at|3c10|5torch)", symbols), "only torch's stable ABI is called"
