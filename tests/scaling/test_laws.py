"""Each law: its derivative, its equation written out, and published tables."""

import numpy as np
import pytest

from moescale.base.errors import UserError
from moescale.scaling.laws import LAWS, Law, chinchilla_optimum, law_named, power

VALUES: dict[str, dict[str, float]] = {
    "chinchilla": {"E": 1.5, "A": 40, "alpha": 0.35, "B": 120, "beta": 0.3},
    "kaplan": {"N_c": 1e8, "a_N": 0.1, "D_c": 1e9, "a_D": 0.12},
    # Krajewski, Ludziejewski et al. 2024, MoE with 64 times the parameters
    "granularity": {"c": 0.472, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147},
    "sparsity": {
        "e": 0.9, "a": 166, "alpha": 0.6, "b": 545, "beta": 0.4, "c": 0.5, "lambda": -0.17,
        "d": 17, "delta": 0.16, "gamma": 0.15,
    },
    "dense-moe": {"sigma": 1.0, "A": 40, "alpha": 0.3, "gamma": 0.1, "B": 120, "beta": 0.3},
    "power": {"a": 20, "b": 0.08},
    "overtraining": {"E": 1.5, "a": 60, "b": 200, "eta": 0.16},
    # Clark et al. 2022, S-Base
    "clark": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_s": 1.847, "E_max": 314.478},
    "leverage": {"a": 1.23, "d": -0.0761, "beta": -0.117, "gamma": 0.0167, "A_start": 0.0163, "A_max": 2.5},
    # Ludziejewski et al. 2025, table 3
    "joint": {
        "c": 1.3637, "a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775,
        "omega": 0.5529, "zeta": -0.0259, "E_s": 2.0732, "E_max": 290.4521,
    },
}  # fmt: skip


