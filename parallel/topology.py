"""Who computes what: a layout of ranks as a value, and the arithmetic from a rank to its coordinates.

Ranks are numbered with tensor parallelism innermost, then data, then pipeline (Megatron's order
``tp-cp-ep-dp-pp``). Expert parallelism takes its ranks from the block of data x tensor ranks of one pipeline
stage, neighbours first, so that an expert group stays inside a node as long as it fits.
"""

from dataclasses import dataclass
from typing import Self

from ..base.errors import UserError
from .config import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """Sizes of a layout. ``world = tensor * data * pipeline``; ``expert`` divides ``tensor * data``."""

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @classmethod
    def build(cls, parallel: ParallelConfig, world: int) -> Self:
        """The layout of ``parallel`` on ``world`` ranks.

        Raises:
            UserError: the sizes do not fit into the world; says which would.
        """
        model_ranks = parallel.tensor * parallel.pipeline
        if world % model_ranks:
            raise UserError(
                f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline}) = {model_ranks} must "
                f"divide the number of ranks ({world}); start {model_ranks} ranks or a multiple"
            )
        data = world // model_ranks
        stage = data * parallel.tensor
        if stage % parallel.expert:
            raise UserError(
                f"parallel.expert ({parallel.expert}) must divide the {stage} data x tensor ranks of a pipeline stage; "
                f"try {', '.join(str(n) for n in range(1, stage + 1) if stage % n == 0)}"
            )
        return cls(world, parallel.tensor, parallel.pipeline, data, parallel.expert)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: data x tensor."""
        return self.data * self.tensor

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.stage_ranks // self.expert

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor % self.data

    def pipeline_rank(self, rank: int) -> int:
        return rank // self.stage_ranks

    def expert_rank(self, rank: int) -> int:
        """Which share of the experts ``rank`` holds."""
        return rank % self.stage_ranks % self.expert

    def expert_groups(self) -> list[list[int]]:
        """Groups that exchange tokens: consecutive ranks of a pipeline stage."""
        return [list(range(first, first + self.expert)) for first in range(0, self.world, self.expert)]

    def expert_data_groups(self) -> list[list[int]]:
        """Groups that hold the same experts and sum their gradients."""
        return [
            list(range(stage + share, stage + self.stage_ranks, self.expert))
            for stage in range(0, self.world, self.stage_ranks)
            for share in range(self.expert)
        ]

    def describe(self) -> dict[str, int]:
        """The sizes, for records and tables."""
        return {
            "world": self.world,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "data": self.data,
            "expert": self.expert,
            "expert_data": self.expert_data,
        }
