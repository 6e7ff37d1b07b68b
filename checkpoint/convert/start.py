"""A run that starts from a converted model: what it may change and what it may not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.config import validate
from ...base.errors import UserError
from ...models.config import ModelConfig
from ...moe.config import MoEConfig

# Keys that change how a model is trained and not what it computes.
TRAINING_KEYS = (
    "model.init_std",
    "model.max_seq",
    "moe.jitter",
    "moe.balance",
    "moe.aux_loss",
    "moe.z_loss",
    "moe.bias_rate",
)


def is_converted(content: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.yaml`` is that of a conversion in which no run has started yet."""
    return "model" in content and set(content) <= {"model", "moe"}


def check_start(content: Mapping[str, Any], folder: Path, model: ModelConfig, moe: MoEConfig | None) -> None:
    """Check that a run in ``folder`` computes what the converted model there does.

    Raises:
        UserError: a key that decides what the model computes differs: names it.
    """
    origin = str(folder / "config.yaml")
    section = content.get("moe")
    here = _meaning(
        validate(ModelConfig, content["model"], f"{origin}: model"),
        None if section is None else validate(MoEConfig, section, f"{origin}: moe"),
    )
    there = _meaning(model, moe)
    for name in here | there:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{folder} holds a converted model with {name} ({here.get(name)}), not {there.get(name)}: let the run "
                f"file say extends: {origin}, or choose another --out"
            )


def _meaning(model: ModelConfig, moe: MoEConfig | None) -> dict[str, Any]:
    """Every key that decides what a model computes."""
    keys = {f"model.{key}": value for key, value in model.model_dump(exclude={"shape"}).items()}
    if moe is not None:
        keys |= {f"moe.{key}": value for key, value in moe.model_dump(exclude={"granularity"}).items()}
        keys["moe.expert_width"] = moe.width_of_expert(model.width)
    return {name: value for name, value in keys.items() if name not in TRAINING_KEYS}
