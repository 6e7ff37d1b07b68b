"""The ``parallel`` and ``runtime`` sections of a run file."""

from typing import Literal

from pydantic import BaseModel, Field

ExpertsOver = Literal["dp_tp", "dp"]
ExchangeKind = Literal["torch", "shared", "mpi", "nccl", "two_level"]
OVERLAPPING: tuple[ExchangeKind, ...] = ("torch", "nccl", "two_level")


class ParallelConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How a run is laid out over ranks. None of it may change what is computed.

    The data-parallel size is not a key: it is what remains of the world.
    """

    tensor: int = Field(1, ge=1, description="tensor-parallel ranks")
    pipeline: int = Field(1, ge=1, description="pipeline stages")
    virtual_stages: int = Field(1, ge=1, description="runs of layers on each pipeline stage (interleaved schedule)")
    expert: int = Field(1, ge=1, description="expert-parallel ranks")
    expert_over: ExpertsOver = Field(
        "dp_tp",
        description="where expert-parallel ranks come from: data x tensor ranks, or data ranks alone, with every "
        "expert on all tensor ranks (for parity tests: each then computes with fewer tokens)",
    )
    sequence: bool = Field(True, description="tensor ranks share out tokens between their products")
    zero: Literal[0, 1] = Field(1, description="ZeRO stage; 0 is for fp32 parity tests only")
    exchange: ExchangeKind = Field(
        "torch",
        description="all-to-all backend: torch.distributed's; shared memory between CPU ranks of one host; MPI; csrc's "
        "over NCCL; inside each node and then between nodes",
    )
    exchange_chunks: int = Field(
        1, ge=1, description="parts of a rank's experts whose rows travel while other parts are computed"
    )


class RuntimeConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How this machine is used; never part of the scientific hash."""

    threads: int | None = Field(None, ge=1, description="torch threads a rank; default: cores / local ranks")
    timeout: float = Field(600.0, gt=0, description="seconds after which a silent peer is an error")
