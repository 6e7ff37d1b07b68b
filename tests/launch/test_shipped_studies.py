"""Every study file that is shipped plans."""

import pytest

from moescale.base.config import SHIPPED
from moescale.launch.expansion import expand
from moescale.launch.plan import plan_study
from moescale.launch.study_config import load_study
from moescale.launch.study_folder import StudyFolder

BASES = ("studies/evening/base.yaml", "studies/ladder/base.yaml", "studies/papers/base.yaml")
PARTS = {"evening": ("scaling", "sparsity", "batch"), "ladder": ("sizes", "mixtures", "batch", "again")}
STUDIES = sorted(str(path.relative_to(SHIPPED)) for path in (SHIPPED / "studies").rglob("*.yaml"))


def plan(name, *overrides):
    study = load_study(SHIPPED / name, list(overrides))
    return plan_study(study, expand(study), world=None)


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in BASES])
def test_a_shipped_study_plans_without_an_impossible_run(name):
    planned = plan(name)
    assert planned.rows
    assert not planned.impossible


def test_the_quickstart_is_as_large_as_it_says():
    rows = plan("studies/quickstart.yaml").rows
    scaling = [row for row in rows if not row.check]
    assert len(scaling) >= 24
    assert len({row.n_active for row in scaling if row.family == "dense"}) >= 4
    assert len({float(f"{row.flops:.1g}") for row in scaling}) >= 3
    assert {"dense", "E8G4", "E8G2", "E4G2", "E16G2"} == {row.family for row in scaling}
    for family in ("dense", "E8G4"):
        assert {f"{family}-d48-3e11-s{seed}" for seed in range(5)} <= {row.name for row in scaling}


@pytest.mark.parametrize("study", PARTS)
def test_a_study_in_parts_is_their_union_and_none_is_long(study):
    parts = [plan(f"studies/{study}/{name}.yaml").rows for name in PARTS[study]]
    whole = {row.name for row in plan(f"studies/{study}.yaml").rows}
    assert whole == {row.name for rows in parts for row in rows}
    assert all(sum(row.seconds for row in rows) / 2 < 50 * 60 for rows in parts)


@pytest.mark.parametrize("study", PARTS)
def test_parts_and_their_union_work_in_one_folder(study, tmp_path):
    folder = StudyFolder(tmp_path)
    for name in (*(f"{study}/{part}" for part in PARTS[study]), study):
        shipped = load_study(SHIPPED / f"studies/{name}.yaml")
        folder.claim(shipped, expand(shipped))
    assert len(folder.open()[1].runs) == len(plan(f"studies/{study}.yaml").rows)


@pytest.mark.parametrize("name", ["dense-vs-moe", "sparsity"])
def test_a_paper_shrinks_to_a_laptop(name):
    laptop = [
        "scale=1e-7" if name == "dense-vs-moe" else "scale=1e-8",
        "run.training.seq=128",
        "run.training.dtype=fp32",
        "run.data.tokenizer.vocab=1024",
        "run.data.domains.corpus.source=stdlib",
        "run.data.domains.corpus.files=[]",
    ]
    whole, small = plan(f"studies/papers/{name}.yaml"), plan(f"studies/papers/{name}.yaml", *laptop)
    assert len(small.rows) == len(whole.rows)
    assert small.seconds / 3600 < 24
