"""``moescale bench convert``: a conversion beside copying the files it reads.

``to`` converts a random model from a run's folder to ``hf-mixtral``, ``from`` goes the way back; both without the
comparison of logits, which costs two forward passes and not bytes. The floor copies the source's files within the disk
of the current folder and forces them onto it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ..models.config import ModelConfig
from ..moe.config import MoEConfig
from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .report import Row

FACTORIES = {OURS: ".convert_io:Convert", FLOOR: ".convert_io:CopyFolder"}
TURN = 0.5  # seconds


@dataclass(frozen=True)
class ConvertCase:
    """A way between a run's folder and ``hf-mixtral``, and the model that goes it."""

    way: Literal["to", "from"]
    model: str
    width: int
    layers: int
    heads: int
    vocab: int
    experts: int
    expert_width: int
    dtype: str = "fp32"
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.way}-{self.model}"

    @property
    def tokens(self) -> int:
        """None are worked on."""
        return 0

    def shape(self) -> ModelConfig:
        keys = {"layers": self.layers, "width": self.width, "heads": self.heads, "tied": False, "max_seq": 4096}
        return ModelConfig.model_validate(keys)

    def moe(self) -> MoEConfig:
        keys = {"experts": self.experts, "active": 2, "expert_width": self.expert_width}
        return MoEConfig.model_validate({**keys, "score": "softmax_normalized"})


WAYS: tuple[Literal["to", "from"], ...] = ("to", "from")
CASES = [
    case
    for way in WAYS
    for case in (
        ConvertCase(way, "tiny", width=32, layers=2, heads=2, vocab=100, experts=3, expert_width=16, threads=1),
        ConvertCase(way, "1b", width=1024, layers=12, heads=16, vocab=32_000, experts=8, expert_width=3072),
    )
]
DEFAULT = tuple(case.name for case in CASES if case.model != "tiny")


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured; ``tokens_per_second`` is 0.

    Raises:
        UserError: an unknown case, or a peer: there are none.
    """
    chosen_peers("convert", request, ())
    for case in chosen_cases("convert", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads)):
        found = {name: Implementation(factory, {"case": asdict(case)}) for name, factory in FACTORIES.items()}
        yield from measured_rows(case, found, request, min(TURN, request.seconds))
