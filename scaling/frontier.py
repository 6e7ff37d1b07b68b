"""The best model of each family for a compute budget: size, tokens, mixture, batch, learning rate, loss.

Everything comes from what a study measured: the optimal size from the power law through its interior isoFLOP minima,
or where there are too few from the law of n and d fitted to the family; tokens from the exact count of FLOPs a token;
the loss from the power law of best losses. Batch and learning rate come from their own power laws where three optima
were found, else from the nearest run. What lies outside the budgets measured is called an extrapolation, by its factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .cells import completed
from .fitted import Estimate
from .laws import CHINCHILLA
from .points import Point

if TYPE_CHECKING:
    from .analysis import Analysis

NEAR = 3  # runs whose speed tells the time


@dataclass(frozen=True)
class Best:
    """One family at one budget.

    Attributes:
        compute: FLOPs, exact count.
        n_active, n_total, d: optimal; intervals are 95 %.
        e, k, g, s: of the family; e, k and s are those of the run of nearest size, where a family varies them.
        b, lr: tokens and peak rate.
        loss: nats a token.
        hours: of one worker of the machine that ran the study, at the speed of the runs of nearest size.
        like: the run of nearest size and budget, whose settings hold where none were fitted.
        by: what the size comes from.
        remarks: what a reader must know: extrapolation, settings that were not fitted.
    """

    family: str
    compute: float
    n_active: Estimate
    n_total: float
    d: float
    e: float | None
    k: float | None
    g: float | None
    s: float | None
    b: float | None
    lr: float | None
    loss: Estimate | None
    hours: float | None
    like: str
    by: Literal["isoFLOP minima", "law of n and d"]
    remarks: tuple[str, ...]


def frontier(study: "Analysis", computes: Sequence[float]) -> tuple[list[Best], list[str]]:
    """Every family with an optimum at every budget, and a sentence for each family without one."""
    found, missing = [], []
    for family in dict.fromkeys(profile.family for profile in study.profiles):
        runs = [point for point in completed(study.points) if point.family == family and not point.check]
        rows = [row for compute in computes if (row := _best(study, family, runs, compute)) is not None]
        if not rows:
            missing.append(
                f"{family}: no optimal size: fewer than three interior minima over budgets, and no {CHINCHILLA.name} "
                "law fitted to it"
            )
        found += rows
    return sorted(found, key=lambda row: row.compute), missing


def _best(study: "Analysis", family: str, runs: Sequence[Point], compute: float) -> Best | None:
    n_active, by, remarks = _size(study, family, compute)
    if n_active is None or n_active.value is None:
        return None
    n = n_active.value
    sizes = np.log([run.n_active or 1.0 for run in runs])
    per_token = _along(sizes, [(run.c or 0.0) / (run.d or 1.0) for run in runs], math.log(n))
    nearest = sorted(
        runs, key=lambda run: abs(math.log((run.n_active or 1.0) / n)) + abs(math.log((run.c or 1.0) / compute))
    )
    model = nearest[0]
    budgets = [profile.budget for profile in study.profiles if profile.family == family]
    beyond = max(compute / max(budgets), min(budgets) / compute)
    if beyond > 1.1:
        remarks.append(f"extrapolated: {beyond:.2g} x beyond the budgets measured")
    measured = [run.n_active or 0.0 for run in runs]
    if not min(measured) <= n <= max(measured):
        remarks.append("a size that was not measured")
    b, lr = _settings(study, family, model, compute, remarks)
    speeds = [run.c / run.seconds for run in nearest[:NEAR] if run.c and run.seconds]
    power = study.powers.get(family)
    loss = None
    if power is not None:
        value = float(power.predict({"c": np.array([compute])})[0])
        ends = power.interval(lambda values: values["a"] * compute ** -values["b"]) or (None, None)
        loss = Estimate(value, *ends)
    return Best(
        family=family,
        compute=compute,
        n_active=n_active,
        n_total=_along(sizes, [run.n_total or 1.0 for run in runs], math.log(n)),
        d=compute / per_token,
        e=model.e,
        k=model.k,
        g=model.g,
        s=model.s,
        b=b,
        lr=lr,
        loss=loss,
        hours=compute / float(np.median(speeds)) / 3600 if speeds else None,
        like=model.run,
        by=by,
        remarks=tuple(remarks),
    )


def _size(
    study: "Analysis", family: str, compute: float
) -> tuple[Estimate | None, Literal["isoFLOP minima", "law of n and d"], list[str]]:
    growth = next((one for one in study.growths if one.family == family and one.what == "n"), None)
    if growth is not None and growth.line is not None:
        remarks = ["the interval is too narrow: a minimum may lie beyond the sizes measured"] if growth.open else []
        return growth.line.at(compute), "isoFLOP minima", remarks
    fit = study.fits.get(f"{CHINCHILLA.name}-{family}")
    if fit is None or min(fit.values["alpha"], fit.values["beta"]) <= 0:
        return None, "law of n and d", []
    return fit.optimum(compute)["n"], "law of n and d", ["size by the law's own count of FLOPs, 6 n d"]


def _along(log_x: np.ndarray, y: Sequence[float], at: float) -> float:
    """A power law through values, by least squares; proportional to x where there is one x only."""
    log_y = np.log(y)
    slope = float(np.polyfit(log_x, log_y, 1)[0]) if np.ptp(log_x) > 0 else 1.0
    return math.exp(float(np.mean(log_y)) + slope * (at - float(np.mean(log_x))))


def _settings(
    study: "Analysis", family: str, model: Point, compute: float, remarks: list[str]
) -> tuple[float | None, float | None]:
    lines = {law.what: law.line for law in study.setting_laws if law.family == family and law.over == "c"}
    b = lines["b"].at(compute).value if "b" in lines else model.b
    lr = lines["lr"].at(compute).value if "lr" in lines else model.lr
    taken = [name for name, what in (("batch", "b"), ("learning rate", "lr")) if what not in lines]
    if taken:
        remarks.append(f"{' and '.join(taken)} as in {model.run}: no power law of optima")
    return b, lr
