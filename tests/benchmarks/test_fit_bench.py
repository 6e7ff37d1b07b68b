"""bench fit: the rows, and that the peer finds what ours finds."""

import numpy as np
import pytest

from moescale.base.errors import UserError
from moescale.benchmarks.fit import CASES
from moescale.benchmarks.fit_loops import Batch, Evaluations, ScipyLoop
from moescale.benchmarks.run import run


def test_tiny_gives_a_row_for_each_implementation() -> None:
    report = run("fit", allocators={"default": {}}, cases=["tiny"], rounds=1)
    assert [row.impl for row in report.rows] == ["moescale", "scipy", "floor"]
    assert all(row.seconds > 0 and row.dtype == "fp64" for row in report.rows)
    assert report.rows[0].to_ours == report.rows[2].ratio == 1.0


def test_the_peer_finds_the_same_optimum_and_nearly_the_same_interval() -> None:
    ours, peer = Batch(points=40, resamples=60), ScipyLoop(points=40, resamples=60)
    ours.warm_up()
    peer.warm_up()
    beta = ours.found.coefficients["beta"]
    assert beta.value is not None
    assert beta.low is not None
    assert beta.high is not None
    assert peer.best[-1] == pytest.approx(beta.value, rel=1e-3)
    low, high = np.percentile(peer.samples[:, -1], (2.5, 97.5))
    assert [low, high] == pytest.approx([beta.low, beta.high], abs=(beta.high - beta.low) / 2)


def test_the_floor_evaluates_as_often_as_ours() -> None:
    floor = Evaluations(points=30, resamples=10)
    assert sum(floor.calls) > 10
    assert "evaluations of the law" in floor.warm_up()


def test_the_default_is_what_was_promised() -> None:
    assert [(case.points, case.resamples) for case in CASES if case.name == "chinchilla"] == [(250, 1000)]


def test_unknown_names_are_the_users_errors() -> None:
    with pytest.raises(UserError, match=r"--against lmfit: unknown; bench fit compares with scipy"):
        run("fit", allocators={"default": {}}, against=["lmfit"])
