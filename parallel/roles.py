"""What a parameter is to the layout: which group its gradient is summed over and how often it is counted."""

from dataclasses import dataclass

from .topology import Topology


@dataclass(frozen=True)
class Role:
    """Role of one local parameter.

    Attributes:
        expert: held by one expert-parallel rank and replicated over the expert-data group; otherwise replicated
            over the data group.
        tensor_sharded: each tensor-parallel rank holds another part of it.
        tensor_summed: replicated over tensor ranks that see different tokens (sequence parallelism) or heads, so
            that its gradient must be summed over them.
        tied_copy: the last pipeline stage's second copy of a tied embedding.
        decay: whether weight decay applies (matrices).
    """

    expert: bool = False
    tensor_sharded: bool = False
    tensor_summed: bool = False
    tied_copy: bool = False
    decay: bool = True

    def differs_over_tensor(self, topology: Topology) -> bool:
        """Whether tensor ranks hold different parts or experts, rather than copies of one and the same."""
        return self.tensor_sharded or (self.expert and not topology.experts_on_all_tensor_ranks)

    def norm_weight(self, topology: Topology, zero: int) -> float:
        """Weight of this rank's square, so that the sum over all ranks counts every distinct element once.

        Under ZeRO 1 a rank holds only its own slice of a reduced gradient; under ZeRO 0 all replicas hold all of it.
        """
        if self.tied_copy:
            return 0.0
        replicas = 1 if self.differs_over_tensor(topology) else topology.tensor
        if zero == 0:
            replicas *= topology.expert_data if self.expert else topology.data
        return 1.0 / replicas
