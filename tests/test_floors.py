"""Who may import whom: every folder of the package has a floor, and imports only go down."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import moescale

ROOT = Path(moescale.__file__).parent
PACKAGE = "moescale"
FLOORS = {
    "launch": 7,
    "benchmarks": 6,
    "training": 5,
    "checkpoint": 4,
    "models": 3,
    "moe": 2,
    "parallel": 1,
    "data": 1,
    "scaling": 1,
    "compat": 0,
    "base": 0,
    "version": 0,
}
# Folders without code of the package: build inputs, YAML, prose.
CODELESS = {"configs", "csrc", "docs"}
# Packages that a folder does without, whatever its floor.
PURE = {
    "scaling": {"torch", "deepspeed", "megatron"},
    "data": {"deepspeed"},
    "base": {"torch", "deepspeed", "megatron"},
}


def modules() -> dict[str, Path]:
    """Dotted name, relative to the package, of every module in a folder with a floor."""
    found = {}
    for folder in sorted(FLOORS):
        paths = [ROOT / f"{folder}.py"] if (ROOT / f"{folder}.py").is_file() else sorted((ROOT / folder).rglob("*.py"))
        for path in paths:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str, path: Path) -> set[str]:
    """Dotted names that a module imports anywhere in its text; those of the package without its name, as ``.a.b``."""
    is_package = path.name == "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".") if name else []
            base = here[: len(here) - node.level + is_package] + (node.module.split(".") if node.module else [])
            targets = [".".join([PACKAGE, *base, alias.name]) for alias in node.names]
        else:
            continue
        found.update("." + t.removeprefix(f"{PACKAGE}.") if t.split(".")[0] == PACKAGE else t for t in targets)
    return found


def inner_imports(name: str) -> set[str]:
    """Modules of the package that ``name`` imports."""
    found = set()
    for target in imports_of(name, MODULES[name]):
        if target.startswith("."):
            inner = target[1:]  # a module, or a name inside one
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def test_the_parser_sees_relative_absolute_and_inner_imports(tmp_path: Path) -> None:
    source = tmp_path / "layer.py"
    source.write_text(
        "import torch.nn\nfrom ..parallel import exchange\nfrom .config import X\n"
        "from moescale.base.files import digest\n"
        "def f():\n    from .. import version\n    import moescale.training.loop\n"
    )
    assert imports_of("moe.layer", source) == {
        "torch.nn",
        ".parallel.exchange",
        ".moe.config.X",
        ".base.files.digest",
        ".version",
        ".training.loop",
    }
    package = tmp_path / "__init__.py"
    package.write_text("from .layer import L\nfrom ..base import files\n")
    assert imports_of("moe", package) == {".moe.layer.L", ".base.files"}


def test_every_folder_with_code_has_a_floor() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py") if not path.parent.name.startswith(".")}
    assert folders - CODELESS - set(FLOORS) == set(), "a new folder needs a floor here and a row in the design's table"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    folder = name.split(".")[0]
    for target in inner_imports(name):
        other = target.split(".")[0]
        if other in ("", folder) or other == "base" or target == "version":
            continue
        assert other in FLOORS, f"{name} imports {target}, which lies in a folder without a floor"
        assert FLOORS[other] < FLOORS[folder], (
            f"{name} (floor {FLOORS[folder]}) imports {target} (floor {FLOORS[other]}): imports only go down"
        )


def test_no_circles() -> None:
    """Between modules; a package counts as one more module, since importing a member imports it first."""
    graph = {name: inner_imports(name) - {name, ""} for name in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", sorted(PURE))
def test_pure_folders_import_no_heavy_packages(folder: str) -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] == folder:
            outside = {target.split(".")[0] for target in imports_of(name, path)}
            assert not outside & PURE[folder], f"{name} imports {sorted(outside & PURE[folder])}"


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if name.startswith("moe.")])
def test_only_the_bindings_of_moe_know_an_engine(name: str) -> None:
    engines = {target.split(".")[0] for target in imports_of(name, MODULES[name])} & {"deepspeed", "megatron"}
    assert engines <= {name.removeprefix("moe.bind_")}, f"{name} imports {sorted(engines)}"


_PROBE = """
import torch
cuda = {name: getattr(torch.cuda, name) for name in dir(torch.cuda) if callable(getattr(torch.cuda, name))}
move = torch.Tensor.cuda
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"megatron", "deepspeed", "transformers", "apex"})
assert not heavy, f"loaded {heavy}"
changed = [name for name, value in cuda.items() if getattr(torch.cuda, name) is not value]
assert not changed and torch.Tensor.cuda is move, f"changed torch.cuda.{changed}"
"""


def test_the_layer_alone_loads_no_engine() -> None:
    names = ["moescale.moe", "moescale.moe.layer", "moescale.parallel.exchange", "moescale.parallel.topology"]
    done = subprocess.run([sys.executable, "-c", _PROBE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_exported_names_are_there() -> None:
    from moescale import moe

    assert set(moe.__all__) == {"MoEConfig", "MoELayer", "MoEOutput", "RoutingContext"}
