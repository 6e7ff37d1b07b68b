"""The section of fitted laws: coefficients with intervals, residuals, and what the data leave open, in words."""

from collections.abc import Mapping

from . import formats
from .analysis import Analysis
from .effect_plots import residuals
from .fitted import Estimate, Fit
from .page import Block, Heading, Picture, Points, Table, Terms, Text


def law_blocks(study: Analysis) -> list[Block]:
    """Power laws of best losses in one table, then every other fit."""
    blocks: list[Block] = []
    if study.powers:
        blocks += [Heading("Best loss over compute, L = a C^-b"), _power_table(study.powers)]
        blocks.append(Text(f"Intervals: {_intervals(study.powers)}. Their data and residuals stand with the plot."))
    for name, fit in study.fits.items():
        if not _is_among(fit, study.powers):
            blocks += _fit_blocks(name, fit, study)
    return blocks


def _intervals(powers: Mapping[str, Fit]) -> str:
    return " / ".join(dict.fromkeys(fit.conventions["intervals"] for fit in powers.values()))


def _power_table(powers: Mapping[str, Fit]) -> Table:
    rows = [
        (family, formats.estimate(fit.coefficients["a"]), formats.estimate(fit.coefficients["b"]),
         f"{fit.rmse_log:.2%}", str(fit.n_points), "; ".join(fit.warnings))
        for family, fit in powers.items()
    ]  # fmt: skip
    columns = ("family", "a (nats/token, 95 %)", "b (95 %)", "residual (rms)", "budgets", "warnings")
    return Table(columns, rows)


def _is_among(fit: Fit, powers: Mapping[str, Fit]) -> bool:
    """Whether ``fit`` is one of the power laws of best losses, which have a table of their own."""
    return any(fit.law == power.law and fit.values == power.values for power in powers.values())


def _fit_blocks(name: str, fit: Fit, study: Analysis) -> list[Block]:
    held = fit.held_out
    facts = [
        formats.plural(fit.n_points, "point"),
        f"residual {fit.rmse_log:.2%} (root mean square)",
        f"{fit.agreeing} of {fit.tried} starts agree",
    ]
    if held is not None:
        facts.append(
            f"on {formats.plural(held.n, 'held-out point')}: {held.rmse_log:.2%} (root mean square), "
            f"{held.max_rel:.2%} at most"
        )
    coefficients = [
        (key, formats.estimate(Estimate(e.value, None, None)) if e.value is None else
         formats.significant(e.value, formats.digits_of(e)), formats.ends(e))
        for key, e in fit.coefficients.items()
    ]  # fmt: skip
    blocks: list[Block] = [
        Heading(f"{name}: {fit.law}, {fit.as_law().equation}"),
        Text("; ".join(facts) + "."),
        Table(("coefficient", "value", "95 %"), coefficients),
    ]
    warnings = [f"{warning[0].upper()}{warning[1:]}." for warning in (*fit.warnings, *_open(fit))]
    if warnings:
        blocks.append(Points(warnings, warning=True))
    picture = residuals(name, fit, study.points)
    if picture is not None:
        blocks.append(Picture(picture))
    blocks.append(Terms(fit.conventions, "Conventions of this fit"))
    return blocks


def _open(fit: Fit) -> list[str]:
    """Coefficients whose interval reaches down to nearly nothing or over an order of magnitude, in words."""
    wide = [
        name
        for name, e in fit.coefficients.items()
        if e.low is not None and e.high is not None and (e.low <= 0 or e.high > 10 * e.low)
    ]
    if not wide:
        return []
    return [
        f"the data determine {formats.listed(wide)} to no better than a factor of ten: compare predictions inside the "
        "measured range, not these values"
    ]
