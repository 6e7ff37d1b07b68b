"""The CUDA kernels as functions of tensors, run by the emulator, and the cases that emulator and GPU both get.

`Emulated` has the operations under the names and signatures of `moescale.moe.reference`, so that a test calls both
with the same arguments. Programs are compiled once a session.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moescale

CSRC = Path(moescale.__file__).parent / "csrc"
TESTS = Path(__file__).parent
OPERATIONS = (
    "route", "route_backward", "assign", "permute", "combine", "combine_backward", "swiglu", "swiglu_backward",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SANITIZERS = {"": [], "address": ["-fsanitize=address"], "thread": ["-fsanitize=thread"]}
QUIET = {
    "ASAN_OPTIONS": "detect_leaks=0",  # fibers that are still there in the end are no leak of a kernel
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Programs:
    """Test programs, compiled when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.compiler = shutil.which("g++")
        self.runs = 0

    def run(self, name: str, sanitizer: str, arrays: dict[str, Tensor], numbers: dict[str, float]) -> "Run":
        """Run ``name`` on ``arrays`` and ``numbers``; the run says how it ended and what it wrote."""
        program = self._compiled(name, sanitizer)
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        folder.mkdir()
        for array_name, array in arrays.items():
            (folder / array_name).write_bytes(bytes_of(array))
        said = [f"{key}={float(value)!r}" for key, value in numbers.items()]
        done = subprocess.run(
            [str(program), str(folder), *said],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=os.environ | QUIET,
        )
        return Run(folder, done.returncode, done.stderr)

    def _compiled(self, name: str, sanitizer: str) -> Path:
        program = self.folder / f"{name}-{sanitizer or 'plain'}"
        if not program.exists():
            # Kernels and runtime apart: the runtime is never instrumented, see emulator/sanitizers.h.
            runtime, kernels = program.with_suffix(".runtime.o"), program.with_suffix(".kernels.o")
            define = {"": [], "address": ["-DSIMT_ASAN"], "thread": ["-DSIMT_TSAN"]}[sanitizer]
            self._compile([*define, "-c", str(CSRC / "emulator" / "simt.cpp"), "-o", str(runtime)])
            self._compile([*SANITIZERS[sanitizer], "-g", "-c", str(TESTS / f"{name}.cpp"), "-o", str(kernels)])
            self._compile([*SANITIZERS[sanitizer], str(kernels), str(runtime), "-o", str(program)])
        return program

    def _compile(self, arguments: Sequence[str]) -> None:
        if self.compiler is None:
            pytest.skip("g++ is not installed")
        include = [f"-I{CSRC / 'emulator'}", f"-I{CSRC / 'include' / 'cuda'}"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
        command = [self.compiler, "-std=c++20", "-O1", "-DMOESCALE_EMULATOR", *warnings, *include, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Run:
    """How a program ended."""

    folder: Path
    status: int
    stderr: str

    def array(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An array that the program wrote."""
        data = (self.folder / name).read_bytes()
        assert len(data) == math.prod(shape) * dtype.itemsize
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(*shape)


def bytes_of(array: Tensor) -> bytes:
    return array.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""


class Emulated:
    """The operations of `moescale.moe.reference`, computed by the CUDA kernels on the emulator."""

    def __init__(self, programs: Programs, sanitizer: str = "", seed: int = 0):
        self.programs = programs
        self.sanitizer = sanitizer
        self.seed = seed

    def _run(
        self, operation: str, arrays: dict[str, Tensor | None], dtype: torch.dtype = torch.float32, **numbers: float
    ) -> Run:
        given = {name: array for name, array in arrays.items() if array is not None}
        which = {"operation": OPERATIONS.index(operation), "dtype": DTYPES.index(dtype), "seed": self.seed}
        run = self.programs.run("operations", self.sanitizer, given, which | numbers)
        assert run.status == 0, run.stderr
        return run

    def route(
        self,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        allowed_TE: Tensor | None,
        mask_T: Tensor | None,
        sequences: int,
        batch_first: bool,
        active: int,
        sigmoid: bool,
        normalized: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        tokens, experts = logits_TE.shape
        run = self._run(
            "route",
            {"logits_TE": logits_TE, "bias_E": bias_E, "allowed_TE": allowed_TE, "mask_T": mask_T},
            tokens=tokens, experts=experts, active=active, sequences=sequences, batch_first=batch_first,
            sigmoid=sigmoid, normalized=normalized, scale=scale,
        )  # fmt: skip
        return (
            run.array("weight_TK", (tokens, active), torch.float32),
            run.array("index_TK", (tokens, active), torch.int64),
            run.array("logsumexp_T", (tokens,), torch.float32),
            run.array("scored_BE", (sequences, experts), torch.float32),
            run.array("visits_BE", (sequences, experts), torch.float32),
            run.array("entropy_T", (tokens,), torch.float32),
        )

    def route_backward(
        self,
        grad_weight_TK: Tensor,
        grad_logsumexp_T: Tensor,
        grad_scored_BE: Tensor,
        logits_TE: Tensor,
        index_TK: Tensor,
        logsumexp_T: Tensor,
        mask_T: Tensor | None,
        batch_first: bool,
        sigmoid: bool,
        normalized: bool,
        scale: float,
    ) -> Tensor:
        tokens, experts = logits_TE.shape
        arrays = {
            "grad_weight_TK": grad_weight_TK, "grad_logsumexp_T": grad_logsumexp_T, "grad_scored_BE": grad_scored_BE,
            "logits_TE": logits_TE, "index_TK": index_TK, "logsumexp_T": logsumexp_T, "mask_T": mask_T,
        }  # fmt: skip
        run = self._run(
            "route_backward", arrays, tokens=tokens, experts=experts, active=index_TK.shape[1],
            sequences=len(grad_scored_BE), batch_first=batch_first, sigmoid=sigmoid, normalized=normalized,
            scale=scale,
        )  # fmt: skip
        return run.array("grad_logits_TE", (tokens, experts), torch.float32)

    def assign(self, index_TK: Tensor, experts: int, multiple: int, limit: int) -> tuple[Tensor, ...]:
        tokens, active = index_TK.shape
        rows = index_TK.numel() + experts * (multiple - 1) if limit < 0 else experts * limit
        run = self._run(
            "assign", {"index_TK": index_TK}, tokens=tokens, active=active, experts=experts, multiple=multiple,
            limit=limit, rows=rows,
        )  # fmt: skip
        return (
            run.array("counts_E", (experts,), torch.int64),
            run.array("ends_E", (experts,), torch.int32),
            run.array("visit_R", (rows,), torch.int64),
            run.array("row_TK", (tokens, active), torch.int64),
        )

    def permute(self, x_TD: Tensor, visit_R: Tensor, row_TK: Tensor) -> Tensor:
        tokens, width = x_TD.shape
        active = row_TK.shape[1]
        rows = len(visit_R)
        arrays = {"x_TD": x_TD, "visit_R": visit_R, "row_TK": row_TK}
        run = self._run("permute", arrays, x_TD.dtype, tokens=tokens, rows=rows, width=width, active=active)
        return run.array("rows_RD", (rows, width), x_TD.dtype)

    def combine(self, rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        rows, width = rows_RD.shape
        tokens, active = row_TK.shape
        arrays = {"rows_RD": rows_RD, "row_TK": row_TK, "weight_TK": weight_TK}
        run = self._run("combine", arrays, rows_RD.dtype, tokens=tokens, rows=rows, width=width, active=active)
        return run.array("out_TD", (tokens, width), rows_RD.dtype)

    def combine_backward(
        self, grad_TD: Tensor, rows_RD: Tensor, visit_R: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, width = rows_RD.shape
        tokens, active = weight_TK.shape
        arrays = {"grad_TD": grad_TD, "rows_RD": rows_RD, "visit_R": visit_R, "weight_TK": weight_TK}
        sizes = {"tokens": tokens, "rows": rows, "width": width, "active": active}
        run = self._run("combine_backward", arrays, rows_RD.dtype, **sizes)
        return (
            run.array("grad_rows_RD", (rows, width), rows_RD.dtype),
            run.array("grad_weight_TK", (tokens, active), torch.float32),
        )

    def swiglu(self, gate_up: Tensor, weight_TK: Tensor | None, visit_R: Tensor | None) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        tokens, active = (0, 0) if weight_TK is None else weight_TK.shape
        arrays = {"gate_up": gate_up, "weight_TK": weight_TK, "visit_R": visit_R}
        run = self._run("swiglu", arrays, gate_up.dtype, tokens=tokens, rows=rows, width=width, active=active)
        return run.array("act_RF", (rows, width), gate_up.dtype)

    def swiglu_backward(
        self, grad_act_RF: Tensor, gate_up: Tensor, weight_TK: Tensor | None, visit_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, width = grad_act_RF.shape
        tokens, active = (0, 0) if weight_TK is None else weight_TK.shape
        arrays = {"grad_act_RF": grad_act_RF, "gate_up": gate_up, "weight_TK": weight_TK, "visit_R": visit_R}
        sizes = {"tokens": tokens, "rows": rows, "width": width, "active": active}
        run = self._run("swiglu_backward", arrays, gate_up.dtype, **sizes)
        grad_act_RF.copy_(run.array("grad_act_RF", (rows, width), gate_up.dtype))
        grad_weight_shape = (0,) if weight_TK is None else (tokens, active)
        return (
            run.array("grad_gate_up", (rows, 2 * width), gate_up.dtype),
            run.array("grad_weight_TK", grad_weight_shape, torch.float32),
        )


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="session")
def emulated(programs: Programs) -> Callable[..., Emulated]:
    """``emulated(seed=0, sanitizer="")``: the operations under one schedule and one checker."""
    return lambda seed=0, sanitizer="": Emulated(programs, sanitizer, seed)


@dataclass(frozen=True)
class RouteCase:
    """One call of route; see `moescale.moe.ops`."""

    name: str
    tokens: int
    experts: int
    active: int
    sequences: int = 1
    batch_first: bool = False
    sigmoid: bool = False
    normalized: bool = False
    bias: bool = False
    allowed: float = 1.0  # share of experts that selection may take
    masked: float = 0.0  # share of tokens that are not real
    scale: float = 1.0

    def arguments(self) -> tuple[object, ...]:
        draw = torch.Generator().manual_seed(self.tokens + self.experts)
        shape = (self.tokens, self.experts)
        allowed_TE = torch.rand(shape, generator=draw) < self.allowed
        mask_T = torch.rand(self.tokens, generator=draw) >= self.masked
        return (
            2 * torch.randn(shape, generator=draw),
            torch.randn(self.experts, generator=draw) if self.bias else None,
            allowed_TE if self.allowed < 1 else None,
            mask_T if self.masked > 0 else None,
            self.sequences, self.batch_first, self.active, self.sigmoid, self.normalized, self.scale,
        )  # fmt: skip


ROUTE_CASES = (
    RouteCase("one_expert", 5, 1, 1),
    RouteCase("three_experts", 37, 3, 2, sequences=2, normalized=True),
    RouteCase("eight", 66, 8, 2, sequences=3, batch_first=True, normalized=True, masked=0.3),
    RouteCase("sigmoid", 50, 64, 8, sequences=2, sigmoid=True, normalized=True, bias=True, scale=2.5),
    RouteCase("sigmoid_plain", 21, 33, 4, sigmoid=True, masked=0.5),
    RouteCase("few_allowed", 40, 64, 8, normalized=True, allowed=0.1, bias=True),
    RouteCase("all", 9, 8, 8, sequences=3),
    RouteCase("fine", 70, 256, 8, sequences=2, sigmoid=True, normalized=True, bias=True, masked=0.2),
    RouteCase("most_experts", 4, 1024, 32, normalized=True),
    RouteCase("five_hundred", 6, 500, 6),
    RouteCase("all_masked", 12, 8, 2, masked=1.0),
    RouteCase("no_token", 0, 8, 2, sequences=2),
    RouteCase("no_visit", 10, 8, 0),
)


@pytest.fixture(params=ROUTE_CASES, ids=lambda case: case.name)
def route_case(request: pytest.FixtureRequest) -> RouteCase:
    return request.param


@dataclass(frozen=True)
class VisitCase:
    """Which expert each visit goes to, and how rows are laid out."""

    name: str
    tokens: int
    active: int
    experts: int
    multiple: int = 1
    limit: int = -1
    only: int | None = None  # all visits go to this expert

    def index_TK(self) -> Tensor:
        """Experts from -2 to E + 1: those outside [0, E) count as no expert."""
        if self.only is not None:
            return torch.full((self.tokens, self.active), self.only)
        draw = torch.Generator().manual_seed(self.tokens + self.experts)
        return torch.randint(-2, self.experts + 2, (self.tokens, self.active), generator=draw)


VISIT_CASES = (
    VisitCase("one_expert", 33, 1, 1),
    VisitCase("three_experts", 101, 2, 3, multiple=8),
    VisitCase("several_chunks", 701, 8, 64, multiple=16),
    VisitCase("mostly_empty", 7, 2, 256, multiple=8),
    VisitCase("most_experts", 90, 8, 1024),
    VisitCase("to_one_expert", 300, 8, 8, multiple=4, only=5),
    VisitCase("to_no_expert", 40, 2, 8, multiple=2, only=-1),
    VisitCase("padded", 120, 2, 8, multiple=8, limit=64),
    VisitCase("padded_with_drops", 301, 8, 64, multiple=8, limit=24),
    VisitCase("padded_to_one_expert", 150, 1, 3, limit=100, only=2),
    VisitCase("padded_to_nothing", 20, 2, 8, limit=0),
    VisitCase("no_token", 0, 2, 8, multiple=8),
    VisitCase("no_visit", 5, 0, 3),
)


@pytest.fixture(params=VISIT_CASES, ids=lambda case: case.name)
def visit_case(request: pytest.FixtureRequest) -> VisitCase:
    return request.param


@dataclass(frozen=True)
class RowsCase:
    """Rows of one dtype and width, dispatched by a VisitCase."""

    dtype: torch.dtype
    width: int
    visits: VisitCase

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.width}-{self.visits.name}"

    def randn(self, rows: int, width: int, seed: int) -> Tensor:
        return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def weight_TK(self) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        return torch.rand(self.visits.tokens, self.visits.active, generator=draw)

    def tolerance(self) -> float:
        """Rounding of one result, relative to the largest entry; fp32 sums differ in their order too."""
        return 4 * torch.finfo(self.dtype).eps if self.dtype != torch.float32 else 1e-5


_ROWS = {case.name: case for case in (VisitCase("k1", 13, 1, 3, 4), VisitCase("k2", 21, 2, 8, 8))} | {
    "k6": VisitCase("k6", 17, 6, 8, multiple=8, limit=8),
    "none": VisitCase("none", 6, 2, 8, multiple=8, only=-1),
    "empty": VisitCase("empty", 0, 2, 8, multiple=8),
    "k0": VisitCase("k0", 5, 0, 3),
}
ROWS_CASES = (
    *(RowsCase(dtype, 264, _ROWS[name]) for dtype in DTYPES for name in ("k1", "k2", "k6")),
    *(RowsCase(torch.bfloat16, 8, _ROWS[name]) for name in ("k2", "none", "empty", "k0")),
    RowsCase(torch.float32, 1032, _ROWS["k2"]),
)


@pytest.fixture(params=ROWS_CASES, ids=lambda case: case.name)
def rows_case(request: pytest.FixtureRequest) -> RowsCase:
    return request.param


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest entry; integers exactly."""
    assert got.shape == wanted.shape
    if not wanted.dtype.is_floating_point:
        assert torch.equal(got, wanted)
        return
    got, wanted = got.double(), wanted.double()
    largest = wanted.nan_to_num(0, 0, 0).abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(largest, 1e-30), equal_nan=True)


@pytest.fixture(scope="session")
def close() -> Callable[[Tensor, Tensor, float], None]:
    return assert_close
