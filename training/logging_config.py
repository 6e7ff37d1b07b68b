"""The logging section: trackers beside the record. They change nothing of what is computed."""

from pydantic import BaseModel, Field


class WandbConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Weights & Biases, an extra. Address, login and mode are W&B's own: ``wandb login``, ``WANDB_*``."""

    project: str = Field(min_length=1, max_length=128)
    entity: str | None = Field(None, min_length=1, description="user or team; default: that of the login")
    group: str | None = Field(None, min_length=1, max_length=128, description="what runs stand together under")
    every: float = Field(1.0, ge=0, description="seconds of training between points; the record has every step")


class LoggingConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What is written beside the record."""

    tensorboard: bool = True
    wandb: WandbConfig | None = None
