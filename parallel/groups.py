"""Process groups of a topology: Megatron's and DeepSpeed's, built from one description and checked against it."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from .exchange import Exchange, LocalExchange, TorchExchange
from .topology import Topology


@dataclass(frozen=True)
class Groups:
    """Handles of this rank's groups."""

    topology: Topology
    rank: int
    data: ProcessGroup
    tensor: ProcessGroup
    pipeline: ProcessGroup
    stage: ProcessGroup  # data x tensor ranks of this pipeline stage
    embedding: ProcessGroup | None  # first and last stage, which both hold a tied embedding
    expert: ProcessGroup
    expert_data: ProcessGroup

    @classmethod
    def build(cls, topology: Topology) -> "Groups":
        """Create the groups on every rank of an initialised ``torch.distributed`` world.

        Raises:
            RuntimeError: Megatron or DeepSpeed placed a rank elsewhere than the topology says.
        """
        rank = dist.get_rank()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor, pipeline_model_parallel_size=topology.pipeline
        )
        deepspeed_groups.mpu = MegatronUnits
        name = expert_group_name(topology)
        if name not in deepspeed_groups._get_expert_parallel_group_dict():
            deepspeed_groups._create_expert_and_data_parallel(topology.expert)
        stages = [
            dist.new_group(list(range(first, first + topology.stage_ranks)))
            for first in range(0, topology.world, topology.stage_ranks)
        ]
        groups = cls(
            topology=topology,
            rank=rank,
            data=parallel_state.get_data_parallel_group(),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            stage=stages[topology.pipeline_rank(rank)],
            embedding=parallel_state.get_embedding_group(check_initialized=False),
            expert=deepspeed_groups._get_expert_parallel_group(name),
            expert_data=deepspeed_groups._get_expert_data_parallel_group(name),
        )
        groups._check()
        return groups

    def _check(self) -> None:
        topology, rank = self.topology, self.rank
        expected: dict[str, tuple[ProcessGroup, list[int]]] = {
            "tensor": (self.tensor, _members(topology, rank, topology.tensor_rank)),
            "data": (self.data, _members(topology, rank, topology.data_rank)),
            "pipeline": (self.pipeline, _members(topology, rank, topology.pipeline_rank)),
            "expert": (self.expert, next(g for g in topology.expert_groups() if rank in g)),
            "expert-data": (self.expert_data, next(g for g in topology.expert_data_groups() if rank in g)),
        }
        for name, (group, ranks) in expected.items():
            found = dist.get_process_group_ranks(group)
            if sorted(found) != ranks:
                raise RuntimeError(f"rank {rank}: the {name} group holds ranks {found}, the topology says {ranks}")

    def exchange(self) -> Exchange:
        """The token exchange of this rank's expert group."""
        return LocalExchange() if self.topology.expert == 1 else TorchExchange(self.expert)

    @property
    def sequence(self) -> ProcessGroup | None:
        """Ranks among which the tokens of a sequence are spread, or None."""
        return self.tensor if self.topology.tensor > 1 else None

    @property
    def is_first_stage(self) -> bool:
        return self.topology.pipeline_rank(self.rank) == 0

    @property
    def is_last_stage(self) -> bool:
        return self.topology.pipeline_rank(self.rank) == self.topology.pipeline - 1

    def destroy(self) -> None:
        """Forget the groups, so that another topology can be built in the same process."""
        parallel_state.destroy_model_parallel()
        deepspeed_groups._EXPERT_PARALLEL_GROUP.clear()
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP.clear()
        deepspeed_groups.mpu = None


def _members(topology: Topology, rank: int, coordinate: Any) -> list[int]:
    """Ranks that differ from ``rank`` in one coordinate only."""
    others = [c for c in (topology.tensor_rank, topology.data_rank, topology.pipeline_rank) if c != coordinate]
    return [r for r in range(topology.world) if all(c(r) == c(rank) for c in others)]


def expert_group_name(topology: Topology) -> str:
    """DeepSpeed's name for the expert groups."""
    return f"ep_size_{topology.expert}"


class MegatronUnits:
    """What ``deepspeed.initialize(mpu=...)`` asks of a model-parallel unit, answered by Megatron's parallel state.

    It must not have ``initialize_sequence_parallel``: DeepSpeed then takes the data-parallel groups for its own.
    """

    get_data_parallel_group = staticmethod(lambda: parallel_state.get_data_parallel_group())
    get_data_parallel_world_size = staticmethod(lambda: parallel_state.get_data_parallel_world_size())
    get_data_parallel_rank = staticmethod(lambda: parallel_state.get_data_parallel_rank())
    get_model_parallel_group = staticmethod(lambda: parallel_state.get_model_parallel_group())
    get_model_parallel_world_size = staticmethod(lambda: dist.get_world_size(parallel_state.get_model_parallel_group()))
    get_model_parallel_rank = staticmethod(lambda: dist.get_rank(parallel_state.get_model_parallel_group()))
    get_tensor_model_parallel_group = staticmethod(lambda: parallel_state.get_tensor_model_parallel_group())
    get_tensor_model_parallel_world_size = staticmethod(lambda: parallel_state.get_tensor_model_parallel_world_size())
    get_tensor_model_parallel_rank = staticmethod(lambda: parallel_state.get_tensor_model_parallel_rank())
    get_pipeline_model_parallel_group = staticmethod(lambda: parallel_state.get_pipeline_model_parallel_group())
    get_pipeline_model_parallel_world_size = staticmethod(
        lambda: parallel_state.get_pipeline_model_parallel_world_size()
    )
    get_pipeline_model_parallel_rank = staticmethod(lambda: parallel_state.get_pipeline_model_parallel_rank())
