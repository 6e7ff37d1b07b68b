"""Published data, fitted again: what their authors found, a right fitter finds.

The data are not part of the project. They are read from the folder that MOESCALE_PUBLISHED_DATA names, else from
``shared/data`` beside the checkout; a test without its file is skipped and names the public source.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

import moescale
from moescale.scaling.fit import fit
from moescale.scaling.laws import LAWS, granularity_optimum
from moescale.scaling.laws.optima import granularity_flops_per_token

LEAST_SQUARES = 1e3  # Huber's delta beyond every residual
CLARK = "google-deepmind/scaling_laws_for_routing @42da0c3, data/curves.csv.gz, last step of each run (CC-BY 4.0)"
PORIAN = "formll/resolving-scaling-law-discrepancies @0dc60d9 (MIT)"
GADRE = "mlfoundations/scaling @a003c49, exp_data/models (MIT)"


def read(name: str, source: str) -> list[dict[str, str]]:
    beside = Path(moescale.__file__).resolve().parent.parent / "shared" / "data"
    path = Path(os.environ.get("MOESCALE_PUBLISHED_DATA", beside)) / name
    if not path.is_file():
        pytest.skip(f"no {path}; made from {source}")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def test_routed_language_models() -> None:
    """Clark et al. 2022: S-Base and dense models. The bounds are what an independent fit of these rows gave."""
    rows = read("clark2022_sbase.csv", CLARK)
    variables = {"n": column(rows, "dense_parameter_count"), "e": column(rows, "num_experts")}
    found = fit("clark", variables, column(rows, "loss_validation"), huber_delta=LEAST_SQUARES, bootstrap=400)
    assert found.rmse_log / np.log(10) <= 0.0033
    for name, value, reach in (("a", -0.083, 5e-4), ("b", -0.118, 5e-4), ("c", 0.0099, 5e-5), ("d", 1.114, 5e-4)):
        assert found.values[name] == pytest.approx(value, abs=reach)
        estimate = found.coefficients[name]
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < LAWS["clark"].reported[0].values[name] < estimate.high
    assert any(text.startswith("E_max is only weakly identified") for text in found.warnings)
    assert found.agreeing == found.tried


@pytest.mark.parametrize(
    ("recipe", "exponent"),
    [
        (("long", "kaplan", "kaplan", "base"), 0.8353),
        (("long", "kaplan", "standard", "base"), 0.7065),
        (("short", "kaplan", "standard", "base"), 0.6020),
        (("short", "chinchilla", "standard", "base"), 0.5715),
        (("short", "const", "standard", "tuned"), 0.4969),
    ],
    ids=["as Kaplan", "head counted", "short warm-up", "matched decay", "tuned"],
)
def test_the_exponent_of_the_best_size(recipe: tuple[str, ...], exponent: float) -> None:
    """Porian et al. 2024, RefinedWeb: log N_opt over log C, each point weighted by its variance."""
    keys = ("warmup", "decay", "param_count", "hparams")
    rows = [
        row
        for row in read("porian2024_optimal_pairs.csv", PORIAN)
        if row["dataset"] == "rw"
        and tuple(row[key] for key in keys) == recipe
        and (recipe[2] == "standard") == (row["val"] == "val")
    ]
    rows = [row for row in rows if np.isfinite(float(row["N_opt"]))]
    weights = column(rows, "log_n_star_std") ** -2
    variables = {"c": column(rows, "flops")}
    found = fit("power", variables, column(rows, "N_opt"), huber_delta=LEAST_SQUARES, weights=weights)
    assert -found.values["b"] == pytest.approx(exponent, abs=1e-4)


def test_over_training_is_predicted_from_five_small_runs() -> None:
    """Gadre et al. 2024: RedPajama, loss on C4, least squares of the loss itself as there."""
    rows = {row["name"]: row for row in read("gadre2024_models.csv", GADRE) if row["dataset"] == "rpj"}
    widths = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
    small = [rows[f"rpj-{width}-1.0"] for width in widths] + [rows["rpj-d=96_l=8_h=4-16.0"]]
    large = [rows["rpj-open_lm_1b-32.0"], rows["rpj-open_lm_7b-1.0"]]
    every = [*small, *large]
    found = fit(
        "overtraining",
        {"n": column(every, "params"), "d": column(every, "tokens")},
        column(every, "loss_c4_val"),
        residuals="loss",
        huber_delta=LEAST_SQUARES,
        hold_out=np.arange(len(every)) >= len(small),
    )
    errors = [abs(np.expm1(row.residual)) for row in found.rows if row.held]
    assert errors == pytest.approx([0.00710, 0.00732], abs=5e-6)


# Krajewski, Ludziejewski et al. 2024, arXiv 2402.07871, compute-optimal models with 64 times the parameters of an
# expert layer: active parameters, tokens, granularity, FLOPs, loss. Its coefficients are rounded.
FINE_GRAINED = [
    (100e6, 4.37e9, 8, 2.95e18, 3.133),
    (1e9, 28.94e9, 16, 1.93e20, 2.491),
    (3e9, 72.90e9, 16, 1.41e21, 2.245),
    (7e9, 137.60e9, 32, 6.46e21, 2.076),
    (70e9, 941.07e9, 32, 4.16e23, 1.694),
    (300e9, 2.96e12, 64, 5.69e24, 1.503),
    (1e12, 7.94e12, 64, 4.97e25, 1.367),
]


@pytest.mark.parametrize(("n_active", "d", "g", "flops", "loss"), FINE_GRAINED)
def test_compute_optimal_mixtures(n_active: float, d: float, g: int, flops: float, loss: float) -> None:
    width = (n_active * 64 / 12) ** (1 / 3)  # 12 width^2 a block, width / 64 blocks
    assert granularity_flops_per_token(width, g, 64) * d == pytest.approx(flops, rel=0.01)
    best = granularity_optimum(LAWS["granularity"].reported[0].values, flops)
    assert best["g"] == g
    assert best["loss"] == pytest.approx(loss, abs=0.03)
    assert best["n_active"] == pytest.approx(n_active, rel=0.03)
    assert best["d"] == pytest.approx(d, rel=0.03)


@pytest.mark.parametrize(
    ("e", "n", "d"), [(1, 5.7e9, 29.3e9), (4, 4.4e9, 38e9), (8, 3.8e9, 44.3e9), (32, 2.85e9, 58.4e9)]
)
def test_joint_law_of_dense_models_and_mixtures(e: int, n: float, d: float) -> None:
    """Ludziejewski et al. 2025, arXiv 2502.05172, table 1 by the coefficients of table 3, at 1e21 FLOPs."""
    sizes = n * np.exp(np.linspace(-1, 1, 401))
    point = {"n": sizes, "d": 1e21 / (6 * sizes), "e": np.full(401, float(e))}
    best = int(LAWS["joint"].predict(LAWS["joint"].reported[0].values, point).argmin())
    assert sizes[best] == pytest.approx(n, rel=0.03)
    assert point["d"][best] == pytest.approx(d, rel=0.03)
