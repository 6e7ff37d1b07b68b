"""Laws from outside the package: found, checked, fitted, and found again by a saved fit."""

from pathlib import Path

import numpy as np
import pytest

from moescale.base.errors import UserError
from moescale.scaling.fit import Fit, fit
from moescale.scaling.laws import LAWS, law_named
from moescale.scaling.laws.custom import check

GOOD = """
from moescale.scaling.laws import SumOfPowers, exponent, offset, scale

SHARED = SumOfPowers(
    "shared", "this test", "L = E + A / (n^alpha shared^gamma) + B / d^beta", ("n", "d", "shared"),
    (offset("E"), scale("A"), exponent("alpha", 0.2, 0.5), exponent("gamma", 0.0, 0.1, low=-1.0),
     scale("B"), exponent("beta", 0.2, 0.5)),
    terms={"E": {}, "A": {"alpha": "n", "gamma": "shared"}, "B": {"beta": "d"}},
)
NUMBER = 3
"""
TRUE = {"E": 1.5, "A": 40, "alpha": 0.35, "gamma": 0.05, "B": 120, "beta": 0.3}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def table() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(10, 15, 30)), np.exp(rng.uniform(12, 18, 30))
    return {"n": n, "d": d, "shared": rng.choice([1.0, 2.0, 4.0], 30)}


def test_a_law_of_a_file_is_fitted_saved_and_loaded(file: Path, tmp_path: Path) -> None:
    law = law_named(f"{file}:SHARED")
    found = fit(law, table(), law.predict(TRUE, table()))
    assert found.values == pytest.approx(TRUE, rel=1e-5)
    found.save(tmp_path / "fit.json")
    loaded = Fit.load(tmp_path / "fit.json")
    np.testing.assert_array_equal(loaded.predict(table()), found.predict(table()))
    file.unlink()
    with pytest.raises(UserError, match=r"mine\.py:SHARED: no file .*mine\.py"):
        loaded.predict(table())


def test_a_relative_path_is_made_absolute(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert law_named("mine.py:SHARED").name == f"{file}:SHARED"


def test_a_law_of_a_module_on_the_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(file.parent)
    assert law_named("mine:SHARED").name == "mine:SHARED"


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_our_own_laws_pass_the_same_check(law: object) -> None:
    check(law)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (("", ""), "NOTHING", "has no NOTHING; its laws are SHARED"),
        (("", ""), "NUMBER", "NUMBER is a int, not a Law"),
        (("import SumOf", "import Sum0f"), "SHARED", "cannot be imported: ImportError"),
        (("NUMBER = 3", "NUMBER = 1 / 0"), "SHARED", "cannot be imported: ZeroDivisionError"),
        (('"B": {"beta": "d"}', '"B": {"beta": "tokens"}'), "SHARED", "terms use tokens; its variables are n, d, sh"),
        (('"B": {"beta": "d"}', '"B": {"delta": "d"}'), "SHARED", "delta, which is no coefficient"),
        (('"E": {}, ', ""), "SHARED", "coefficient E stands in none of its terms"),
        (('scale("B")', 'exponent("B", 1.0)'), "SHARED", "B is a exponent; the keys of terms are scales"),
        (('exponent("beta", 0.2, 0.5)', 'exponent("beta")'), "SHARED", "beta has no values to start from"),
        (('exponent("beta", 0.2, 0.5)', 'exponent("alpha", 0.2)'), "SHARED", "two coefficients have the same name"),
        (('exponent("beta", 0.2, 0.5)', 'exponent("beta", 0.2, low=5.0)'), "SHARED", "bounds 5 to 4; the first must"),
    ],
)  # fmt: skip
def test_faults_are_named(file: Path, change: tuple[str, str], name: str, said: str) -> None:
    file.write_text(GOOD.replace(*change) if change[0] else GOOD)
    with pytest.raises(UserError, match=rf"law .*{said}"):
        law_named(f"{file}:{name}")


WRONG = """
from dataclasses import dataclass
import numpy as np
from moescale.scaling.laws import Law, exponent

@dataclass(frozen=True)
class Line(Law):
    def evaluate(self, theta, logs):
        x = logs["n"]
        return theta[:, :1] - theta[:, 1:] * x, np.stack(np.broadcast_arrays(1.0, {derivative} + 0 * theta[:, :1]), -1)

    def starts(self, logs, loss):
        return {starts}

LINE = Line("line", "", "log L = a - b ln n", ("n",), (exponent("a", low=-9, high=9), exponent("b", low=-9, high=9)))
"""


@pytest.mark.parametrize(
    ("derivative", "starts", "said"),
    [
        ("-x", "np.array([[1.0, 0.1]])", None),
        ("x", "np.array([[1.0, 0.1]])", "derivative of log L by b that evaluate gives differs"),
        ("-x", "np.array([1.0, 0.1])", r"starts has shape \(2,\); \[S, 2\] is needed"),
        ("-x", "np.array([[1.0, 99.0]])", "not within the bounds"),
        ("-x", "np.array([[1.0, float('nan')]])", "a start is not finite"),
        ("-x[:3]", "np.array([[1.0, 0.1]])", r"evaluate gives shapes \(1, 8\) and \(1, 3, 2\)"),
    ],
)
def test_a_law_with_its_own_form_is_checked_by_difference_quotients(
    tmp_path: Path, derivative: str, starts: str, said: str | None
) -> None:
    path = tmp_path / "line.py"
    path.write_text(WRONG.format(derivative=derivative, starts=starts))
    if said is None:
        law = law_named(f"{path}:LINE")
        n = np.geomspace(1e3, 1e6, 9)
        assert fit(law, {"n": n}, 5 * n**-0.1).values == pytest.approx({"a": np.log(5), "b": 0.1}, rel=1e-6)
        return
    with pytest.raises(UserError, match=said):
        law_named(f"{path}:LINE")
