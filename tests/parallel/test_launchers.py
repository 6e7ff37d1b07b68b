"""Who started a process and as which rank, by the variables that each launcher was seen to set.

Recorded from torch 2.13's torchrun, Slurm 22.05's sbatch, salloc and srun, Open MPI 5.0's and MPICH 5.0's mpirun.
"""

import pytest

from moescale.base.errors import UserError
from moescale.parallel.launchers import ALONE, FIRST_PORT, PORTS, Place, device_of, find_place, find_start

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
BATCH_SHELL = {
    "SLURMD_NODENAME": "node1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_NPROCS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
SALLOC_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NNODES": "2"}
SRUN = {
    **BATCH_SHELL,
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_STEPID": "5", "SLURM_STEP_ID": "5", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",  # of the host that called srun: not where rank 0 is
}  # fmt: skip
ONE_TASK = {
    **SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "node1",
}  # fmt: skip
ONE_TASK_A_NODE = {
    **SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NODELIST": "node[1-4]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "0", "PMIX_RANK": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
PMI_OF_SRUN = {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "13", "PMI_JOBID": "7.5"}

FOUND = {
    "nobody": ({}, "nobody", Place(0, 1, 0, 1)),
    "what libraries set for everybody": (
        {"LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "1"}, "nobody", Place(0, 1, 0, 1)
    ),
    "torchrun": (TORCHRUN, "torchrun", Place(3, 8, 1, 2)),
    "a batch script's own shell": (BATCH_SHELL, "nobody", Place(0, 1, 0, 1)),
    "salloc's shell": (SALLOC_SHELL, "nobody", Place(0, 1, 0, 1)),
    "srun": (SRUN, "srun", Place(2, 3, 0, 1)),
    "a step of one task": (ONE_TASK, "srun", Place(0, 1, 0, 1)),
    "srun --mpi=pmi2": ({**SRUN, **PMI_OF_SRUN}, "srun", Place(2, 3, 0, 1)),
    "Open MPI": (OPEN_MPI, "mpirun", Place(2, 4, 0, 2)),
    "Open MPI in an allocation": ({**ONE_TASK_A_NODE, **OPEN_MPI}, "mpirun", Place(2, 4, 0, 2)),
    "MPICH": (HYDRA, "mpirun", Place(2, 4, 0, 2)),
    "MPICH through srun": ({**ONE_TASK_A_NODE, **HYDRA}, "mpirun", Place(2, 4, 0, 2)),
    "torchrun on each node of a step": ({**ONE_TASK_A_NODE, **TORCHRUN}, "torchrun", Place(3, 8, 1, 2)),
    "torchrun in a batch script's shell": (
        {**BATCH_SHELL, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "torchrun", Place(3, 8, 1, 2)
    ),
    "torchrun in a step of one task": (
        {**ONE_TASK, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "torchrun", Place(3, 8, 1, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_who_started_a_process(case: str) -> None:
    environment, launcher, place = FOUND[case]
    start = find_start(environment)
    assert (start.launcher, start.place) == (launcher, place)
    assert find_place(environment) == place


def test_alone_is_alone() -> None:
    assert find_start({}) is ALONE


def test_where_rank_0_is() -> None:
    srun, mpirun, torchrun = find_start(SRUN), find_start(OPEN_MPI), find_start(TORCHRUN)
    assert (torchrun.address, torchrun.port, torchrun.served) == ("node1", 29500, True)
    assert srun.address == "node1"
    assert (srun.several_hosts, find_start(ONE_TASK).several_hosts) == (True, False)
    assert (mpirun.address, mpirun.port) == (None, None)
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    for environment in (SRUN, OPEN_MPI, HYDRA):
        start = find_start({**environment, **given})
        assert (start.address, start.port, start.served) == ("10.0.0.1", 4000, False)


def test_steps_beside_each_other_have_ports_of_their_own() -> None:
    def port(job: int, step: int) -> int | None:
        return find_start({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port

    ports = [port(job, step) for job in range(1_000_000, 1_000_020) for step in range(20)]
    assert len(set(ports)) == len(ports)
    assert all(found is not None and FIRST_PORT <= found < FIRST_PORT + PORTS for found in ports)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"])
def test_half_an_environment_of_torchrun(missing: str) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError, match=f"torchrun's .* but not {missing}; start with torchrun, or unset them"):
        find_start(environment)


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_STEP_NODELIST"])
def test_half_an_environment_of_srun(missing: str) -> None:
    """A container that passes on some variables only."""
    environment = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(UserError, match=f"srun's .* but not {missing}; let the container"):
        find_start(environment)


@pytest.mark.parametrize("missing", [*OPEN_MPI, *HYDRA])
def test_half_an_environment_of_mpirun(missing: str) -> None:
    whole = OPEN_MPI if missing in OPEN_MPI else HYDRA
    environment = {name: value for name, value in whole.items() if name != missing}
    if missing in ("OMPI_COMM_WORLD_NODE_RANK", "PMIX_RANK", "PMI_FD"):
        assert find_place(environment) == Place(2, 4, 0, 2)  # not needed
        return
    with pytest.raises(UserError, match=f"mpirun's .* but not {missing}"):
        find_start(environment)


REFUSED = {
    "rank beyond the world": ({**TORCHRUN, "RANK": "8"}, r"rank \(8\) must be below world \(8\)"),
    "local rank beyond the host": ({**TORCHRUN, "LOCAL_RANK": "2"}, r"local rank \(2\) must be below local world"),
    "a host larger than the world": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, r"local world \(4\)"
    ),
    "no number": ({**TORCHRUN, "RANK": "first"}, r"RANK \('first'\) must be a whole number"),
    "a negative number": ({**TORCHRUN, "LOCAL_RANK": "-1"}, r"LOCAL_RANK \('-1'\) must be a whole number"),
    "a node that is not in the step": ({**SRUN, "SLURM_NODEID": "2"}, r"SLURM_NODEID \(2\) must be below the 2 nodes"),
    "counts that cannot be read": ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "'two' is not a list of task counts"),
    "worlds of one: torchrun alone in each task": (
        {**ONE_TASK_A_NODE, **TORCHRUN, "GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "2", "RANK": "0"},
        r"alone \(GROUP_WORLD_SIZE 1, WORLD_SIZE 2\) in each of the 4 tasks of srun.*--nnodes 4",
    ),
    "worlds of one: torchrun alone in each process of mpirun": (
        {**OPEN_MPI, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "in each of the 4 processes of mpirun"
    ),
    "worlds of one: by hand": (
        {
            **SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
        },
        r"WORLD_SIZE \(1\) says that there are fewer ranks than the 3 tasks of srun",
    ),
    "every task of a node the same rank": (
        {
            **SRUN, "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
        },
        r"RANK \(0\) and the rank by srun \(2\) disagree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_environments_that_contradict_themselves(case: str) -> None:
    environment, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        find_start(environment)


@pytest.mark.parametrize(
    ("place", "devices", "mine"), [((5, 8, 1, 4), 4, 1), ((5, 8, 1, 4), 8, 1), ((5, 8, 1, 4), 1, 0)]
)
def test_a_rank_has_a_device_of_its_own(place: tuple[int, int, int, int], devices: int, mine: int) -> None:
    """One visible device is what Slurm's --gpus-per-task leaves to each task."""
    assert device_of(Place(*place), devices) == mine


def test_fewer_devices_than_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 ranks on .* have 2 devices"):
        device_of(Place(5, 8, 1, 4), 2)
