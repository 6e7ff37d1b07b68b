"""The fitter: recovery, agreement with an independent optimizer, intervals, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.optimize import minimize as scipy_minimize

from moescale.base.errors import UserError
from moescale.scaling.fit import Fit, fit
from moescale.scaling.laws import LAWS, Law
from moescale.scaling.solver import huber, minimise

TRUE: dict[str, dict[str, float]] = {
    "chinchilla": {"E": 1.5, "A": 40, "alpha": 0.35, "B": 120, "beta": 0.3},
    "kaplan": {"N_c": 1e8, "a_N": 0.1, "D_c": 1e9, "a_D": 0.12},
    "granularity": {"c": 0.472, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147},
    "sparsity": {
        "e": 0.94, "a": 166, "alpha": 0.596, "b": 545, "beta": 0.395, "c": 0.46, "lambda": -0.167,
        "d": 17.3, "delta": 0.16, "gamma": 0.16,
    },
    "dense-moe": {"sigma": 1.0, "A": 40, "alpha": 0.3, "gamma": 0.1, "B": 120, "beta": 0.3},
    "power": {"a": 20, "b": 0.08},
    "overtraining": {"E": 1.5, "a": 60, "b": 200, "eta": 0.16},
    "clark": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_s": 1.847, "E_max": 314.478},
    "leverage": {"a": 1.23, "d": -0.0761, "beta": -0.117, "gamma": 0.0167, "A_start": 0.0163, "A_max": 2.5},
    "joint": {
        "c": 1.3637, "a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775,
        "omega": 0.5529, "zeta": -0.0259, "E_s": 2.0732, "E_max": 290.4521,
    },
}  # fmt: skip
Table = dict[str, np.ndarray]


def table(count: int = 40, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    n, d = np.exp(rng.uniform(10.3, 14.9, count)), np.exp(rng.uniform(11.5, 18.4, count))
    return {
        "n": n, "d": d, "c": 6 * n * d, "e": rng.choice([1.0, 4, 16, 64, 256], count),
        "g": rng.choice([1.0, 2, 4, 8], count), "s": rng.choice([0, 0.5, 0.75, 0.9, 0.95], count),
    }  # fmt: skip


def noisy(law: Law, variables: Table, size: float, seed: int = 1) -> np.ndarray:
    noise = size * np.random.default_rng(seed).standard_normal(len(variables["n"]))
    return law.predict(TRUE[law.name], variables) * np.exp(noise)


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_exact_data_give_the_coefficients_back(law: Law) -> None:
    variables = table()
    found = fit(law, variables, law.predict(TRUE[law.name], variables))
    assert found.values == pytest.approx(TRUE[law.name], rel=1e-6)
    assert found.rmse_log < 1e-10
    assert found.agreeing >= 2
    assert not found.warnings


def coverage(law: Law, trials: int, points: int, resamples: int) -> tuple[dict[str, float], dict[str, int]]:
    """For each coefficient, the share of 95 % intervals that hold the truth, and how many intervals were given."""
    hits, given = dict.fromkeys(law.names, 0), dict.fromkeys(law.names, 0)
    for trial in range(trials):
        variables = table(points, seed=trial)
        found = fit(law, variables, noisy(law, variables, 0.002, seed=1000 + trial), bootstrap=resamples)
        for name, estimate in found.coefficients.items():
            if estimate.low is not None and estimate.high is not None:
                given[name] += 1
                hits[name] += estimate.low <= TRUE[law.name][name] <= estimate.high
    return {name: hits[name] / max(given[name], 1) for name in law.names}, given


@pytest.mark.parametrize("name", ["chinchilla", "kaplan", "dense-moe", "power"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(name: str) -> None:
    shares, given = coverage(LAWS[name], trials=12, points=60, resamples=40)
    assert min(given.values()) == 12
    assert min(shares.values()) >= 9 / 12  # fewer of 12 intervals of 95 % by chance once in ten thousand


# Sets, and resamplings of each. A fit of the sparsity law's ten coefficients takes thirty times as long as most.
SETS = {"sparsity": (60, 100)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_coverage_is_between_90_and_99_percent(law: Law) -> None:
    """Of sets of 80 runs each; on the mean, and for each coefficient but for what chance does to so few sets."""
    sets, resamples = SETS.get(law.name, (200, 200))
    shares, given = coverage(law, trials=sets, points=80, resamples=resamples)
    print(law.name, shares, given)
    assert 0.90 <= np.mean(list(shares.values())) <= 0.99
    assert min(shares.values()) >= 0.90 - 2 * math.sqrt(0.95 * 0.05 / sets)
    assert min(given.values()) >= sets / 2


def test_noisy_granularity_is_recovered() -> None:
    law = LAWS["granularity"]
    variables = table(60)
    found = fit(law, variables, noisy(law, variables, 0.002))
    for name in ("alpha", "beta", "gamma"):
        assert found.values[name] == pytest.approx(TRUE["granularity"][name], rel=0.15)


@pytest.mark.parametrize("name", ["chinchilla", "dense-moe"])
def test_no_other_optimizer_finds_better(name: str) -> None:
    """L-BFGS on the same summed objective, from the optimum and from ordinary starts."""
    law, delta = LAWS[name], 1e-3
    variables = table()
    loss = noisy(law, variables, 0.01)
    logs, target, (low, high) = law.logs_of(variables), np.log(loss), law.bounds
    starts = law.starts(logs, loss)
    ours = minimise(lambda theta: law.evaluate(theta, logs), starts, target, low, high, delta)
    best = ours.theta[ours.objective.argmin()]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        prediction, derivative = law.evaluate(theta[None], logs)
        residual = prediction[0] - target
        gradient = np.clip(residual, -delta, delta) @ derivative[0]
        return 1e3 * float(huber(residual, delta).sum()), 1e3 * gradient

    box = list(zip(low, high, strict=True))
    options = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-12}
    for start in (best, *starts[:5]):
        other = scipy_minimize(objective, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
        assert 1e3 * ours.objective.min() <= other.fun * (1 + 1e-9)


def test_an_outlier_pulls_little() -> None:
    law = LAWS["chinchilla"]
    variables = table()
    loss = noisy(law, variables, 0.0005)
    clean = fit(law, variables, loss)
    loss[7] *= 1.5
    assert fit(law, variables, loss).values["beta"] == pytest.approx(clean.values["beta"], abs=0.01)


def test_held_out_points_are_predicted_and_not_fitted() -> None:
    law = LAWS["chinchilla"]
    variables = table()
    loss = noisy(law, variables, 0.001)
    hold_out = variables["n"] > np.quantile(variables["n"], 0.8)
    loss[hold_out] *= math.exp(0.05)
    found = fit(law, variables, loss, hold_out=hold_out)
    assert found.n_points == int((~hold_out).sum())
    assert found.rmse_log < 0.002
    assert found.held_out is not None
    assert found.held_out.n == int(hold_out.sum())
    assert found.held_out.rmse_log == pytest.approx(0.05, abs=0.005)
    assert found.held_out.max_rel == pytest.approx(1 - math.exp(-0.05), abs=0.01)
    assert found.ranges["n"][1] <= np.quantile(variables["n"], 0.8)


def test_what_the_data_leave_open_is_not_presented_as_fitted() -> None:
    variables = table()
    found = fit("chinchilla", variables, 400 * variables["n"] ** -0.2 + 300 * variables["d"] ** -0.25)
    assert found.coefficients["E"].value is None
    assert found.values["E"] == pytest.approx(1e-4)
    assert any("E ran to its bound" in text for text in found.warnings)
    assert found.coefficients["alpha"].value == pytest.approx(0.2, abs=1e-3)


def test_a_flat_direction_is_named() -> None:
    """Tokens in proportion to parameters: the two terms cannot be told apart."""
    rng = np.random.default_rng(0)
    n = np.exp(np.linspace(10, 12, 12))
    variables = {"n": n, "d": 20 * n * np.exp(0.01 * rng.standard_normal(12))}
    law = LAWS["chinchilla"]
    found = fit(law, variables, law.predict(TRUE["chinchilla"], variables) * np.exp(0.005 * rng.standard_normal(12)))
    assert any("flat direction" in text for text in found.warnings)


def test_few_budgets_still_give_a_power_law_with_an_interval() -> None:
    c = np.array([1e11, 3e11, 1e12])
    found = fit("power", {"c": c}, 24.7 * c**-0.07 * np.array([1.002, 0.997, 1.001]), bootstrap=100)
    b = found.coefficients["b"]
    assert b.low is not None
    assert b.high is not None
    assert b.low < 0.07 < b.high


def test_same_seed_same_interval() -> None:
    law = LAWS["power"]
    variables = table(10)
    loss = noisy(law, variables, 0.01)
    runs = [fit(law, variables, loss, bootstrap=50, seed=seed).as_json() for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0]["coefficients"] != runs[2]["coefficients"]


def test_duplicates_are_mentioned() -> None:
    variables = {name: np.concatenate([values, values[:2]]) for name, values in table(10).items()}
    found = fit("power", variables, noisy(LAWS["power"], table(10), 0.01)[[*range(10), 0, 1]])
    assert any("2 points stand more than once" in text for text in found.warnings)


def test_bad_input_is_refused() -> None:
    variables = table(8)
    loss = LAWS["chinchilla"].predict(TRUE["chinchilla"], variables)
    for row, value in ((0, 0.0), (3, math.nan), (7, -1.0), (2, math.inf)):
        broken = loss.copy()
        broken[row] = value
        with pytest.raises(UserError, match=f"row {row + 1}: the loss"):
            fit("chinchilla", variables, broken)
    few = {name: values[:5] for name, values in variables.items()}
    with pytest.raises(UserError, match="5 coefficients and needs at least 6 points to fit; 5 are given"):
        fit("chinchilla", few, loss[:5])
    with pytest.raises(UserError, match="at least 6 points"):
        fit("chinchilla", variables, loss, hold_out=np.arange(8) > 3)
    with pytest.raises(UserError, match="d is the same in all 8 points"):
        fit("chinchilla", {**variables, "d": np.full(8, 1e6)}, loss)
    pair = {"n": np.tile([1e5, 2e5], 4), "d": np.tile([1e6, 3e6], 4)}
    with pytest.raises(UserError, match="lie at only 2 places"):
        fit("chinchilla", pair, loss)
    with pytest.raises(UserError, match="n has 8 rows, the loss 7"):
        fit("chinchilla", variables, loss[:7])


def test_json_has_the_documented_shape() -> None:
    law = LAWS["chinchilla"]
    variables = table()
    content = fit(law, variables, noisy(law, variables, 0.001), bootstrap=20, hold_out=variables["n"] > 1e6).as_json()
    assert list(content) == [
        "law", "n_points", "coefficients", "rmse_log", "held_out", "starts", "criteria", "identifiability",
        "conventions", "warnings",
    ]  # fmt: skip
    assert list(content["coefficients"]) == ["E", "A", "alpha", "B", "beta"]
    assert set(content["coefficients"]["E"]) == {"value", "low", "high"}
    assert set(content["held_out"]) == {"n", "rmse_log", "max_rel"}
    assert set(content["starts"]) == {"tried", "agreeing"}
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("bootstrap", [0, 20])
def test_saved_and_loaded_it_predicts_the_same(tmp_path: Path, bootstrap: int) -> None:
    law = LAWS["chinchilla"]
    variables = table()
    found = fit(law, variables, noisy(law, variables, 0.001), bootstrap=bootstrap)
    found.save(tmp_path / "fit.json")
    loaded = Fit.load(tmp_path / "fit.json")
    assert loaded.as_json() == found.as_json()
    assert np.array_equal(loaded.predict(variables), found.predict(variables))
    assert loaded.optimum(1e15) == found.optimum(1e15)
    assert (loaded.optimum(1e15)["n"].low is None) == (bootstrap == 0)


def test_a_power_law_of_another_variable_survives_saving(tmp_path: Path) -> None:
    variables = {"d": table(10)["d"]}
    found = fit("power", variables, 30 * variables["d"] ** -0.1)
    found.save(tmp_path / "fit.json")
    assert Fit.load(tmp_path / "fit.json").predict(variables) == pytest.approx(30 * variables["d"] ** -0.1)
    with pytest.raises(UserError, match="no closed-form optimum"):
        found.optimum(1e20)


def test_files_that_are_no_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    for text in ("", "[]", '{"schema": 1}', '{"schema": 2, "law": "power"}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"fit\.json"):
            Fit.load(path)


def test_residuals_of_every_point_are_kept_under_its_name(tmp_path: Path) -> None:
    c = np.array([1e11, 3e11, 1e12, 3e12])
    loss = 20 * c**-0.07
    loss[3] *= 1.05
    held = np.array([False, False, False, True])
    found = fit("power", {"c": c}, loss, hold_out=held, names=list("abcd"))
    assert [(row.name, row.held) for row in found.rows] == list(zip("abcd", held, strict=True))
    np.testing.assert_allclose([row.residual for row in found.rows], [0, 0, 0, -math.log(1.05)], atol=1e-9)
    found.save(tmp_path / "fit.json")
    assert Fit.load(tmp_path / "fit.json").rows == found.rows
    assert fit("power", {"c": c}, loss).rows[0].name == "row 1"


def test_weights_are_copies() -> None:
    """A point of weight 3 counts like three equal ones."""
    law = LAWS["chinchilla"]
    variables = table(30)
    loss = noisy(law, variables, 0.002)
    weights = np.where(np.arange(30) < 10, 3.0, 1.0)
    copies = np.repeat(np.arange(30), weights.astype(int))
    thrice = fit(law, {name: values[copies] for name, values in variables.items()}, loss[copies])
    assert fit(law, variables, loss, weights=weights).values == pytest.approx(thrice.values, rel=1e-6)
    assert fit(law, variables, loss, weights=7 * weights).values == pytest.approx(thrice.values, rel=1e-6)
    with pytest.raises(UserError, match=r"row 3: the weight \(0.0\) must be positive"):
        fit(law, variables, loss, weights=np.where(np.arange(30) == 2, 0.0, 1.0))
    with pytest.raises(UserError, match="2 weights are given for 30 points"):
        fit(law, variables, loss, weights=np.ones(2))


def test_a_large_delta_is_least_squares() -> None:
    c = np.geomspace(1e10, 1e14, 12)
    loss = 20 * c**-0.07 * np.exp(0.05 * np.random.default_rng(0).standard_normal(12))
    slope = -np.polyfit(np.log(c), np.log(loss), 1)[0]
    assert fit("power", {"c": c}, loss, huber_delta=1e3).values["b"] == pytest.approx(slope, rel=1e-9)
    assert fit("power", {"c": c}, loss).values["b"] != pytest.approx(slope, rel=1e-3)
    with pytest.raises(UserError, match=r"delta \(0\) must be positive"):
        fit("power", {"c": c}, loss, huber_delta=0)


def test_residuals_of_the_loss_itself_agree_with_scipy() -> None:
    variables = table(30)
    loss = noisy(LAWS["chinchilla"], variables, 0.01)

    def residual(theta: np.ndarray) -> np.ndarray:
        e, a, alpha, b, beta = theta
        return np.exp(e) + np.exp(a) / variables["n"] ** alpha + np.exp(b) / variables["d"] ** beta - loss

    ours = fit("chinchilla", variables, loss, residuals="loss", huber_delta=1e3).values
    theirs = least_squares(residual, LAWS["chinchilla"].to_theta(TRUE["chinchilla"]), xtol=1e-15, ftol=1e-15)
    assert [ours["alpha"], ours["beta"]] == pytest.approx(theirs.x[[2, 4]], rel=1e-5)


def test_the_best_of_several_optima_is_taken_and_their_number_told() -> None:
    """Kaplan's law on data of another law: its starts end in different places."""
    law, rng = LAWS["kaplan"], np.random.default_rng(0)
    variables = {"n": np.exp(rng.uniform(15, 20, 40)), "d": np.exp(rng.uniform(20, 24, 40))}
    loss = LAWS["chinchilla"].predict({"E": 1.7, "A": 400, "alpha": 0.34, "B": 410, "beta": 0.28}, variables)
    logs, (low, high) = law.logs_of(variables), law.bounds
    starts = law.starts(logs, loss)
    ends = minimise(lambda theta: law.evaluate(theta, logs), starts, np.log(loss), low, high, 1e-3).objective
    assert ends.max() > 1.1 * ends.min()
    found = fit(law, variables, loss)
    residuals = np.array([row.residual for row in found.rows])
    assert huber(residuals, 1e-3).sum() == pytest.approx(ends.min(), rel=1e-9)
    assert 2 <= found.agreeing < found.tried


