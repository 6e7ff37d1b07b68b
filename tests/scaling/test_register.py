"""The register of predictions, and what becomes of them."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moescale.base.errors import UserError
from moescale.scaling import optimum_words, outcome_report
from moescale.scaling.expectation import Expected, expect
from moescale.scaling.fit import Fit, fit
from moescale.scaling.outcomes import outcomes, write_outcomes
from moescale.scaling.points import Point
from moescale.scaling.register import Prediction, Register, sha256_of


def noisy_power(points: int, seed: int, sd: float = 0.01, bootstrap: int = 100) -> Fit:
    """A power law fitted to points that scatter by ``sd``."""
    c = np.logspace(11, 13, points)
    loss = 30 * c**-0.08 * np.exp(sd * np.random.default_rng(seed).standard_normal(points))
    return fit("power", {"c": c}, loss, bootstrap=bootstrap)


def predicted(file: Path, run: str, **more: object) -> Prediction:
    """What a line of a register holds, from a fit in ``file``."""
    found = Fit.load(file)
    said = expect(found, {"c": 1e14})
    content = Prediction(
        run=run, scientific_hash="5c1e", variables={"c": 1e14}, columns={"c": "c"}, loss=said.loss, interval=said.holds,
        law=found.law, equation="", coefficients=found.values, fit=str(file), fit_sha256=sha256_of(file.read_bytes()),
        n_points=found.n_points, conventions=found.conventions, warnings=said.warnings, code_version="0",
        time="2026-01-01T00:00:00+00:00", steps=0, after=False,
    )  # fmt: skip
    return replace(content, **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    noisy_power(12, 0).save(tmp_path / "fit.json")
    return tmp_path / "fit.json"


@pytest.fixture
def register(tmp_path: Path, file: Path) -> Register:
    """A register of three predictions."""
    found = Register(tmp_path / "predictions.jsonl")
    for run in ("one", "two", "three"):
        found.append(predicted(file, run), file.read_bytes())
    return found


def test_the_interval_of_a_new_run_covers_at_its_rate() -> None:
    """100 laws of 12 points each; a new run a decade further must lie in the interval in 95 % of cases."""
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(100):
        loss = expect(noisy_power(12, seed, bootstrap=60), {"c": 1e14}).loss
        inside += loss.low <= 30 * 1e14**-0.08 * math.exp(0.01 * rng.standard_normal()) <= loss.high
    assert 0.90 <= inside / 100 <= 0.99


def test_seed_noise_widens_the_interval_where_the_fit_lies_closer_than_seeds() -> None:
    close = noisy_power(4, 3, sd=1e-4)
    alone, noisy = expect(close, {"c": 1e12}), expect(close, {"c": 1e12}, seed_sd=0.05)
    assert noisy.loss.high - noisy.loss.low > 0.15
    assert alone.loss.high - alone.loss.low < 0.05
    assert "seed noise" in noisy.holds
    assert "residual" in alone.holds


def test_a_fit_without_resamplings_predicts_nothing() -> None:
    with pytest.raises(UserError, match="--bootstrap"):
        expect(noisy_power(12, 0, bootstrap=0), {"c": 1e14})


def test_a_variable_outside_the_fitted_range_is_told() -> None:
    assert "c = 1e+14 is 10 x above" in expect(noisy_power(12, 0), {"c": 1e14}).warnings[0]


def test_what_was_registered_is_read_back_whole(register: Register, file: Path) -> None:
    entries = register.read()
    assert [entry.prediction.run for entry in entries] == ["one", "two", "three"]
    assert entries[1].prediction == predicted(file, "two")
    assert not any(entry.faults for entry in entries)
    assert register.fit_file(entries[0].prediction.fit_sha256).read_bytes() == file.read_bytes()


def test_a_changed_line_shows_and_nothing_is_added_to_it(register: Register, file: Path) -> None:
    lines = register.path.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["loss"]["value"] += 0.1
    register.path.write_text("\n".join([lines[0], json.dumps(changed), lines[2]]) + "\n")
    assert [bool(entry.faults) for entry in register.read()] == [False, True, False]
    with pytest.raises(UserError, match="line 2: its content was changed"):
        register.append(predicted(file, "four"), file.read_bytes())


def test_a_line_taken_out_shows_in_the_next(register: Register) -> None:
    lines = register.path.read_text().splitlines()
    register.path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert ["taken out" in " ".join(entry.faults) for entry in register.read()] == [False, True]


def test_a_fit_that_is_not_what_it_was_shows(register: Register) -> None:
    copy = register.fit_file(register.read()[0].prediction.fit_sha256)
    copy.write_bytes(copy.read_bytes() + b" ")
    assert all("was changed" in entry.faults[0] for entry in register.read())
    copy.unlink()
    assert all("is missing" in entry.faults[0] for entry in register.read())


def test_a_register_outlives_the_schema_of_fits(tmp_path: Path, file: Path) -> None:
    older = json.dumps({**json.loads(file.read_text()), "schema": 1}).encode()
    found = Register(tmp_path / "older.jsonl")
    found.append(replace(predicted(file, "one"), fit_sha256=sha256_of(older)), older)
    assert [entry.faults for entry in found.read()] == [()]


def test_half_a_line_of_a_killed_writer_harms_nothing(register: Register, file: Path) -> None:
    with register.path.open("ab") as torn:
        torn.write(b'{"schema": 1, "run": "to')
    register.append(predicted(file, "four"), file.read_bytes())
    entries = register.read()
    assert [entry.prediction.run for entry in entries] == ["one", "two", "three", "four"]
    assert not any(entry.faults for entry in entries)


def test_writers_at_once_make_one_chain(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "shared.jsonl"
    writers = [
        threading.Thread(target=lambda i=i: Register(path).append(predicted(file, f"run {i}"), file.read_bytes()))
        for i in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = Register(path).read()
    assert len(entries) == 8
    assert not any(entry.faults for entry in entries)


@pytest.mark.parametrize(("text", "word"), [('{"schema": 7}', "schema 7"), ('{"schema": 1}', "not a whole prediction")])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=word):
        Register(path).read()
    with pytest.raises(UserError, match=r"\.jsonl"):
        Register(tmp_path / "predictions")


def test_outcomes(tmp_path: Path, file: Path) -> None:
    """A test, a miss, one registered too late, one of another configuration, and one not measured yet."""
    register = Register(tmp_path / "predictions.jsonl")
    for run, more in (("hit", {}), ("miss", {}), ("late", {"steps": 40}), ("after", {"after": True, "steps": 60}),
                      ("other", {}), ("open", {})):  # fmt: skip
        register.append(predicted(file, run, **more), file.read_bytes())
    loss = register.read()[0].prediction.loss
    measured = {"hit": loss.value, "miss": loss.high + 0.1, "late": loss.value, "after": loss.value, "other": 2.0}
    points = [Point(run, "dense", loss=value) for run, value in measured.items()]
    hashes = dict.fromkeys(measured, "5c1e") | {"other": "07e4"}
    found = outcomes(register.read(), points, hashes, {"hit": 1.8e9})
    assert {one.run: one.counts for one in found} == {
        "hit": True, "miss": True, "late": False, "after": False, "other": False, "open": False,
    }  # fmt: skip
    assert [one.inside for one in found[:2]] == [True, False]
    assert found[1].error == pytest.approx(loss.high - loss.value + 0.1)
    assert found[0].ended == "2027-01-15T08:00:00+00:00"
    told = " ".join(optimum_words.predicted(found))
    assert "2 runs, 1 inside their 95 % intervals" in told
    assert "1 registered prediction not yet measured" in told
    assert "another configuration" in optimum_words.register_warnings(found)[0]
    picture = outcome_report.plot(found, points)
    assert picture is not None
    assert len(picture.rows) == 6
    assert outcome_report.plot([], points) is None
    write_outcomes(tmp_path / "predictions.csv", found)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 7
    assert isinstance(loss, Expected)
