"""``moescale bench dispatch``: each native operation beside its reference and a copy of as many bytes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ..base.errors import UserError
from ..compat.native import load_native
from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .layer_cases import CASES as LAYERS
from .layer_cases import LayerCase
from .report import Row

REFERENCE = "reference"
TURN = 0.1  # seconds: operations take milliseconds
_OF_SCORES = ("route", "route_backward", "assign")  # their operands have the same dtype in every layer
_OF_ROWS = ("permute", "combine", "combine_backward", "swiglu", "swiglu_backward")


@dataclass(frozen=True)
class OperationCase:
    """An operation of a layer."""

    operation: str
    layer: LayerCase

    @property
    def name(self) -> str:
        return f"{self.operation}-{self.layer.name}"

    @property
    def dtype(self) -> str:
        return self.layer.dtype

    @property
    def threads(self) -> int:
        return self.layer.threads

    @property
    def tokens(self) -> int:
        return self.layer.tokens


_FIRST_DTYPE = {layer.name: layer.dtype for layer in reversed(LAYERS)}

CASES = [
    OperationCase(operation, layer)
    for layer_name in ("tiny", "e64", "e256", "olmoe")
    for operation in (*_OF_SCORES, *_OF_ROWS)
    for layer in LAYERS
    if layer.name == layer_name and (operation in _OF_ROWS or layer.dtype == _FIRST_DTYPE[layer.name])
]
DEFAULT = tuple(dict.fromkeys(case.name for case in CASES if case.layer.name in ("e64", "e256")))


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured.

    Raises:
        UserError: an unknown case or peer, or there are no native operations.
    """
    peers = chosen_peers("dispatch", request, (REFERENCE,))
    cases = chosen_cases("dispatch", request, CASES, DEFAULT, _with_threads)
    if reason := load_native():
        raise UserError(f"bench dispatch: the native operations are not in use: {reason}")
    for case in cases:
        yield from measured_rows(case, implementations(case, peers), request, min(TURN, request.seconds))


def _with_threads(case: OperationCase, threads: int) -> OperationCase:
    return replace(case, layer=replace(case.layer, threads=threads))


def implementations(case: OperationCase, peers: tuple[str, ...]) -> dict[str, Implementation]:
    """What is compared, in the order of its rows."""
    payload = {"case": asdict(case.layer), "operation": case.operation}
    found = {OURS: Implementation(".operations:Operation", {**payload, "implementation": "native"})}
    if REFERENCE in peers:
        found[REFERENCE] = Implementation(".operations:Operation", {**payload, "implementation": REFERENCE})
    return {**found, FLOOR: Implementation(".operations:Copy", payload)}
