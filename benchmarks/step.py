"""``moescale bench step``: a whole training step, ours beside a plain torch loop, Hugging Face and the GEMM floor."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace

from ..base.errors import UserError
from .cases import CASES, DEFAULT, Case
from .child import Child
from .harness import FLOOR, OURS, Request, Row, interleave

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
    _check_peers(request.against)
    for case in _chosen(request):
        for allocator, environment in request.allocators.items():
            request.say(f"{case.name} {case.dtype}, {case.threads} threads, {allocator} allocator")
            yield from _case_rows(case, allocator, environment, request)


def _check_peers(peers: tuple[str, ...]) -> None:
    for peer in peers:
        if peer not in PEERS:
            raise UserError(f"--against {peer}: unknown; bench step compares with {', '.join(PEERS)}")
    if "transformers" in peers and importlib.util.find_spec("transformers") is None:
        raise UserError("--against transformers: not installed; pip install 'moescale[hf]', or leave it out")


def _chosen(request: Request) -> list[Case]:
    known = dict.fromkeys(case.name for case in CASES)
    wanted = DEFAULT if request.cases is None else request.cases
    for name in wanted:
        if name not in known:
            raise UserError(f"--case {name}: unknown; bench step has {', '.join(known)}")
    chosen = [case for case in CASES if case.name in wanted]
    return chosen if request.threads is None else [replace(case, threads=request.threads) for case in chosen]


def _implementations(case: Case, peers: tuple[str, ...]) -> list[str]:
    """The plain transformer is dense only."""
    return [OURS, *(peer for peer in PEERS if peer in peers and not (peer == "plain" and case.experts)), FLOOR]


def _case_rows(case: Case, allocator: str, environment: Mapping[str, str], request: Request) -> Iterator[Row]:
    data = request.data.model_copy(
        update={"tokenizer": request.data.tokenizer.model_copy(update={"vocab": case.vocab})}
    )
    payload = {"case": asdict(case), "data": data.model_dump(mode="json")}
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(FACTORIES[name], payload, case.threads, environment))
            for name in _implementations(case, request.against)
        }
        for child in children.values():
            child.wait_until_built()
        timings = interleave(children, request.rounds, request.seconds)
    for name, timing in timings.items():
        yield Row(
            case=case.name,
            impl=name,
            dtype=case.dtype,
            threads=case.threads,
            seconds=timing.seconds,
            spread=timing.spread,
            floor_seconds=timings[FLOOR].seconds,
            ratio=timing.ratio(timings[FLOOR]),
            to_ours=timing.ratio(timings[OURS]),
            tokens_per_second=case.tokens / timing.seconds,
            allocator=allocator,
            note=timing.note,
        )
