"""A study on a GPU: its warm parent forks runs that use the device, which CUDA allows only if the parent has not."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from moescale.training.status import read_status

pytestmark = pytest.mark.gpu


def test_runs_side_by_side(work, moescale, tmp_path: Path):
    moe = {"experts": 4, "active": 2, "granularity": 2}
    study = {
        "run": {"extends": str(work / "base.yaml"), "training": {"steps": 4}},
        "workers": 2,
        "groups": {
            "dense": {"family": "dense", "grid": {"training.seed": [0, 1]}},
            "moe": {
                "family": "E4",
                "set": {"moe": moe},
                "grid": {"training.seed": [0, 1]},
            },
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    ended = moescale("study", "run", tmp_path / "study.yaml", "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    runs = sorted((tmp_path / "out/runs").iterdir())
    assert len(runs) == 4
    for run in runs:
        status = read_status(run)
        assert status is not None
        assert status.state == "done"
        assert json.loads((run / "environment.json").read_text())["cuda"] == torch.version.cuda
