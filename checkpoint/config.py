"""The ``checkpoint`` section of a run file."""

from pydantic import BaseModel, Field


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """When state is saved. The last step and a stop on request always save."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end and on a stop")
    keep: int = Field(1, ge=1, description="how many of the latest are kept")
