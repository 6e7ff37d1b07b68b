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
    sections = {"model": (ModelConfig, model), "moe": (MoEConfig, moe)}
    for section, (kind, wanted) in sections.items():
        given = content.get(section)
        here = {} if given is None else validate(kind, given, f"{folder}: {section}").model_dump(exclude={"shape"})
        there = {} if wanted is None else wanted.model_dump(exclude={"shape"})
        if section == "moe" and here and there:
            width = model.width
            for side, config in ((here, validate(MoEConfig, given, str(folder))), (there, wanted)):
                side["expert_width"] = config.width_of_expert(width)  # type: ignore[union-attr]
                side.pop("granularity")
        for key in here.keys() | there.keys():
            name = f"{section}.{key}"
            if name not in TRAINING_KEYS and here.get(key) != there.get(key):
                raise UserError(
                    f"{folder} holds a converted model with {name} ({here.get(key)}), not {there.get(key)}: let the "
                    f"run file say extends: {folder / 'config.yaml'}, or choose another --out"
                )
