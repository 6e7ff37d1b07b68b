"""``moescale analyse`` on a table that no study of ours made."""

import json
from pathlib import Path

import numpy as np
import pytest

GROWTH = 0.4545  # beta / (alpha + beta)
COLUMNS = ("--map", "c=compute,n_active=params,d=tokens,loss=final")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """IsoFLOP profiles of L = 1.7 + 400 / n^.36 + 400 / d^.3, whose n_opt grows as C^(.3 / .66)."""
    rng = np.random.default_rng(0)
    rows = []
    for compute in 10.0 ** np.arange(17, 21):
        best = (0.36 / 0.3 * (compute / 6) ** 0.3) ** (1 / 0.66)
        for n in best * 2.0 ** np.arange(-2.4, 3):
            d = compute / 6 / n
            loss = (1.7 + 400 * n**-0.36 + 400 * d**-0.3) * np.exp(0.0002 * rng.standard_normal())
            rows.append(f"{compute:g},{n:.0f},{d:.0f},{loss:.6f}")
    path = tmp_path / "theirs.csv"
    path.write_text("\n".join(["compute,params,tokens,final", *rows]) + "\n")
    return path


def test_optima_and_their_growth(main, table):
    result = main("analyse", table, *COLUMNS, "--compute", 1e21, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["runs"] == 24
    assert [size["interior"] for size in found["sizes"]] == [True] * 4
    growth = next(one for one in found["growths"] if one["what"] == "n")
    assert growth["by_minima"]["value"] == pytest.approx(GROWTH, abs=0.02)
    assert growth["by_law"]["value"] == pytest.approx(GROWTH, abs=0.02)
    (best,) = found["frontier"]["rows"]
    assert best["compute"] == 1e21
    assert best["n_active"]["value"] * best["d"] == pytest.approx(1e21 / 6, rel=0.1)


def test_in_words_and_as_a_report(main, table, tmp_path):
    report = tmp_path / "report.html"
    result = main("analyse", table, *COLUMNS, "--compute", 1e21, "--out", report)
    assert result.returncode == 0, result.stderr
    for words in ("The optimal active size of theirs grows as C to the power 0.4", "4 of 4 budgets", "extrapolated"):
        assert words in " ".join(result.stdout.split())
    assert b"<svg" in report.read_bytes() or b"image/svg" in report.read_bytes()


def test_refusals(main, table, tmp_path):
    short = tmp_path / "short.csv"
    short.write_text("compute,final\n1e17,3\n")
    cases = {
        ("analyse", table): "no column loss; name yours with --map loss=COLUMN",
        (
            "analyse",
            table,
            "--map",
            "loss=final",
        ): "no run has c or d or n_active; name the column that holds it, as in --map c=COLUMN",
        ("analyse", short, "--map", "loss=final,c=compute"): "no run has d or n_active",
        ("analyse", table, *COLUMNS, "--compute", -1): "--compute (-1.0): must be positive",
        ("analyse", table, *COLUMNS, "--out", table / "report.html"): "cannot be written",
        ("analyse", tmp_path / "nowhere.csv"): "nowhere.csv: cannot be read",
    }
    for arguments, words in cases.items():
        result = main(*arguments)
        assert result.returncode == 2
        assert words in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1e17,0,1e9,3,0", "run row 25: n_active (0) must be positive"),
        ("-1,1e6,1e9,3,0", "run row 25: c (-1) must be positive"),
        ("1e17,1e6,1e9,nan,0", "run row 25: loss (nan) must be positive"),
        ("inf,1e6,1e9,3,0", "run row 25: c (inf) must be positive"),
        ("1e17,1e6,1e9,3,1", "run row 25: s (1) must be at least 0 and below 1"),
        ("1e17,many,1e9,3,0", "row 25, column params: 'many' is not a number"),
    ],
)
def test_numbers_that_no_run_can_have(main, table, row, words):
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",s", *(line + ",0" for line in lines[1:]), row]) + "\n")
    result = main("analyse", table, *COLUMNS)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stdout == ""
