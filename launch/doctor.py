"""Whether this machine can run moescale, what it will use, and what to do about what is missing."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.table import Table

from ..base.progress import memory
from .environment import cores, missing_allocator_settings

_TESTED = Path(__file__).parent.parent / "constraints.txt"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``advice`` is empty where nothing has to be done."""

    what: str
    found: str
    ok: bool
    required: bool
    advice: str = ""


def examine() -> list[Finding]:
    """Everything that is looked at; imports torch."""
    return [
        _python(), *_packages(), _torch(), _accelerator(), *_machine(), _compiler(), *_operations(), _apex(),
        _transformer_engine(),
    ]  # fmt: skip


def missing(findings: list[Finding]) -> list[Finding]:
    """What must be there and is not."""
    return [finding for finding in findings if finding.required and not finding.ok]


def as_json(findings: list[Finding]) -> dict[str, object]:
    return {"ok": not missing(findings), "findings": [asdict(finding) for finding in findings]}


def table(findings: list[Finding]) -> Table:
    """The report for a terminal."""
    shown = Table("", "what", "found", "what to do")
    for finding in findings:
        mark = "ok" if finding.ok else ("MISSING" if finding.required else "note")
        shown.add_row(mark, finding.what, finding.found, finding.advice)
    return shown


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    ok = sys.version_info >= (3, 11)
    return Finding("python", version, ok, True, "" if ok else "use Python 3.11 or newer")


def _packages() -> list[Finding]:
    """Installed versions against the ranges that the package declares and the versions it was tested with."""
    try:
        required = importlib.metadata.requires("moescale") or []
    except importlib.metadata.PackageNotFoundError:  # imported from a path
        return [
            Finding(
                "moescale", "not installed, so nothing says what it needs", False, True, "make, or pip install -e ."
            )
        ]
    tested = tested_versions()
    findings = []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            findings.append(_package(requirement, tested.get(requirement.name.lower())))
    return findings


def tested_versions() -> dict[str, str]:
    """The pins of constraints.txt; it stands in a clone, not in a wheel."""
    if not _TESTED.is_file():
        return {}
    lines = [line.split("#")[0].strip() for line in _TESTED.read_text(encoding="utf-8").splitlines()]
    pins = [line.split("==") for line in lines if "==" in line]
    return {name.lower(): version for name, version in pins}


def _package(requirement: Requirement, tested: str | None) -> Finding:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "missing", False, True, f"pip install '{requirement}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version, False, True, f"pip install '{requirement}'")
    base = version.split("+")[0]  # 2.13.0+cpu is the same release built for another device
    if tested is not None and base != tested:
        return Finding(requirement.name, version, True, True, f"tested with {tested}")
    return Finding(requirement.name, version, True, True)


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch threads", "torch is missing", False, True, "pip install 'torch>=2.13'")
    import torch

    ok = hasattr(torch.nn.functional, "grouped_mm")
    advice = "" if ok else "torch.nn.functional.grouped_mm is missing: install torch 2.13 or newer"
    return Finding("torch threads", f"{torch.get_num_threads()} of {cores()} cores", ok, True, advice)


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("cuda", "unknown without torch", True, False)
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPU"
        return Finding("cuda", f"no device ({built})", True, False, "runs use the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("cuda", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}", True, False)


def _machine() -> list[Finding]:
    available = psutil.virtual_memory().available
    unset = bool(missing_allocator_settings())
    allocator = ("default", "moescale restarts itself with it set") if unset else ("set", "")
    enough = available > 2 << 30
    return [
        Finding("cores", str(cores()), True, True),
        Finding("memory", f"{memory(available)} available", enough, False, "" if enough else "below 2 GiB"),
        Finding("allocator", allocator[0], True, False, allocator[1]),
    ]


def _compiler() -> Finding:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    nvcc = shutil.which("nvcc")
    if found is None:
        return Finding("compiler", "none", True, False, "reference operations are used; install g++ or set CXX")
    return Finding("compiler", found + (f", {nvcc}" if nvcc else ""), True, False)


def _operations() -> list[Finding]:
    """Which implementation of each operation of csrc/ serves this machine."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from ..compat.native import instruction_set
    from ..moe import ops

    device: Literal["CPU", "CUDA"] = "CUDA" if torch.cuda.is_available() else "CPU"
    found = {name: ops.implementation(name, device) for name in ops.OPERATIONS}
    references = [name for name, implementation in found.items() if implementation == "reference"]
    if not references:
        on = f"CPU, {instruction_set()}" if device == "CPU" else device
        return [Finding("operations", f"all {len(found)} native ({on})", True, False)]
    native = [name for name in found if name not in references]
    text = f"reference: {', '.join(references)}" + (f"; native: {', '.join(native)}" if native else "")
    return [Finding("operations", text, False, False, ops.unavailable or f"csrc/ was built without {device} kernels")]


def _apex() -> Finding:
    """NVIDIA's apex is told from the other project of that name on PyPI by its modules, without importing either."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "none", True, False, "torch's kernels are used; NVIDIA's is built from its source")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        compiled = importlib.util.find_spec("amp_C") is not None
        advice = "" if compiled else "its CUDA extensions are missing: build it with --cpp_ext --cuda_ext"
        return Finding("apex", "NVIDIA apex" + ("" if compiled else ", Python only"), True, False, advice)
    advice = "PyPI's apex is another project: pip uninstall apex, and build NVIDIA's from its source if you want it"
    return Finding("apex", "not NVIDIA's", True, False, advice)


def _transformer_engine() -> Finding:
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding("transformer engine", "none", True, False, "torch attention and grouped_mm are used")
    return Finding("transformer engine", importlib.metadata.version("transformer_engine"), True, False)
