"""The ``checkpoint`` section of a run file."""

from pydantic import BaseModel, Field


class CheckpointConfig(
    BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True
):
    """When state is saved. The last step and a stop on request always save."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end and on a stop")
    keep: int = Field(1, ge=1, description="how many of the latest are kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of steps divisible by this stay for ever; 0: none do")
    async_: bool = Field(
        True, alias="async", description="write while training goes on, from a copy of the state in host memory"
    )
