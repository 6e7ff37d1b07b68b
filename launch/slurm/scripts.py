"""Batch scripts from templates that people can read (``launch/templates``).

A template puts what comes from files and folders through ``quote``, so that a name with spaces, quotes or ``$(...)``
stays data. Directives (``#SBATCH``) are read by sbatch, not by a shell: they hold nothing but words that
`ClusterConfig` and the study's own pattern for names have let through.
"""

import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..cluster_config import ClusterConfig
from ..environment import ALLOCATOR
from .shapes import Batch

TEMPLATES = Path(__file__).parent.parent / "templates"
# Jobs that prepare text or report may take so long, or as long as the cluster allows if that is less.
_HOURS_ALONE = 4


@dataclass(frozen=True)
class Place:
    """What all scripts of a submission have in common.

    Attributes:
        study: the study's folder; absolute.
        cwd: where the study was submitted, which relative paths in its files are relative to.
        python: interpreter that submits, and supervises on the nodes.
        tag: begins the comments of all jobs of the submission; a word.
        logs: folder of Slurm's own logs, relative to the study's folder; needs no quoting.
    """

    name: str
    study: Path
    cwd: Path
    python: str
    tag: str
    logs: str
    cluster: ClusterConfig


def quote(value: object) -> str:
    """``value`` as one word of a shell."""
    return shlex.quote(str(value))


def rank_environment(cluster: ClusterConfig, threads: int) -> dict[str, str]:
    """Variables of every process of a job. docs/launching.md gives each one's reason."""
    found = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}
    if cluster.interface is not None:
        found |= {"GLOO_SOCKET_IFNAME": cluster.interface}
    if cluster.kind == "cuda":
        found |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        found |= {"NCCL_SOCKET_IFNAME": cluster.interface} if cluster.interface is not None else {}
    else:
        found |= ALLOCATOR
    return found | cluster.environment


def runs_script(place: Place, batch: Batch) -> str:
    """The script of an array of runs."""
    return _render("runs.sbatch.j2", place, batch.name, batch.shape.cores, batch=batch)


def prepare_script(place: Place, runs: Sequence[str]) -> str:
    """The script that prepares the data of ``runs``, one of each data section."""
    return _render("prepare.sbatch.j2", place, "prepare", 1, runs=runs, minutes=_minutes_alone(place.cluster))


def report_script(place: Place) -> str:
    """The script that reports when all runs have ended."""
    return _render("report.sbatch.j2", place, "report", 1, minutes=_minutes_alone(place.cluster))


def _minutes_alone(cluster: ClusterConfig) -> int:
    return min(math.ceil(cluster.seconds / 60), _HOURS_ALONE * 60)


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["quote"] = quote
    return environment


def _render(template: str, place: Place, label: str, threads: int, **values: Any) -> str:
    common: Mapping[str, Any] = {
        "name": place.name,
        "study": place.study,
        "cwd": place.cwd,
        "python": place.python,
        "tag": f"{place.tag}/{label}",
        "log": f"{place.logs}/{label}-%j" if label in ("prepare", "report") else f"{place.logs}/{label}-%A",
        "cluster": place.cluster,
        "environment": rank_environment(place.cluster, threads),
        "rank": [*place.cluster.container, place.cluster.python or place.python],
    }
    return _templates().get_template(template).render({**common, **values}).lstrip("\n")
