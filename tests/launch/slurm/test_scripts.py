"""Batch scripts: what people named is data to the shell, and directives stand where sbatch reads them."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescale.launch.cluster_config import ClusterConfig
from moescale.launch.slurm.scripts import Place, prepare_script, report_script, runs_script
from moescale.launch.slurm.shapes import Batch, Shape

NODE: dict[str, Any] = {"cores": 8, "memory_gb": 16}
GPU_NODE = {**NODE, "devices": 4, "device_memory_gb": 80}
# Whatever a file system takes, without the bytes that an argument cannot hold.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
NASTY = ["a b", "'", '"', "$(touch pwned)", "`id`", "a\nb", "--help", "*", "\\", "x;y", "!!", "é", "#", "~", "${HOME}"]


def cluster(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"name": "c", "node": NODE, "time_limit_hours": 2, **changes})


def place(folder: str = "/studies/mine", cwd: str = "/", **changes: Any) -> Place:
    tag, logs = "moescale:mine:0:001", "slurm/001"
    return Place("mine", Path(folder), Path(cwd), "/usr/bin/python3", tag, logs, cluster(**changes))


def batch(*runs: str, nodes: int = 1, ranks: int = 1, devices: int = 0) -> Batch:
    return Batch("runs-1", Shape(nodes, ranks, 2, 2048, devices, 120), runs)


def bash(script: str, index: int, tmp_path: Path) -> list[str]:
    """Run a script up to its last command, with every program that it calls replaced; what it would have executed."""
    prelude = "show() { printf '%s\\0' \"$@\"; }\nscontrol() { echo NodeAddr=10.0.0.1; }\n"
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": str(index), "SLURM_NNODES": "2"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    command = ["bash", "-c", prelude + script.replace("\nexec ", "\nshow ")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(TEXT, min_size=1, max_size=2), folder=TEXT, value=TEXT, words=st.lists(TEXT, max_size=2))
def test_names_folders_and_values_are_data(
    names: list[str], folder: str, value: str, words: list[str], tmp_path: Path
) -> None:
    check(names, folder, value, words, tmp_path)


@pytest.mark.parametrize("text", NASTY)
def test_known_tricks_are_data(text: str, tmp_path: Path) -> None:
    check([text], text, text, [text], tmp_path)


def check(names: list[str], folder: str, value: str, words: list[str], tmp_path: Path) -> None:
    study = f"{tmp_path}/{folder}"
    there = place(study, str(tmp_path), environment={"MINE": value}, container=words, python="py thon")
    script = runs_script(there, batch(*names))
    for index, name in enumerate(names):
        executed = bash(script + '\nprintf "%s\\0" "$MINE"\n', index, tmp_path)
        run = f"{Path(study)}/runs/{name}"
        assert executed[:4] == ["/usr/bin/python3", "-m", "moescale.launch.slurm.supervise", run]
        rank = [*words, "py thon", "-m", "moescale", "train", f"{run}/config.yaml", "--out", run]
        assert executed[-len(rank) - 1 :] == [*rank, value]
    assert list(tmp_path.iterdir()) == []  # nothing was executed


def test_several_nodes_start_torchrun_with_ranks_in_the_order_of_nodes(tmp_path: Path) -> None:
    script = runs_script(place(node=GPU_NODE, max_nodes=2), batch("a", nodes=2, ranks=4, devices=4))
    executed = bash(script, 0, tmp_path)
    assert "srun" in executed
    assert "PET_NODE_RANK=$SLURM_NODEID" in executed[executed.index("bash") + 2]
    words = " ".join(executed)
    assert "--nnodes 2 --nproc-per-node 4 --master-addr 10.0.0.1 --master-port 20007 -m moescale train" in words
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8" in words


@pytest.mark.parametrize("kind", ["runs", "prepare", "report"])
def test_directives_come_first_and_hold_no_spaces(kind: str) -> None:
    there = place(
        "/a 'b'", partition="gpu", account="me", options=["--mail-type=FAIL"], throttle=3, setup=["module load x"],
        node=GPU_NODE,
    )  # fmt: skip
    script = {
        "runs": lambda: runs_script(there, batch("a", "b", "c", devices=1)),
        "prepare": lambda: prepare_script(there, ["a"]),
        "report": lambda: report_script(there),
    }[kind]()
    assert script.startswith("#!/bin/bash\n")
    lines = script.splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in directives)
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[first_command] == "module load x"
    assert max(n for n, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
    assert {"#SBATCH --partition=gpu", "#SBATCH --account=me", "#SBATCH --mail-type=FAIL"} <= set(directives)
    if kind == "runs":
        assert "#SBATCH --array=0-2%3" in directives
        assert "#SBATCH --gres=gpu:1" in directives
        assert "#SBATCH --signal=B:USR1@120" in directives
        assert "#SBATCH --time=120" in directives
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert max(map(len, lines)) <= 140
