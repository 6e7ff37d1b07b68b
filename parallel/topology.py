"""Who computes what: a layout of ranks as a value, and the arithmetic from a rank to its coordinates.

Ranks are numbered with tensor parallelism innermost, then data, then pipeline (Megatron's order
``tp-cp-ep-dp-pp``). Expert parallelism takes its ranks from the block of data x tensor ranks of one pipeline
stage, neighbours first, so that an expert group stays inside a node as long as it fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..base.errors import UserError
from .config import ExpertsOver, ParallelConfig


@dataclass(frozen=True)
class Topology:
    """Sizes of a layout.

    Attributes:
        world: ``tensor * data * pipeline`` ranks.
        expert: ranks that share out the experts; divides ``tensor * data``, or ``data`` with ``expert_over`` "dp".
        virtual_stages: runs of layers ("chunks") that each pipeline stage holds.
        sequence: tensor ranks hold different tokens between their products.
        node_ranks: ranks on each node, numbered together; 0 where nobody said.
    """

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    virtual_stages: int = 1
    expert_over: ExpertsOver = "dp_tp"
    sequence: bool = False
    node_ranks: int = 0

    @classmethod
    def build(cls, parallel: ParallelConfig, world: int, node_ranks: int = 0) -> Self:
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
        if parallel.virtual_stages > 1 and parallel.pipeline == 1:
            raise UserError(
                f"parallel.virtual_stages ({parallel.virtual_stages}) needs parallel.pipeline above 1; leave it out"
            )
        data = world // model_ranks
        _check_expert(parallel, data)
        return cls(
            world=world,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            data=data,
            expert=parallel.expert,
            virtual_stages=parallel.virtual_stages,
            expert_over=parallel.expert_over if parallel.tensor > 1 else "dp_tp",
            sequence=parallel.sequence and parallel.tensor > 1,
            node_ranks=node_ranks,
        )

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: data x tensor."""
        return self.data * self.tensor

    @property
    def experts_on_all_tensor_ranks(self) -> bool:
        """Whether tensor ranks hold the same experts."""
        return self.expert_over == "dp"

    @property
    def expert_data(self) -> int:
        """Replicas of each expert among which its optimizer state is shared out."""
        return (self.data if self.experts_on_all_tensor_ranks else self.stage_ranks) // self.expert

    @property
    def rounds(self) -> int:
        """What the number of micro-batches must be a multiple of: the interleaved schedule takes rounds of them."""
        return self.pipeline if self.virtual_stages > 1 else 1

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor % self.data

    def pipeline_rank(self, rank: int) -> int:
        return rank // self.stage_ranks

    def expert_rank(self, rank: int) -> int:
        """Which share of the experts ``rank`` holds."""
        if self.experts_on_all_tensor_ranks:
            return self.data_rank(rank) % self.expert
        return rank % self.stage_ranks % self.expert

    def node(self, rank: int) -> int:
        """Which node ``rank`` is on."""
        return rank // self.node_ranks if self.node_ranks else 0

    def layers(self, rank: int, chunk: int, layers: int) -> range:
        """Layers of the model in a chunk of ``rank``: stages take turns (2104.04473, section 2.2)."""
        count = layers // (self.pipeline * self.virtual_stages)
        first = (chunk * self.pipeline + self.pipeline_rank(rank)) * count
        return range(first, first + count)

    def _blocks(self) -> list[Sequence[int]]:
        """Sets of ranks over which the experts are spread as often as they fit."""
        step = self.tensor if self.experts_on_all_tensor_ranks else 1
        return [
            range(stage + first, stage + self.stage_ranks, step)
            for stage in range(0, self.world, self.stage_ranks)
            for first in range(step)
        ]

    def expert_groups(self) -> list[list[int]]:
        """Groups that exchange tokens: neighbours of a pipeline stage."""
        return [
            list(block[first : first + self.expert])
            for block in self._blocks()
            for first in range(0, len(block), self.expert)
        ]

    def expert_data_groups(self) -> list[list[int]]:
        """Groups that hold the same experts and sum their gradients."""
        return [list(block[share :: self.expert]) for block in self._blocks() for share in range(self.expert)]

    def tensor_groups(self) -> list[list[int]]:
        return [list(range(first, first + self.tensor)) for first in range(0, self.world, self.tensor)]

    def data_groups(self) -> list[list[int]]:
        return [
            list(range(stage + first, stage + self.stage_ranks, self.tensor))
            for stage in range(0, self.world, self.stage_ranks)
            for first in range(self.tensor)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        return [list(range(first, self.world, self.stage_ranks)) for first in range(self.stage_ranks)]

    def stage_groups(self) -> list[list[int]]:
        """All ranks of a pipeline stage."""
        return [list(range(first, first + self.stage_ranks)) for first in range(0, self.world, self.stage_ranks)]

    def nodes_of(self, ranks: Sequence[int]) -> int:
        """Over how many nodes a group is spread."""
        return len({self.node(rank) for rank in ranks})

    def describe(self) -> dict[str, Any]:
        """The sizes, for records and tables."""
        return {
            "world": self.world,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_stages": self.virtual_stages,
            "data": self.data,
            "expert": self.expert,
            "expert_data": self.expert_data,
            "expert_over": self.expert_over,
            "sequence": self.sequence,
            "nodes": self.nodes_of(range(self.world)),
        }


def group_of(rank: int, groups: Sequence[list[int]]) -> list[int]:
    """The one group that ``rank`` belongs to."""
    (found,) = (group for group in groups if rank in group)
    return found


def _check_expert(parallel: ParallelConfig, data: int) -> None:
    if parallel.expert_over == "dp":
        ranks, what = data, "data ranks (parallel.expert_over: dp)"
    else:
        ranks, what = data * parallel.tensor, "data x tensor ranks of a pipeline stage"
    if ranks % parallel.expert:
        raise UserError(
            f"parallel.expert ({parallel.expert}) must divide the {ranks} {what}; "
            f"try {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}"
        )
