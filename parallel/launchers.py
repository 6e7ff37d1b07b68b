"""Who started this process, and which rank that makes it: torchrun, mpirun, srun, or nobody.

Every launcher says it in environment variables of its own; nothing here talks to another process. Each has a function
that reads its variables, in one table. One launcher often runs under another (torchrun or mpirun as tasks of srun); the
innermost decides, since it is the one that started the processes which train.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..base.errors import UserError
from .slurm_names import expand_counts, expand_hosts

Environment = Mapping[str, str]
FIRST_PORT, PORTS = 15_000, 14_000  # below torchrun's 29400 and 29500, and the ports that Linux gives out by itself


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    world: int
    local_rank: int
    local_world: int


@dataclass(frozen=True)
class Start:
    """What a launcher says of this process.

    Attributes:
        launcher: as errors call it.
        processes: that the launcher itself started: agents of torchrun, tasks of srun, ranks of mpirun.
        several_hosts: whether it started them on more than one.
        address: where rank 0 is, as a name or number; None where the ranks have to agree on it.
        port: None where the ranks have to agree on it.
        source: where ``address`` comes from, for errors.
        served: whether the launcher itself serves the store at that address.
    """

    launcher: str
    place: Place
    processes: int
    several_hosts: bool = False
    address: str | None = None
    port: int | None = None
    source: str = "MASTER_ADDR"
    served: bool = False


ALONE = Start("nobody", Place(0, 1, 0, 1), 1)


def find_start(environment: Environment = os.environ) -> Start:
    """Who started this process and as which rank.

    Raises:
        UserError: a launcher's variables are there in part or make no sense, or two launchers contradict each other. A
            world of one by mistake would train as many separate models as there are processes.
    """
    starts = [start for read in LAUNCHERS if (start := read(environment)) is not None]
    if not starts:
        return ALONE
    inner = starts[0]
    _check(inner)
    if inner.launcher == "torchrun":
        for outer in starts[1:]:
            _check_under(inner, outer, started_by_hand="GROUP_WORLD_SIZE" not in environment)
    return inner


def find_place(environment: Environment = os.environ) -> Place:
    """This process's rank.

    Raises:
        UserError: as `find_start`.
    """
    return find_start(environment).place


def device_of(place: Place, devices: int) -> int:
    """The device for a rank, among the ``devices`` that this process sees.

    Slurm may show each task only its own (--gpus-per-task), which is number 0 to all of them.

    Raises:
        UserError: there are fewer devices than ranks on this host.
    """
    if devices == 1:  # where ranks would share it NCCL refuses
        return 0
    if devices < place.local_world:
        raise UserError(
            f"{place.local_world} ranks on {socket.gethostname()} have {devices} devices; start as many ranks on each "
            "host as it has devices, or make all of them visible (CUDA_VISIBLE_DEVICES)"
        )
    return place.local_rank


def read_torchrun(environment: Environment) -> Start | None:
    """torchrun's variables, or the same set by hand.

    LOCAL_RANK or the address alone make no rank: libraries and clusters set them for everybody.
    """
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    _require("torchrun", names, environment, "start with torchrun, or unset them")
    place = Place(*(_number(environment, name) for name in names[:2] + names[2:4]))
    return Start(
        "torchrun",
        place,
        _number(environment, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in environment else place.world,
        several_hosts=place.local_world < place.world,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def read_open_mpi(environment: Environment) -> Start | None:
    """Open MPI's mpirun."""
    prefix = "OMPI_COMM_WORLD_"
    names = tuple(prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    if not set(names) & environment.keys():
        return None
    return _read_mpi(names, environment)


def read_hydra(environment: Environment) -> Start | None:
    """The mpirun of MPICH and of Intel MPI.

    srun gives PMI_RANK and PMI_SIZE to its tasks too (--mpi=pmi2), but not the local ones; then srun is the launcher.
    """
    if not {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"} & environment.keys():
        return None
    if "MPI_LOCALRANKID" not in environment and _STEP & environment.keys():
        return None
    return _read_mpi(("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), environment)


def read_srun(environment: Environment) -> Start | None:
    """A task of a job step.

    SLURM_PROCID and SLURM_NTASKS prove nothing: the shell of a batch script has PROCID 0 and the NTASKS that were
    asked for, and salloc's shell has NTASKS, though srun has started nothing in either. Only srun sets the variables
    of a step. (The shell that salloc starts on a node where LaunchParameters=use_interactive_step is a step of one
    task, so what runs in it is alone, which is right.)
    """
    if not _STEP & environment.keys():
        return None
    names = (
        *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"),
        *("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    )
    _require("srun", names, environment, "let the container or wrapper pass on all of Slurm's variables")
    node, tasks = _number(environment, "SLURM_NODEID"), expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    if node >= len(tasks):
        raise UserError(
            f"SLURM_NODEID ({node}) must be below the {len(tasks)} nodes of SLURM_STEP_TASKS_PER_NODE "
            f"({environment['SLURM_STEP_TASKS_PER_NODE']}); start the step anew with srun"
        )
    rank, world, local_rank = (_number(environment, name) for name in names[:3])
    given = "MASTER_ADDR" in environment
    return Start(
        "srun",
        Place(rank, world, local_rank, tasks[node]),
        world,
        several_hosts=len(tasks) > 1,
        address=environment["MASTER_ADDR"] if given else expand_hosts(environment["SLURM_STEP_NODELIST"])[0],
        port=_number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else _port_of_step(environment),
        source="MASTER_ADDR" if given else "first of SLURM_STEP_NODELIST",
    )


# Innermost first.
LAUNCHERS: tuple[Callable[[Environment], Start | None], ...] = (read_torchrun, read_open_mpi, read_hydra, read_srun)
_STEP = {"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"}


def _read_mpi(names: tuple[str, ...], environment: Environment) -> Start:
    """Rank, world, local rank and local world from ``names``; the address where the user gives one."""
    _require("mpirun", names, environment, "start with mpirun, and let it pass on its variables")
    place = Place(*(_number(environment, name) for name in names))
    return Start(
        "mpirun",
        place,
        place.world,
        several_hosts=place.local_world < place.world,
        address=environment.get("MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None,
    )


def _port_of_step(environment: Environment) -> int:
    """The same for all tasks of a step, and another for other steps of the job and for jobs beside it."""
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return FIRST_PORT + (31 * job + step) % PORTS


def _require(launcher: str, names: tuple[str, ...], environment: Environment, advice: str) -> None:
    given, missing = [n for n in names if n in environment], [n for n in names if n not in environment]
    if missing:
        raise UserError(f"the environment gives {launcher}'s {', '.join(given)} but not {', '.join(missing)}; {advice}")


def _number(environment: Environment, name: str) -> int:
    if not (environment[name].isascii() and environment[name].isdigit()):
        raise UserError(f"{name} ({environment[name]!r}) must be a whole number; its launcher sets it")
    return int(environment[name])


def _check(start: Start) -> None:
    """Numbers that fit together."""
    place = start.place
    for what, value, limit, bound in (
        ("rank", place.rank, "world", place.world),
        ("local rank", place.local_rank, "local world", place.local_world),
        ("local world", place.local_world, "world plus one", place.world + 1),
    ):
        if value >= bound:
            raise UserError(f"{start.launcher}: {what} ({value}) must be below {limit} ({bound}); start all ranks anew")
    if place.local_world < 1:
        raise UserError(f"{start.launcher}: local world ({place.local_world}) must be at least 1; start all ranks anew")


def _check_under(inner: Start, outer: Start, started_by_hand: bool) -> None:
    """Refuse a world that is a part of what another launcher started around it."""
    here, around = inner.place, outer.place
    count = f"{outer.processes} {'tasks' if outer.launcher == 'srun' else 'processes'} of {outer.launcher}"
    if started_by_hand and here.world < outer.processes:
        raise UserError(
            f"WORLD_SIZE ({here.world}) says that there are fewer ranks than the {count}: each would train a model of "
            f"its own. Unset RANK and WORLD_SIZE and let {outer.launcher} number them, or start separate runs in "
            "separate steps (srun --ntasks 1)"
        )
    if started_by_hand and here.world == outer.processes and here.rank != around.rank:
        raise UserError(
            f"RANK ({here.rank}) and the rank by {outer.launcher} ({around.rank}) disagree though both count "
            f"{here.world} ranks; unset RANK and WORLD_SIZE and let {outer.launcher} number them"
        )
    if not started_by_hand and inner.processes == 1 and outer.processes > 1:
        raise UserError(
            f"torchrun believes to be alone (GROUP_WORLD_SIZE 1, WORLD_SIZE {here.world}) in each of the {count}: "
            f"each would train a model of its own. Give torchrun --nnodes {outer.processes} and one rendezvous "
            "(--master-addr, --node-rank) with one task on each node, or leave torchrun out"
        )
