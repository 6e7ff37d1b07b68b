"""Decay branches: a run that starts from the checkpoint that a trunk kept where its own decay begins."""

from pathlib import Path
from typing import Any

from ..base.config import validate
from ..base.errors import UserError
from ..base.yaml_text import parse_yaml
from ..checkpoint.storage import Checkpoint, folder_of
from .config import BUDGETS, CONFIG, UNSCIENTIFIC, Parent, RunConfig

# In these a branch differs from its trunk by its nature, or at will: they touch no step before the branch.
_FREE = {"training": {*BUDGETS, "micro_batch"}, "schedule": {"decay", "min_ratio", "branches", "parent"}}
_FREE_SECTIONS = {*UNSCIENTIFIC, "name", "eval", "noise"}


def trunk_checkpoint(config: RunConfig, folder: Path, parent: Parent) -> Checkpoint:
    """The checkpoint that the branch in ``folder`` starts from.

    Raises:
        UserError: the trunk did not get there, or is another model, data order or schedule than the branch's.
    """
    trunk = folder / parent.run
    if not (trunk / CONFIG).is_file():
        raise UserError(f"schedule.parent.run ({parent.run}): {trunk} holds no run; train the trunk first")
    described = parse_yaml((trunk / CONFIG).read_text(), str(trunk / CONFIG)) or {}
    different = _differences(config, validate(RunConfig, described, str(trunk / CONFIG)))
    if different:
        raise UserError(
            f"schedule.parent.run ({parent.run}): the trunk differs in {', '.join(different)}; a branch may differ "
            "from its trunk in budget, decay, evaluation and noise measurements alone"
        )
    found = folder_of(trunk / "checkpoints", parent.step)
    if not found.is_dir():
        raise UserError(
            f"schedule.parent ({parent.run}, step {parent.step}): the trunk kept no checkpoint of that step; train it "
            "first, with schedule.branches naming this run's length"
        )
    return Checkpoint(found)


def _differences(branch: RunConfig, trunk: RunConfig) -> list[str]:
    """Dotted keys whose values would have made the shared steps others."""
    mine, theirs = _shared_steps(branch), _shared_steps(trunk)
    return sorted(
        f"{section}.{key}"
        for section in mine
        for key in {*mine[section], *theirs[section]}
        if mine[section].get(key) != theirs[section].get(key)
    )


def _shared_steps(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Sections of a configuration without what is free."""
    content = config.model_dump(mode="json", exclude=_FREE_SECTIONS)
    content["data"].pop("path")
    return {
        section: {key: value for key, value in (values or {}).items() if key not in _FREE.get(section, ())}
        for section, values in content.items()
    }
