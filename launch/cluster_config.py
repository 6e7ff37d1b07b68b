"""The cluster file: where jobs go, what a node has, and what becomes of a job that ends too early."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from ..base.config import find_config, load_yaml, validate
from ..models.cost.hardware import Hardware

_WORD = re.compile(r"[A-Za-z0-9._@:/+,=\[\]&|*%-]+")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9._@:/+,=\[\]&|*%-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the scripts, Slurm and torchrun set themselves.
_OURS = re.compile(r"SLURM_.*|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PYTHONSAFEPATH")
_HOUR = 3600


def _word(value: str) -> str:
    """#SBATCH lines are read by sbatch's own parser, not by a shell: what needs quoting there is refused."""
    if not _WORD.fullmatch(value):
        raise PydanticCustomError("word", "one word of letters, digits and ._@:/+,=[]&|*%- is expected")
    return value


def _option(value: str) -> str:
    if not _OPTION.fullmatch(value):
        raise PydanticCustomError("option", "an option of sbatch without spaces is expected, such as --mail-type=FAIL")
    return value


def _line(value: str) -> str:
    if "\n" in value or not value.strip():
        raise PydanticCustomError("line", "one line of shell is expected")
    return value


Word = Annotated[str, AfterValidator(_word)]
Option = Annotated[str, AfterValidator(_option)]
Line = Annotated[str, AfterValidator(_line)]


class NodeConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What a node offers to a job."""

    cores: int = Field(ge=1)
    memory_gb: float = Field(gt=0, description="GiB that jobs may use")
    devices: int = Field(0, ge=0, description="accelerators; 0: ranks run on cores")
    device_memory_gb: float | None = Field(None, gt=0, description="GiB of one accelerator")
    gres: Word | None = Field(None, description="how Slurm names an accelerator; default: gpu")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.devices and self.device_memory_gb is None:
            raise ValueError(f"node.devices ({self.devices}) needs node.device_memory_gb, GiB of one accelerator")
        if not self.devices and (self.device_memory_gb is not None or self.gres is not None):
            raise ValueError("node.devices (0): node.device_memory_gb and node.gres say something of accelerators")
        return self


class RetryConfig(BaseModel, frozen=True, extra="forbid"):
    """How often a run is started again, by what ended it. What the user has to mend is never tried again."""

    restarts: int = Field(3, ge=0, description="in a row that save nothing new, whatever ended them")
    memory: int = Field(1, ge=0, description="after running out of memory")
    nonfinite: int = Field(1, ge=0, description="after a loss that is not finite, in case a machine computed wrongly")


class ClusterConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One cluster, or one partition of it."""

    name: Word
    node: NodeConfig
    hardware: Hardware | None = Field(None, description="of a device, or of a core; planning chooses layouts by it")
    max_nodes: int = Field(1, ge=1, description="nodes of one run")
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    options: tuple[Option, ...] = Field((), description="further options of sbatch")
    time_limit_hours: float = Field(gt=0, description="asked for by every run; longer runs go on in a next job")
    lead_seconds: int = Field(120, ge=10, description="warning before the time limit, in which all ranks save")
    throttle: int | None = Field(None, ge=1, description="runs of an array at a time")
    array_limit: int = Field(1000, ge=1, description="runs of one array; Slurm's MaxArraySize less one, or below")
    retry: RetryConfig = RetryConfig()
    setup: tuple[Line, ...] = Field((), description="lines of shell before anything starts, such as module load")
    environment: dict[str, str] = Field({}, description="variables of every rank")
    container: tuple[str, ...] = Field((), description="words before the ranks' Python, such as apptainer exec IMAGE")
    python: str | None = Field(None, description="the ranks' Python; default: the one that submits")
    interface: Word | None = Field(None, description="network interface that ranks talk over")
    storage: Path | None = Field(None, description="folder that all nodes see; studies go there unless --out says else")

    @property
    def seconds(self) -> float:
        """The time limit."""
        return self.time_limit_hours * _HOUR

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.node.devices else "cpu"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lead_seconds > self.seconds / 2:
            raise ValueError(
                f"lead_seconds ({self.lead_seconds}) is more than half of time_limit_hours ({self.time_limit_hours:g}, "
                f"{self.seconds:g} s); lower it, or ask for more time"
            )
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"environment: {name!r} is no name of a variable")
            if _OURS.fullmatch(name):
                raise ValueError(f"environment.{name}: set by Slurm or the launcher; remove it")
            if "\0" in value:
                raise ValueError(f"environment.{name}: a variable cannot hold a zero byte")
        if self.storage is not None and not self.storage.is_absolute():
            raise ValueError(f"storage ({self.storage}): an absolute path is expected")
        return self


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file: a path, or a name among the shipped ``configs/``. It is named after the file by default.

    Raises:
        UserError: no such file, or anything wrong with it.
    """
    found = path if path.is_file() else find_config(str(path), Path())
    content = load_yaml(found)
    content.setdefault("name", found.stem)
    return validate(ClusterConfig, content, str(found))
