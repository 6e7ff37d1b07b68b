"""The library of csrc/: which implementation serves, and what is said when it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.compat import native
from moescale.moe import ops

SAY = "from moescale.moe import ops; print({ops.implementation(name, 'CPU') for name in ops.OPERATIONS})"
built = pytest.mark.skipif(not native.LIBRARY.is_file(), reason="csrc/ is not built: no C++ compiler at set-up")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@built
def test_the_library_serves_every_operation_on_cpu():
    assert {ops.implementation(name, "CPU") for name in ops.OPERATIONS} == {"native"}
    assert native.instruction_set() in ("AVX-512", "AVX2", "generic")


def test_the_references_serve_when_asked_for():
    assert python(SAY, MOESCALE_OPS="reference").stdout.strip() == "{'reference'}"


def test_an_unknown_choice_is_refused_by_name():
    said = python(SAY, MOESCALE_OPS="fast").stderr
    assert "MOESCALE_OPS (fast) must be native or reference" in said


def test_without_the_library_it_is_said_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    assert "g++" in native.load_native.__wrapped__()


def test_a_damaged_library_is_no_reason_to_fall_back_in_silence(monkeypatch, tmp_path):
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF and nothing else")
    monkeypatch.setattr(native, "LIBRARY", damaged)
    with pytest.raises(OSError, match="damaged"):
        native.load_native.__wrapped__()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@built
def test_each_instruction_set_stays_in_its_own_functions():
    """A function compiled for AVX-512 under a common name could be the one that an older processor gets."""
    listing = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", native.LIBRARY],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    wide = {block.splitlines()[0] for block in listing.split("\n\n") if "%zmm" in block}
    assert wide, "no function uses AVX-512"
    assert all("moescale::avx512::" in name for name in wide), wide


def test_the_library_is_where_the_package_looks():
    assert native.LIBRARY.parent == Path(native.__file__).parent
