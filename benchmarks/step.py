"""``moescale bench step``: a whole training step, ours beside a plain torch loop, Hugging Face and the GEMM floor.

The peer ``reference`` is our own step with the operations of csrc/ replaced by their references in torch.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from ..compat.native import VARIABLE
from .cases import CASES, DEFAULT, Case
from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .report import Row

FACTORIES = {
    OURS: ".ours:WholeStep",
    "reference": ".ours:WholeStep",
    "transformers": ".peers:HuggingFace",
    "plain": ".peers:Plain",
    FLOOR: ".floor:Floor",
}
PEERS = ("reference", "transformers", "plain")
DENSE_ONLY, MIXTURE_ONLY = ("plain",), ("reference",)
ENVIRONMENT = {"reference": {VARIABLE: "reference"}}


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured.

    Raises:
        UserError: an unknown case or peer, or a peer that is not installed.
    """
    peers = chosen_peers("step", request, PEERS)
    for case in chosen_cases("step", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads)):
        yield from measured_rows(case, _implementations(case, peers, request), request, request.seconds)


def _implementations(case: Case, peers: tuple[str, ...], request: Request) -> dict[str, Implementation]:
    tokenizer = request.data.tokenizer.model_copy(update={"vocab": case.vocab})
    data = request.data.model_copy(update={"tokenizer": tokenizer})
    payload = {"case": asdict(case), "data": data.model_dump(mode="json")}
    without = DENSE_ONLY if case.experts else MIXTURE_ONLY
    names = [OURS, *(peer for peer in peers if peer not in without), FLOOR]
    return {name: Implementation(FACTORIES[name], payload, ENVIRONMENT.get(name, {})) for name in names}
