"""What all ranks of a run must have in common, compared before the first collective."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..compat.versions import versions
from ..data import PreparedData
from ..data.tasks import questions_of
from ..moe import ops
from ..parallel.topology import Topology
from .config import RunConfig


def facts(config: RunConfig, topology: Topology, data: PreparedData) -> dict[str, Any]:
    """Every setting by its dotted key, the layout, the data, and the versions of the code.

    Raises:
        UserError: the questions of a task cannot be had on this rank.
    """
    settings = config.model_dump(mode="json", exclude={"runtime", "logging"})  # how a host is used may differ
    settings["data"].pop("path")
    return {
        **dict(_flat(settings)),
        **{f"layout.{key}": value for key, value in topology.describe().items()},
        "hash of the data": data.data_hash,
        "hash of the tokenizer": data.tokenizer_hash,
        **{f"hash of the questions of {task.name}": task.hash for task in questions_of(config.eval.tasks, data)},
        "operations": ops.unavailable or "native",
        **versions(),
    }


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