def test_three_points_are_refused() -> None:
    variables = table(3)
    with pytest.raises(
        UserError, match="chinchilla has 5 coefficients and needs at least 6 points to fit; 3 are given"
    ):
        fit("chinchilla", variables, np.array([3.0, 2.9, 2.8]))


def test_tokens_in_billions_are_noticed() -> None:
    variables = table()
    loss = LAWS["chinchilla"].predict(TRUE["chinchilla"], variables)
    right = fit("chinchilla", variables, loss)
    wrong = fit("chinchilla", {**variables, "d": variables["d"] / 1e9}, loss)
    assert wrong.values["beta"] == pytest.approx(right.values["beta"], rel=1e-4)
    assert wrong.values["B"] == pytest.approx(right.values["B"] / 1e9 ** right.values["beta"], rel=1e-3)
    assert any(text.startswith("d runs from ") for text in wrong.warnings)
    assert any("no perplexity" in text for text in fit("chinchilla", variables, 100 * loss).warnings)


def test_what_hardly_matters_is_called_weakly_identified() -> None:
    """Experts far fewer than where their use would end: E_max may be almost anything."""
    law = LAWS["clark"]
    variables = table(60)
    variables["e"] = np.minimum(variables["e"], 16.0)
    found = fit(law, variables, noisy(law, variables, 0.002), bootstrap=60)
    assert any("E_max" in text for text in found.warnings)
    assert not any("a is only" in text for text in found.warnings)


def test_coefficients_that_go_together_are_named() -> None:
    variables = table()
    found = fit("chinchilla", variables, noisy(LAWS["chinchilla"], variables, 0.002)).identifiability
    assert found.condition_number is not None
    assert found.condition_number > 10
    assert {("A", "alpha"), ("B", "beta")} <= {(first, second) for first, second, _ in found.correlated}
    assert all(abs(value) > 0.95 for _, _, value in found.correlated)
    assert "quote them together: " in found.words


def test_conventions_state_what_was_fitted_and_how() -> None:
    variables = table()
    stated = fit("granularity", variables, LAWS["granularity"].predict(TRUE["granularity"], variables)).conventions
    assert stated["objective"] == "sum of Huber(0.001) of natural-log residuals"
    assert stated["g in the paper"] == "G = 4 x model width / expert width"
    assert stated["predicts"] == "loss, nats a token"
