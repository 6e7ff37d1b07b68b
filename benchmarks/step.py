"""``moescale bench step``: a whole training step, ours beside a plain torch loop, Hugging Face and the GEMM floor."""

from collections.abc import Iterator
from dataclasses import asdict, replace

from .cases import CASES, DEFAULT, Case
from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .report import Row

FACTORIES = {
    OURS: ".ours:WholeStep",
    "transformers": ".peers:HuggingFace",
    "plain": ".peers:Plain",
    FLOOR: ".floor:Floor",
}
PEERS = ("transformers", "plain")


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured.

    Raises:
        UserError: an unknown case or peer, or a peer that is not installed.
    """
    peers = chosen_peers("step", request, PEERS)
    for case in chosen_cases("step", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads)):
        yield from measured_rows(case, _implementations(case, peers, request), request, request.seconds)


def _implementations(case: Case, peers: tuple[str, ...], request: Request) -> dict[str, Implementation]:
    """The plain transformer is dense only."""
    tokenizer = request.data.tokenizer.model_copy(update={"vocab": case.vocab})
    data = request.data.model_copy(update={"tokenizer": tokenizer})
    payload = {"case": asdict(case), "data": data.model_dump(mode="json")}
    names = [OURS, *(peer for peer in peers if not (peer == "plain" and case.experts)), FLOOR]
    return {name: Implementation(FACTORIES[name], payload) for name in names}
