"""Process groups of a topology: Megatron's and DeepSpeed's, built from one description and checked against it."""

from dataclasses import dataclass, field

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from .config import ExchangeKind
from .exchange import Exchange, make_exchange
from .topology import Topology, group_of


@dataclass(frozen=True)
class Groups:
    """Handles of this rank's groups, and the token exchange of its expert group."""

    topology: Topology
    rank: int
    data: ProcessGroup
    tensor: ProcessGroup
    pipeline: ProcessGroup
    stage: ProcessGroup  # data x tensor ranks of this pipeline stage
    embedding: ProcessGroup | None  # first and last stage, which both hold a tied embedding
    expert: ProcessGroup
    expert_data: ProcessGroup
    exchange: Exchange
    exchange_chunks: int = 1  # as ``parallel.exchange_chunks``
    _made: list[ProcessGroup] = field(default_factory=list)  # all of them, Megatron's and DeepSpeed's included

    @classmethod
    def build(
        cls,
        topology: Topology,
        exchange: ExchangeKind = "torch",
        timeout: float = 600.0,
        exchange_chunks: int = 1,
    ) -> "Groups":
        """Create the groups on every rank of an initialised ``torch.distributed`` world.

        Args:
            timeout: seconds after which a silent peer of the exchange is an error.

        Raises:
            RuntimeError: Megatron or DeepSpeed placed a rank elsewhere than the topology says.
        """
        rank = dist.get_rank()
        before = _existing()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor,
            pipeline_model_parallel_size=topology.pipeline,
            virtual_pipeline_model_parallel_size=topology.virtual_stages if topology.virtual_stages > 1 else None,
            create_gloo_process_groups=False,  # for Megatron's own distributed optimizer
        )
        deepspeed_groups.mpu = MegatronUnits
        name = expert_group_name(topology)
        if name not in deepspeed_groups._get_expert_parallel_group_dict():
            if topology.experts_on_all_tensor_ranks:
                deepspeed_groups._create_expert_data_and_model_parallel(topology.expert, MegatronUnits)
            else:
                deepspeed_groups._create_expert_and_data_parallel(topology.expert)
        stages = [dist.new_group(ranks) for ranks in topology.stage_groups()]
        expert = deepspeed_groups._get_expert_parallel_group(name)
        groups = cls(
            topology=topology,
            rank=rank,
            data=parallel_state.get_data_parallel_group(),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            stage=stages[topology.pipeline_rank(rank)],
            embedding=parallel_state.get_embedding_group(check_initialized=False),
            expert=expert,
            expert_data=deepspeed_groups._get_expert_data_parallel_group(name),
            exchange=make_exchange(exchange, expert, timeout, topology.node),
            exchange_chunks=exchange_chunks,
        )
        groups._made.extend(group for group in _existing() if group not in before)
        groups._check()
        return groups

    def _check(self) -> None:
        """Megatron, DeepSpeed and the topology must agree on every group and on this rank's place in it."""
        topology, rank = self.topology, self.rank
        for name, group, ranks in (
            ("tensor", self.tensor, topology.tensor_groups()),
            ("data", self.data, topology.data_groups()),
            ("pipeline", self.pipeline, topology.pipeline_groups()),
            ("stage", self.stage, topology.stage_groups()),
            ("expert", self.expert, topology.expert_groups()),
            ("expert-data", self.expert_data, topology.expert_data_groups()),
        ):
            found, wanted = dist.get_process_group_ranks(group), group_of(rank, ranks)
            if found != wanted:
                raise RuntimeError(f"rank {rank}: the {name} group holds ranks {found}, the topology says {wanted}")
        for name, place, wanted_place in (
            ("tensor", parallel_state.get_tensor_model_parallel_rank(), topology.tensor_rank(rank)),
            ("data", parallel_state.get_data_parallel_rank(), topology.data_rank(rank)),
            ("pipeline", parallel_state.get_pipeline_model_parallel_rank(), topology.pipeline_rank(rank)),
            ("expert", dist.get_rank(self.expert), topology.expert_rank(rank)),
        ):
            if place != wanted_place:
                raise RuntimeError(f"rank {rank}: place {place} among {name} ranks, the topology says {wanted_place}")

    @property
    def sequence(self) -> ProcessGroup | None:
        """Ranks among which the tokens of a sequence are spread, or None."""
        return self.tensor if self.topology.sequence else None

    @property
    def heads(self) -> ProcessGroup | None:
        """Ranks among which attention heads are spread, or None."""
        return self.tensor if self.topology.tensor > 1 else None

    def is_first(self, chunk: int) -> bool:
        """Whether this rank's chunk ``chunk`` begins the model."""
        return self.topology.pipeline_rank(self.rank) == 0 and chunk == 0

    def is_last(self, chunk: int) -> bool:
        """Whether this rank's chunk ``chunk`` ends the model."""
        return self.is_last_stage and chunk == self.topology.virtual_stages - 1

    @property
    def is_last_stage(self) -> bool:
        return self.topology.pipeline_rank(self.rank) == self.topology.pipeline - 1

    def destroy(self) -> None:
        """End the groups with their threads, so that another topology can be built in the same process."""
        self.exchange.close()
        parallel_state.destroy_model_parallel()
        deepspeed_groups._EXPERT_PARALLEL_GROUP.clear()
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP.clear()
        deepspeed_groups.mpu = None
        left = _existing()  # an exchange ends the groups that it made
        for group in self._made:
            if group in left:
                dist.destroy_process_group(group)
        self._made.clear()


def _existing() -> list[ProcessGroup]:
    """The process groups that this rank is a member of."""
    return list(dist.distributed_c10d._world.pg_map)


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
