"""The ``parallel`` and ``runtime`` sections of a run file."""

from typing import Literal

from pydantic import BaseModel, Field


class ParallelConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How a run is laid out over ranks. None of it may change what is computed.

    The data-parallel size is not a key: it is what remains of the world.
    """

    tensor: int = Field(1, ge=1, description="tensor-parallel ranks; sequence parallelism comes with it")
    pipeline: int = Field(1, ge=1, description="pipeline stages")
    expert: int = Field(1, ge=1, description="expert-parallel ranks, taken from data x tensor ranks")
    zero: Literal[0, 1] = Field(1, description="ZeRO stage; 0 is for fp32 parity tests only")
    exchange: Literal["torch"] = Field("torch", description="all-to-all backend")


class RuntimeConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How this machine is used; never part of the scientific hash."""

    threads: int | None = Field(None, ge=1, description="torch threads a rank; default: cores / local ranks")
    timeout: float = Field(600.0, gt=0, description="seconds after which a silent peer is an error")
