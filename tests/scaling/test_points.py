"""Points: from records, to CSV and back, and from other people's tables."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.scaling.analysis import analyse
from moescale.scaling.cells import finished
from moescale.scaling.findings import findings, warnings_of
from moescale.scaling.laws import LAWS
from moescale.scaling.points import Point, mapped, point_from_record, read_points, variables_of, write_points
from moescale.scaling.record import Record, RecordWriter, read_record


def recorded(folder: Path, lines: SimpleNamespace, *, state: str | None = "done", **header: object) -> Record:
    writer = RecordWriter(folder)
    writer.header(lines.header(**header))
    for number in range(1, 21):
        parts = {"g2": 0.5, "trace": 100.0 * number, "b_simple": 200.0 * number}
        noise = {"all": parts, "dense": parts, "expert": None, "b_small": 64.0, "b_big": 512.0}
        writer.step(lines.step(number, 5 - 0.1 * number, lr=0.01 * number, noise=noise if number % 10 == 0 else None))
        writer.eval(lines.evaluation(number, 5.5 - 0.1 * number))
    writer.eval(lines.evaluation(20, 9.0, "topics"))
    if state:
        writer.end(lines.ending(20, state, "" if state == "done" else "said why"))
    writer.close()
    return read_record(folder, strict=True)


def test_a_dense_run(tmp_path: Path, lines: SimpleNamespace) -> None:
    point = point_from_record(recorded(tmp_path, lines, seed=3), "a", "dense")
    assert point == Point(
        run="a", family="dense", state="done", seed=3, n_total=50_000, n_active=50_000, n_embedding=32_768,
        n_router=0, d=20 * 512, c=20 * 2.56e8, c_6nd=300_000.0 * 20 * 512, e=1, k=1, g=1, s=0, shared=0, b=512, lr=0.2,
        loss=pytest.approx(3.5), train_loss=pytest.approx((3.0 + 3.1) / 2), bits_per_byte=pytest.approx(0.62 * 3.5),
        b_simple=pytest.approx(4000.0), tokens_per_second=pytest.approx(51_200.0), seconds=pytest.approx(0.2),
    )  # fmt: skip


def test_a_mixture(tmp_path: Path, lines: SimpleNamespace) -> None:
    mixture = {"experts": 32, "active": 4, "granularity": 2.0, "shared": 1, "layers": 2}
    point = point_from_record(recorded(tmp_path, lines, mixture=mixture), "a", "E8G2")
    assert (point.e, point.k, point.g, point.s, point.shared) == (32, 4, 2.0, 0.875, 1)


@pytest.mark.parametrize(("said", "future"), [("never", ""), ("training", "training"), ("always", "always")])
def test_routing_that_sees_later_tokens(tmp_path: Path, lines: SimpleNamespace, said: str, future: str) -> None:
    """It is told, goes through the table, and is compared with nothing if evaluation sees them too."""
    mixture = {"experts": 32, "active": 4, "granularity": 2.0, "shared": 0, "layers": 2, "future": said}
    point = point_from_record(recorded(tmp_path, lines, mixture=mixture), "a", "E8G2")
    assert point.future == future
    write_points(tmp_path / "points.csv", [point])
    assert read_points(tmp_path / "points.csv") == [point]
    assert len(finished([point])) == (said != "always")
    told = findings(analyse([point], {}, {})) + warnings_of(analyse([point], {}, {}))
    assert sum("uses future tokens" in text for text in told) == 2 * bool(future)
    if said == "always":
        with pytest.raises(UserError, match="no finished run"):
            variables_of([point], LAWS["chinchilla"])


@pytest.mark.parametrize(("state", "expected"), [("failed", "failed"), ("preempted", "preempted"), (None, "running")])
def test_an_unfinished_run_has_no_loss(tmp_path: Path, lines: SimpleNamespace, state: str, expected: str) -> None:
    point = point_from_record(recorded(tmp_path, lines, state=state), "a", "dense")
    assert (point.state, point.loss) == (expected, None)
    assert point.why == ("said why" if state else "")
    with pytest.raises(UserError, match="no finished run"):
        variables_of([point], LAWS["chinchilla"])


def test_a_record_without_a_header_is_refused() -> None:
    with pytest.raises(UserError, match="run a: its record has no header"):
        point_from_record(Record(), "a", "dense")


def test_a_run_that_checks_a_rate_is_marked_and_left_out_of_fits(tmp_path: Path, lines: SimpleNamespace) -> None:
    point = point_from_record(recorded(tmp_path / "run", lines), "a", "dense", "lr")
    assert point.check == "lr"
    plain = replace(point, run="b", check="")
    assert variables_of([point, plain], LAWS["chinchilla"])[2] == [plain]
    write_points(tmp_path / "points.csv", [point, plain])
    assert read_points(tmp_path / "points.csv") == [point, plain]


def test_tables_without_checks_are_read_and_unknown_checks_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("run,family,state,why,seed,loss\na,dense,done,,0,3.5\n")
    assert read_points(path) == [Point(run="a", family="dense", seed=0, loss=3.5)]
    path.write_text("run,check,loss\na,,3.5\nb,ok,3.5\n")
    with pytest.raises(UserError, match="row 2, column check: 'ok' is not known; it is empty or lr"):
        read_points(path)


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20).map(str.strip)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)  # writing waits for the disk
@given(run=texts.filter(bool), why=texts, seed=st.none() | st.integers(0, 2**31), loss=numbers, c=numbers)
def test_writing_and_reading_give_the_points_back(
    tmp_path_factory: pytest.TempPathFactory, run: str, why: str, seed: int | None, loss: float | None, c: float | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "points.csv"
    points = [Point(run=run, family="a,b", why=why, seed=seed, loss=loss, c=c), Point(run="second", n=1 / 3)]
    write_points(path, points)
    assert read_points(path) == points


def test_a_foreign_table_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("\ufeffparams,tok,Final loss,note\n1e6, 2e7 ,3.5,x\n2e6,4e7,3.25,\n")
    points = read_points(path, {"n": "params", "d": "tok", "loss": "Final loss"})
    variables, loss, used = variables_of(points, LAWS["chinchilla"])
    np.testing.assert_array_equal(variables["n"], [1e6, 2e6])
    np.testing.assert_array_equal(variables["d"], [2e7, 4e7])
    np.testing.assert_array_equal(loss, [3.5, 3.25])
    assert [point.run for point in used] == ["row 1", "row 2"]


def test_n_is_what_the_law_counts(study: SimpleNamespace) -> None:
    points = [point for point in study.points if point.family == "E8G4"]
    assert variables_of(points, LAWS["chinchilla"])[0]["n"][0] == points[0].n_active
    assert variables_of(points, LAWS["sparsity"])[0]["n"][0] == points[0].n_total
    one = [replace(point, n=7.0) for point in points]
    assert variables_of(one, LAWS["sparsity"])[0]["n"][0] == 7.0


def test_a_column_stands_for_a_variable_of_our_own_laws_and_of_others() -> None:
    point = mapped(Point(run="a", family="dense", n_total=8, n_active=2), {"n": "n_total", "width": "n_active"})
    assert (point.n, point.number("width"), point.n_total) == (8, 2, 8)


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("n,d,loss\n1e6,2e7,3.5\n2e6,many,3.25\n")
    with pytest.raises(UserError, match=r"row 2, column d: 'many' is not a number"):
        read_points(path)
    with pytest.raises(UserError, match="has no column tokens; it has n, d, loss"):
        read_points(path, {"d": "tokens"})
    with pytest.raises(UserError, match="--map x=n: x is not known"):
        read_points(path, {"x": "n"})
    path.write_text("n,d\n1e6,2e7\n")
    with pytest.raises(UserError, match="no column loss"):
        read_points(path)
    path.write_text("n,d,loss\n")
    with pytest.raises(UserError, match="no rows"):
        read_points(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "nothing.csv")
    path.write_text("n,d,loss\n1e6,,3.5\n")
    with pytest.raises(UserError, match="run row 1: no d, which law chinchilla needs"):
        variables_of(read_points(path), LAWS["chinchilla"])
