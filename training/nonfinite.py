"""Where a run broke: the logical tensors that hold what is not a number, on which rank. Looked for only then."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..models.names import Entry
from .setup import Setup

SHOWN = 4  # tensors named


@dataclass(frozen=True)
class _Found:
    """A broken tensor on a rank; ``depth`` orders tensors from the model's input to its loss."""

    depth: int
    name: str
    rank: int
    host: str


def explain_nonfinite(setup: Setup) -> str:
    """Which tensors are to blame for a loss or gradient norm that is not finite; the same on every rank.

    All ranks call it together, before the gradients are forgotten. A broken parameter is the cause. Without one, a
    broken gradient spreads from where it arose towards the model's input, so those nearest to the loss come first.
    """
    broken = _gather(_Found(*place, *_here(setup)) for place in _broken_parameters(setup))
    if broken:
        return f"parameters are not finite: {_listed(broken)}"
    broken = _gather(_Found(*place, *_here(setup)) for place in _broken_gradients(setup))
    if broken:
        broken.sort(key=lambda found: found.depth, reverse=True)
        return f"gradients are not finite, nearest to the loss: {_listed(broken)}"
    return "every parameter and gradient is finite: the sum of their squares overflows"


def _here(setup: Setup) -> tuple[int, str]:
    return setup.groups.rank, socket.gethostname()


def _broken_parameters(setup: Setup) -> Iterator[tuple[int, str]]:
    for entry in setup.state.entries.values():
        yield from _broken_pieces(setup, entry, entry.parameter.detach())


def _broken_gradients(setup: Setup) -> Iterator[tuple[int, str]]:
    """A rank looks at the slices that it updates; together the ranks hold every gradient."""
    entries = {id(entry.parameter): entry for entry in setup.state.entries.values()}
    for parameter, start, gradient in setup.engine.reduced_gradients():
        if not bool(torch.isfinite(gradient).all()):
            whole = torch.zeros(parameter.numel(), dtype=gradient.dtype, device=gradient.device)
            whole.narrow(0, start, gradient.numel()).copy_(gradient)
            yield from _broken_pieces(setup, entries[id(parameter)], whole.view(parameter.shape))


def _broken_pieces(setup: Setup, entry: Entry, local: torch.Tensor) -> Iterator[tuple[int, str]]:
    for piece in entry.pieces:
        if not bool(torch.isfinite(piece.read(local)).all()):
            yield _depth(piece.name, setup.config.model.layers), piece.name


def _depth(name: str, layers: int) -> int:
    first, _, rest = name.partition(".")
    if first == "layers":
        return 1 + int(rest.partition(".")[0])
    return 0 if first == "embedding" else 1 + layers


def _gather(mine: Iterator[_Found]) -> list[_Found]:
    """All ranks' findings, in the order of the model, each tensor once."""
    found: list[list[_Found]] = [list(mine)] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, found[0])
    first: dict[str, _Found] = {}
    for one in (one for ranks in found for one in ranks):
        first.setdefault(one.name, one)
    return sorted(first.values(), key=lambda one: one.depth)


def _listed(found: list[_Found]) -> str:
    shown = ", ".join(f"{one.name} (rank {one.rank} on {one.host})" for one in found[:SHOWN])
    more = len(found) - SHOWN
    return shown + (f" and {more} more" if more > 0 else "")
