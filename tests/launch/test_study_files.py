"""Study files: extends, and overrides that reach into runs and groups."""

from pathlib import Path

import pytest
import yaml

from moescale.base.config import SHIPPED
from moescale.base.errors import UserError
from moescale.launch.expansion import expand
from moescale.launch.study_config import load_study

BASE = "model: {shape: d16}\ntraining: {seq: 32, batch: 2, steps: 4}\n"
STUDY = """
run:
  extends: base.yaml
  training: {batch: 4}
  data: {domains: {stdlib: {source: stdlib}}}
lr_rule: {base_lr: 0.01, base_width: 64}
groups:
  sizes: {family: dense, grid: {model.shape: [d16, d32]}}
  seeds: {family: dense, set: {training: {steps: 8}}, grid: {training.seed: [0, 1]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def names(file: Path, *overrides: str) -> list[str]:
    return [run.name for run in expand(load_study(file, list(overrides))).runs]


def test_extends_inside_run(folder):
    study = load_study(folder / "study.yaml", ["run.training.seed=7", "groups.seeds.family=other"])
    runs = {run.name: run.config for run in expand(study).runs}
    assert sorted(runs) == ["dense-d16-4steps-s7", "dense-d32-4steps-s7", "other-d16-8steps-s0", "other-d16-8steps-s1"]
    assert {config.training.batch for config in runs.values()} == {4}


def test_a_study_extends_another(folder):
    (folder / "more.yaml").write_text(
        "extends: study.yaml\n"
        "run: {training: {batch: 8}}\n"
        "lr_rule: {power: 0.5}\n"
        "groups:\n"
        "  seeds: {grid: {training.seed: [5]}}\n"
        "  moe: {family: E8, set: {moe: {active: 2, experts: 8, granularity: 2}}}\n"
    )
    study = load_study(folder / "more.yaml")
    assert study.name == "more"
    assert list(study.groups) == ["sizes", "seeds", "moe"]
    runs = {run.name: run.config for run in expand(study).runs}
    assert sorted(runs) == ["E8-d16-4steps-s0", "dense-d16-4steps-s0", "dense-d16-8steps-s5", "dense-d32-4steps-s0"]
    assert {config.training.batch for config in runs.values()} == {8}
    assert runs["E8-d16-4steps-s0"].optimizer.lr == 0.02


def test_shipped_studies_can_be_extended(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: studies/smoke.yaml\nrun: {training: {batch: 8}}\n")
    mine, smoke = (load_study(path) for path in (tmp_path / "mine.yaml", SHIPPED / "studies" / "smoke.yaml"))
    assert mine.groups == smoke.groups
    assert {run.config.training.batch for run in expand(mine).runs} == {8}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["groups.sizes.grid.model.shape=[d48]", "groups.seeds.grid.training.seed=[2]"],
         ["dense-d16-8steps-s2", "dense-d48-4steps-s0"]),
        (["groups.sizes.set.training.seed=3", "groups.seeds.set.training.steps=9"],
         ["dense-d16-4steps-s3", "dense-d16-9steps-s0", "dense-d16-9steps-s1", "dense-d32-4steps-s3"]),
        (["groups.seeds.exclude=[{training.seed: 1}]", "groups.sizes.grid.training.batch=[2]"],
         ["dense-d16-4steps-b2-s0", "dense-d16-8steps-s0", "dense-d32-4steps-b2-s0"]),
        (["groups.sizes.grid.model.shape, training.batch=[[d48, 2]]", "groups.sizes.grid.model.shape=[d48]"], None),
        (["run.training.tokens=512", "groups.seeds.set.training.steps=null"],
         ["dense-d16-512tok-s0", "dense-d16-512tok-s1", "dense-d32-512tok-s0"]),
    ],
)  # fmt: skip
def test_overrides_reach_into_runs_and_groups(folder, overrides, expected):
    if expected is None:
        with pytest.raises(UserError, match="swept by two axes"):
            names(folder / "study.yaml", *overrides)
    else:
        assert names(folder / "study.yaml", *overrides) == expected


def test_a_resolved_study_reads_back_as_it_was(folder):
    study = load_study(folder / "study.yaml", ["scale=0.5", "groups.sizes.include=[{model.shape: [d16, d32]}]"])
    (folder / "resolved.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))
    assert load_study(folder / "resolved.yaml") == study
