"""Batch and learning rate: the U-curves, the best values, their power laws, and mixtures against dense models."""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from . import formats
from .analysis import Analysis
from .figures import COLOURS, Plot, as_image, label, legend, panels
from .minima import Minimum
from .optimum_words import NAMES, setting_ratio
from .page import Block, Heading, Points, Table
from .settings import Grid, Law

SHOWN = 6  # panels
OVER = {"c": "compute", "loss": "loss", "n": "active parameters", "d": "tokens", "b": "batch"}


def plot(found: Sequence[Grid]) -> Plot | None:
    """Loss over the learning rate, a curve for each batch, a panel for each grid; grids of several batches first."""
    if not found:
        return None
    shown = sorted(found, key=lambda grid: -len(grid.rows))[:SHOWN]
    figure, axes = panels(len(shown), share_y=False)
    rows = []
    for axis, grid in zip(axes, shown, strict=True):
        for place, row in enumerate(grid.rows):
            colour = COLOURS[place % len(COLOURS)]
            axis.plot(row.rates, row.losses, "o", color=colour, markersize=4)
            name = f"{formats.count(row.batch)} tokens"
            if row.best.parabola is not None:
                *curve, center = row.best.parabola
                rates = np.logspace(np.log10(row.rates[0]), np.log10(row.rates[-1]), 40)
                axis.plot(rates, np.polyval(curve, np.log(rates) - center), color=colour, linewidth=1, label=name)
                axis.plot(row.best.at, row.best.loss, "v", color=colour, markersize=5)
            else:
                axis.plot(row.rates, row.losses, ":", color=colour, linewidth=1, label=name)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        label(axis, "peak learning rate", "loss (nats/token)" if axis is axes[0] else "",
              f"{grid.family}, {formats.count(grid.n)}, {formats.flops(grid.budget)}")  # fmt: skip
        legend(axis)
    for grid in found:
        for row in grid.rows:
            losses = ", ".join(f"{r:.3g}: {x:.3f}" for r, x in zip(row.rates, row.losses, strict=True))
            rows.append(
                (grid.family, formats.count(grid.n), formats.flops(grid.budget), formats.count(row.batch), losses,
                 *_best(row.best))
            )  # fmt: skip
    caption = (
        "Points: means over seeds. Curves: parabolas in the logarithm of the rate, their minima marked; dotted where "
        "the best rate lies at an end of those tried."
    )
    columns = ("family", "active parameters", "budget (FLOPs)", "batch (tokens)", "rate: loss (nats/token)",
               "best rate", "95 %")  # fmt: skip
    return Plot("settings", "Batch and learning rate", as_image(figure), caption, columns, rows)


def _best(found: Minimum) -> tuple[str, str]:
    if not found.interior:
        return "at the edge: not determined", found.remark
    return formats.significant(found.at, 2), _interval(found)


def _interval(found: Minimum) -> str:
    if not len(found.draws):
        return "seed noise not measured"
    low, high = formats.significant(found.low, 2), formats.significant(found.high, 2)
    if found.low is None:
        return "not bounded by what was tried" if found.high is None else f"below {high}"
    return f"above {low}" if found.high is None else f"{low} to {high}"


def blocks(study: Analysis) -> list[Block]:
    """Best batches, power laws, and families against dense."""
    batches = [
        (grid.family, formats.count(grid.n), formats.flops(grid.budget), *_best(grid.batch))
        for grid in study.grids
        if grid.batch is not None
    ]
    result: list[Block] = []
    if batches:
        columns = ("family", "active parameters", "budget (FLOPs)", "best batch (tokens)", "95 %")
        result += [Heading("The best batch, each at its best rate"), Table(columns, batches)]
    said = [_law(law) for law in study.setting_laws]
    for what in ("lr", "b"):
        if not any(law.what == what and law.over != "b" for law in study.setting_laws) and study.grids:
            said.append(
                f"The best {NAMES[what]} over compute, loss, size or tokens: not determined, fewer than three interior "
                "optima in any family."
            )
    said += [setting_ratio(ratio) for ratio in study.setting_ratios]
    return [*result, *([Points(said)] if said else [])]


def _law(law: Law) -> str:
    line = law.line
    return (
        f"{law.family}: the best {NAMES[law.what]} grows as {OVER[law.over]} to the power "
        f"{formats.estimate(line.power)} ({line.n} optima, {line.told})."
    )