def table(count: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    n, d = np.exp(rng.uniform(10, 15, count)), np.exp(rng.uniform(11, 18, count))
    return {
        "n": n, "d": d, "c": 6 * n * d, "e": rng.choice([1.0, 4, 8, 16], count),
        "g": rng.choice([1.0, 2, 4, 8], count), "s": rng.choice([0, 0.5, 0.75, 0.9, 0.98], count),
    }  # fmt: skip


WRITTEN_OUT = {
    "chinchilla": lambda v, c: c["E"] + c["A"] / v["n"] ** c["alpha"] + c["B"] / v["d"] ** c["beta"],
    "kaplan": lambda v, c: ((c["N_c"] / v["n"]) ** (c["a_N"] / c["a_D"]) + c["D_c"] / v["d"]) ** c["a_D"],
    "granularity": lambda v, c: (
        c["c"] + (c["g"] / v["g"] ** c["gamma"] + c["a"]) / v["n"] ** c["alpha"] + c["b"] / v["d"] ** c["beta"]
    ),
    "sparsity": lambda v, c: (
        c["a"] / v["n"] ** c["alpha"]
        + c["b"] / v["d"] ** c["beta"]
        + c["c"] / (1 - v["s"]) ** c["lambda"]
        + c["d"] / ((1 - v["s"]) ** c["delta"] * v["n"] ** c["gamma"])
        + c["e"]
    ),
    "dense-moe": lambda v, c: (
        c["A"] / (v["n"] ** c["alpha"] * v["e"] ** c["gamma"]) + c["B"] / v["d"] ** c["beta"] + c["sigma"]
    ),
    "power": lambda v, c: c["a"] * v["c"] ** -c["b"],
    "overtraining": lambda v, c: (
        c["E"]
        + (c["a"] * (v["d"] / v["n"]) ** c["eta"] + c["b"] * (v["d"] / v["n"]) ** -c["eta"])
        * (6 * v["n"] * v["d"]) ** -c["eta"]
    ),
    "clark": lambda v, c: (
        10
        ** (
            c["a"] * np.log10(v["n"])
            + (c["b"] + c["c"] * np.log10(v["n"])) * np.log10(saturated(v["e"] - 1, c["E_s"], c["E_max"]))
            + c["d"]
        )
    ),
    "leverage": lambda v, c: (
        saturated(1 - v["s"], c["A_start"], c["A_max"])
        ** (c["a"] + c["d"] * np.log10(v["c"]) + c["beta"] * np.log10(v["g"]) + c["gamma"] * np.log10(v["g"]) ** 2)
    ),
    "joint": lambda v, c: joint(v["n"], v["d"], saturated(v["e"] - 1, c["E_s"], c["E_max"]), c),
}


def saturated(x: np.ndarray, start: float, limit: float) -> np.ndarray:
    """Clark et al. 2022: 1/x^ = 1/(x + (1/start - 1/limit)^-1) + 1/limit."""
    return 1 / (1 / (x + 1 / (1 / start - 1 / limit)) + 1 / limit)


def joint(n: np.ndarray, d: np.ndarray, e: np.ndarray, c: dict[str, float]) -> np.ndarray:
    by_n = c["a"] * e ** c["delta"] * n ** (c["alpha"] + c["gamma"] * np.log(e))
    by_d = c["b"] * e ** c["omega"] * d ** (c["beta"] + c["zeta"] * np.log(e))
    return by_n + by_d + c["c"]


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_prediction_is_the_equation(law: Law) -> None:
    variables = table()
    expected = WRITTEN_OUT[law.name](variables, VALUES[law.name])
    np.testing.assert_allclose(law.predict(VALUES[law.name], variables), expected, rtol=1e-12)


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_derivative_matches_differences(law: Law) -> None:
    logs = law.logs_of(table())
    theta = law.to_theta(VALUES[law.name])
    _, derivative = law.evaluate(theta[None], logs)
    for place in range(len(theta)):
        shift = np.zeros_like(theta)
        shift[place] = 1e-6
        up, down = law.evaluate(np.array([theta + shift, theta - shift]), logs)[0]
        np.testing.assert_allclose(derivative[0, :, place], (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_starts_are_finite_distinct_and_within_bounds(law: Law) -> None:
    variables = table()
    starts = law.starts(law.logs_of(variables), law.predict(VALUES[law.name], variables))
    low, high = law.bounds
    assert np.isfinite(starts).all()
    assert ((low <= starts) & (starts <= high)).all()
    assert len(np.unique(starts, axis=0)) >= 3


@pytest.mark.parametrize(
    ("n", "d", "g", "loss"),
    [(100e6, 4.37e9, 8, 3.133), (1e9, 28.94e9, 16, 2.491), (7e9, 137.6e9, 32, 2.076), (1e12, 7.94e12, 64, 1.367)],
)
def test_granularity_reproduces_the_published_optima(n: float, d: float, g: float, loss: float) -> None:
    """Krajewski, Ludziejewski et al. 2024, table of compute-optimal models; within the rounding of coefficients.

    ``n`` are the active parameters, 12 d^2 a block; 64 experts make 4 d^2 (2 x 64 + 1) of them.
    """
    point = {"n": np.array([4 * 129 / 12 * n]), "d": np.array([d]), "g": np.array([g])}
    assert LAWS["granularity"].predict(VALUES["granularity"], point)[0] == pytest.approx(loss, abs=0.03)


def test_the_closed_form_is_the_minimum_over_sizes() -> None:
    best = chinchilla_optimum(VALUES["chinchilla"], 1e20)
    n = best["n"] * np.exp(np.linspace(-0.5, 0.5, 201))
    losses = LAWS["chinchilla"].predict(VALUES["chinchilla"], {"n": n, "d": 1e20 / (6 * n)})
    assert losses.argmin() == 100
    assert best["loss"] == pytest.approx(losses[100], rel=1e-12)
    assert 6 * best["n"] * best["d"] == pytest.approx(1e20)


def test_power_takes_the_variable_it_is_given() -> None:
    assert law_named("power").variables == ("c",)
    assert law_named("power", {"c": 1, "n": 1}).variables == ("c",)
    assert law_named("power", {"d": 1}).equation == "L = a d^-b"
    assert power("n").variables == ("n",)


def test_wrong_input_is_named() -> None:
    with pytest.raises(UserError, match=r"chinchila.*chinchilla, kaplan, clark, .*overtraining, power, or your own"):
        law_named("chinchila")
    with pytest.raises(UserError, match=r"needs n, d: d is not given \(given: n\)"):
        LAWS["chinchilla"].logs_of({"n": np.ones(3)})
    with pytest.raises(UserError, match=r"row 2: n \(0.0\) must be positive"):
        power("n").logs_of({"n": np.array([1.0, 0.0])})
    with pytest.raises(UserError, match=r"row 3: s \(1.0\) must be at least 0 and below 1"):
        LAWS["sparsity"].logs_of({"n": np.ones(3), "d": np.ones(3), "s": np.array([0, 0.5, 1.0])})
