"""``moescale fit`` on somebody's own table: words, pictures, comparisons, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

LAW = """
from moescale.scaling.laws import SumOfPowers, exponent, offset, scale
OWN = SumOfPowers("own", "", "L = E + A / (n^alpha vocab^gamma)", ("n", "vocab"),
                  (offset("E"), scale("A"), exponent("alpha", 0.2, 0.5), exponent("gamma", 0.0, 0.1, low=-1.0)),
                  terms={"E": {}, "A": {"alpha": "n", "gamma": "vocab"}})
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(15, 20, 24)), np.exp(rng.uniform(20, 24, 24))
    loss = (1.7 + 400 * n**-0.34 + 410 * d**-0.28) * np.exp(0.002 * rng.standard_normal(24))
    rows = [f"{a:.0f},{b:.0f},{c:.4f},0.002,{2 ** (i % 3)}" for i, (a, b, c) in enumerate(zip(n, d, loss, strict=True))]
    path = tmp_path / "theirs.csv"
    path.write_text("\n".join(["params,tokens,final,err,vocab", *rows]) + "\n")
    return path


COLUMNS = ("--map", "n=params,d=tokens,loss=final")


def test_a_table_of_somebody_else(main, table):
    result = main("fit", table, "--law", "chinchilla", *COLUMNS, "--hold-out", "n>2e8", "--sd", "err")
    assert result.returncode == 0, result.stderr
    for words in (
        "L = E + A / n^alpha + B / d^beta",
        "starts agree",
        "held out: ",
        "n: column params of the table, as counted there",
        "objective: weighted sum of Huber(0.001) of natural-log residuals",
        "intervals: 95 %, percentiles of 400 resamplings of the points",
        "quote them together: ",
    ):
        assert words in result.stdout


@pytest.mark.parametrize("kind", ["png", "html"])
def test_residuals_as_a_picture(main, table, tmp_path, kind):
    picture = tmp_path / f"residuals.{kind}"
    options = ("--hold-out", "n>2e8", "--bootstrap", "0", "--plot", picture)
    result = main("fit", table, "--law", "chinchilla", *COLUMNS, *options)
    assert result.returncode == 0, result.stderr
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<!doctype html>")
    assert kind == "png" or b"held out" in content


def test_laws_side_by_side(main, table):
    options = ("--compare", "kaplan,chinchilla", *COLUMNS, "--hold-out", "n>1e8")
    result = main("fit", table, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("chinchilla") < result.stdout.index("kaplan")
    assert "held out: chinchilla predicts best" in result.stdout
    content = json.loads(main("fit", table, *options, "--json").stdout)
    assert [law["law"] for law in content["laws"]] == ["chinchilla", "kaplan"]
    assert content["sentences"][0].startswith("held out: chinchilla")


def test_a_law_of_ones_own_with_a_column_of_ones_own(main, table, tmp_path):
    (tmp_path / "laws.py").write_text(LAW)
    law, fit = f"{tmp_path / 'laws.py'}:OWN", tmp_path / "fit.json"
    result = main("fit", table, "--law", law, "--map", "n=params,loss=final", "--out", fit, "--json")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["law"] == law
    assert content["conventions"]["vocab"] == "column vocab of the table, as counted there"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --law NAME for a fit, or --compare"),
        (("--law", "chinchilla", "--compare", "kaplan,chinchilla"), "give --law NAME for a fit, or --compare"),
        (("--compare", "kaplan"), "give two or more different laws"),
        (("--compare", "kaplan,kaplan"), "give two or more different laws"),
        (("--compare", "kaplan,leverage"), "predict different things"),
        (("--compare", "kaplan,chinchilla", "--plot", "a.png"), "give --law instead"),
        (("--law", "chinchilla", "--weight", "err", "--sd", "err"), "give one"),
        (("--law", "chinchilla", "--weight", "absent"), "has no column absent"),
        (("--law", "chinchilla", "--plot", "a.pdf"), "must end in .png or .html"),
        (("--law", "chinchilla", "--huber", "0"), "delta (0.0) must be positive"),
        (("--law", "chinchilla", "--hold-out", "n>1e30"), "so none is held out"),
        (("--law", "granularity"), "no g, which law granularity needs"),
        (("--law", "absent.py:LAW"), "no file"),
        (("--law", "nowhere.at.all:LAW"), "cannot be imported"),
        (("--law", "json:loads"), "is a function, not a Law"),
    ],
)
def test_refusals(main, table, options, said):
    result = main("fit", table, *COLUMNS, *options)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
