"""Cluster files: the shipped ones are good, and a mistake is named with its field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moescale.base.config import SHIPPED
from moescale.base.errors import UserError
from moescale.launch.cluster_config import load_cluster

GOOD: dict[str, Any] = {"node": {"cores": 4, "memory_gb": 8}, "time_limit_hours": 1}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


@pytest.mark.parametrize("name", sorted(path.name for path in (SHIPPED / "clusters").iterdir()))
def test_shipped_clusters_are_found_by_name(name: str) -> None:
    cluster = load_cluster(Path("clusters") / name)
    assert cluster.name == name.removesuffix(".yaml")
    assert cluster.kind == ("cuda" if "100" in name else "cpu")


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path))
    assert (cluster.name, cluster.seconds, cluster.retry.restarts) == ("mine", 3600, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partitoin": "gpu"}, "partitoin: unknown key; did you mean partition?"),
        ({"partition": "gpu; rm -rf /"}, "partition ('gpu; rm -rf /'): "),
        ({"account": "a b"}, "one word of letters"),
        ({"qos": "$(id)"}, "qos ('$(id)')"),
        ({"options": ["--mail-type=END", "-c 3"]}, "options.1 ('-c 3')"),
        ({"options": ["--comment=a\n#SBATCH --uid=0"]}, "options.0"),
        ({"setup": ["module load a\nrm b"]}, "one line of shell is expected"),
        ({"environment": {"A-B": "1"}}, "environment: 'A-B' is no name of a variable"),
        ({"environment": {"RANK": "0"}}, "environment.RANK: set by Slurm or the launcher"),
        ({"environment": {"A": 1}}, "environment.A (1)"),
        ({"node": {"cores": 0, "memory_gb": 8}}, "node.cores (0)"),
        ({"node": {"cores": 8, "memory_gb": 8, "devices": 4}}, "node.devices (4) needs node.device_memory_gb"),
        ({"node": {"cores": 8, "memory_gb": 8, "gres": "gpu"}}, "node.devices (0)"),
        ({"time_limit_hours": 0.01, "lead_seconds": 30}, "lead_seconds (30) is more than half of time_limit_hours"),
        ({"time_limit_hours": float("inf")}, "time_limit_hours"),
        ({"time_limit_hours": None}, "time_limit_hours (None)"),
        ({"storage": "studies"}, "storage (studies): an absolute path is expected"),
        ({"retry": {"restarts": -1}}, "retry.restarts (-1)"),
        ({"throttle": 0}, "throttle (0)"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_cluster(write(tmp_path, **changes))
    assert words in str(raised.value)
    assert "mine.yaml" in str(raised.value)


def test_a_missing_file_is_said_to_be_missing() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_cluster(Path("nowhere.yaml"))
