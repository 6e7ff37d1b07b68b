"""``moescale bench checkpoint``: saving and loading beside copying a file, and what a background save costs training.

A case is a whole training state: masters and both moments of a model, in fp32. ``save`` and ``load`` are measured on
the disk of the current folder, beside a copy of a file of as many bytes on that disk, forced onto it. ``stall`` is what
the main thread does for a save in the background, beside one copy of as many bytes between buffers that exist.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ..models.config import ModelConfig
from ..moe.config import MoEConfig
from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .report import Row

TURN = 0.5  # seconds
FACTORIES = {"save": ".checkpoint_io:Save", "load": ".checkpoint_io:Load", "stall": ".checkpoint_io:Stall"}
FLOORS = {"save": ".checkpoint_io:CopyFile", "load": ".checkpoint_io:CopyFile", "stall": ".checkpoint_io:CopyMemory"}


@dataclass(frozen=True)
class CheckpointCase:
    """``what`` is done to the state of a model."""

    what: str
    model: str
    width: int
    layers: int
    vocab: int
    ffn: int
    experts: int = 0
    expert_width: int = 0
    dtype: str = "fp32"
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.what}-{self.model}"

    @property
    def tokens(self) -> int:
        """None are worked on."""
        return 0

    def shape(self) -> ModelConfig:
        return ModelConfig.model_validate({"layers": self.layers, "width": self.width, "heads": 8, "ffn": self.ffn})

    def moe(self) -> MoEConfig | None:
        if not self.experts:
            return None
        return MoEConfig.model_validate({"experts": self.experts, "active": 2, "expert_width": self.expert_width})


CASES = [
    case
    for what in FACTORIES
    for case in (
        CheckpointCase(what, "tiny", width=32, layers=2, vocab=100, ffn=64, threads=1),
        CheckpointCase(what, "dense", width=512, layers=8, vocab=4096, ffn=2048),
        CheckpointCase(what, "moe64", width=256, layers=8, vocab=4096, ffn=1024, experts=64, expert_width=64),
    )
]
DEFAULT = tuple(case.name for case in CASES if case.model != "tiny")


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured; ``tokens_per_second`` is 0.

    Raises:
        UserError: an unknown case, or a peer: there are none.
    """
    chosen_peers("checkpoint", request, ())
    for case in chosen_cases(
        "checkpoint", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads)
    ):
        payload = {"case": asdict(case)}
        found = {OURS: Implementation(FACTORIES[case.what], payload), FLOOR: Implementation(FLOORS[case.what], payload)}
        yield from measured_rows(case, found, request, min(TURN, request.seconds))
