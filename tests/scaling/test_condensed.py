"""Collecting reads no record that its run has condensed, and says the same as if it had read all of every one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from made_records import write_records

from moescale.base.errors import UserError
from moescale.launch.collect import Collected, collect
from moescale.launch.expansion import expand
from moescale.launch.study_config import load_study
from moescale.launch.study_folder import StudyFolder
from moescale.scaling.analysis import analyse
from moescale.scaling.condensed import CONDENSED, read_condensed
from moescale.scaling.record import RECORD

STEPS = 60


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """A study of a dense and a mixture family, done."""
    grid = {"model.shape": ["d16", "d32"], "training.seed": [0, 1]}
    content = {
        "run": {
            "data": {"domains": {"stdlib": {"source": "stdlib"}}},
            "training": {"seq": 64, "batch": 8, "steps": STEPS},
        },
        "lr_rule": {"base_lr": 0.01, "base_width": 64},
        "groups": {
            "dense": {"family": "dense", "grid": grid},
            "moe": {"family": "E4", "set": {"moe": {"experts": 8, "active": 2, "granularity": 2}}, "grid": grid},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    study = load_study(tmp_path / "study.yaml")
    expansion = expand(study)
    made = StudyFolder(tmp_path / "out")
    made.claim(study, expansion)
    write_records(made, expansion.runs, STEPS)
    return made


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file behind the back of whoever looks at sizes and times."""
    content, times = path.read_bytes(), path.stat()
    changed = change(content)
    assert len(changed) == len(content)
    assert changed != content
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def said(collected: Collected) -> tuple[object, ...]:
    found = analyse(collected.points, collected.records, collected.fits, [])
    return collected.points, collected.headlines(), found.gradient_noise, found.answered


def test_nothing_is_lost(folder):
    first, again, whole = collect(folder), collect(folder), collect(folder, whole=True)
    assert len(whole.points) == 8
    assert {len(record.steps) for record in whole.records.values()} == {STEPS}
    assert len(analyse(whole.points, whole.records, {}, []).gradient_noise) > 8
    assert said(first) == said(again) == said(whole)


def test_what_has_not_changed_is_not_read_again(folder):
    points = collect(folder).points
    rewrite(next(folder.path.glob(f"runs/*/{RECORD}")), lambda content: content.replace(b"step", b"pets"))
    assert collect(folder).points == points
    with pytest.raises(UserError, match="pets"):
        collect(folder, whole=True)


def test_what_has_changed_is(folder):
    points = {point.run: point for point in collect(folder).points}
    changed = next(folder.path.glob(f"runs/*/{RECORD}"))
    lines = changed.read_text().splitlines()
    evaluation = json.loads(lines[-2])
    changed.write_text("\n".join([*lines[:-2], json.dumps({**evaluation, "loss": 9.5}), lines[-1], ""]))
    now = {point.run: point for point in collect(folder).points}
    assert now[changed.parent.name].loss == 9.5
    assert {name for name in points if points[name] != now[name]} == {changed.parent.name}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"made_by": "other code"}', b"[]", b"\xff\xfe", None])
def test_what_is_damaged_or_missing_is_made_anew(damage, folder):
    points = collect(folder).points
    kept = next(folder.path.glob(f"runs/*/{CONDENSED}"))
    whole = kept.read_bytes()
    if damage is None:
        kept.unlink()
    else:
        kept.write_bytes(damage)
    assert collect(folder).points == points
    assert kept.read_bytes() == whole


def test_what_other_code_kept_is_not_believed(folder):
    kept = next(folder.path.glob(f"runs/*/{CONDENSED}"))
    whole = json.loads(kept.read_bytes())
    assert whole["content"]["point"]["loss"] != 9.5
    whole["content"]["point"]["loss"] = 9.5
    kept.write_text(json.dumps(whole))
    assert 9.5 in {point.loss for point in collect(folder).points}
    kept.write_text(json.dumps({**whole, "made_by": "other code"}))
    assert 9.5 not in {point.loss for point in collect(folder).points}


def test_a_run_that_is_gone_is_forgotten(folder):
    collect(folder)
    gone = next(folder.path.glob(f"runs/*/{RECORD}"))
    gone.unlink()
    (gone.parent / "status.json").unlink()
    assert gone.parent.name not in {point.run for point in collect(folder).points}


def test_nothing_is_left_of_a_run_that_has_not_begun(tmp_path):
    assert read_condensed(tmp_path) is None
    (tmp_path / RECORD).write_bytes(b"")
    assert read_condensed(tmp_path) is None
    assert not (tmp_path / CONDENSED).exists()
