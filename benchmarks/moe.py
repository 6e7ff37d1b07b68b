"""``moescale bench moe``: one mixture layer, forward and backward, ours beside its peers and the GEMM floor."""

from collections.abc import Iterator
from dataclasses import asdict, replace

from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .layer_cases import CASES, DEFAULT, LayerCase
from .report import Row

FACTORIES = {
    "megatron": ".layer_peers:megatron",
    "deepspeed": ".layer_peers:deepspeed",
    "transformers": ".layer_peers:olmoe",
}


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured.

    Raises:
        UserError: an unknown case or peer, or a peer that is not installed.
    """
    peers = chosen_peers("moe", request, tuple(FACTORIES))
    for case in chosen_cases("moe", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads)):
        yield from measured_rows(case, implementations(case, peers), request, request.seconds)


def implementations(case: LayerCase, peers: tuple[str, ...]) -> dict[str, Implementation]:
    """What is compared, in the order of its rows."""
    payload = {"case": asdict(case)}
    found = {OURS: Implementation(".layers:ours", {**payload, "routing": "natural"})}
    if case.compare == "routing":
        for routing in ("uniform", "skew"):
            found[f"{OURS}, {routing}"] = Implementation(".layers:ours", {**payload, "routing": routing})
    else:
        found.update({peer: Implementation(FACTORIES[peer], payload) for peer in peers})
    return {**found, FLOOR: Implementation(".floor:LayerFloor", payload)}
