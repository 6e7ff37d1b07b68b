"""Plots of what one setting does: sparsity, granularity, learning rate; and of data saved and residuals of fits."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from . import formats
from .cells import families_of
from .effects import Axis, Line
from .figures import Plot, as_image, colours, label, legend, log_x, panels
from .findings import verdict
from .fitted import Fit
from .points import Point
from .rates import RateCheck
from .saving import Saving
from .seeds import SeedNoise, reach

NATS = "loss (nats/token)"
STYLES = ("-", "--", ":", "-.")  # of what is fixed along a line
LOWEST = -1.5  # share at which bars of data saved are cut
NAMES: Mapping[Axis, tuple[str, str]] = {
    "s": ("sparsity", "sparsity S = 1 - K/E"),
    "g": ("granularity", "granularity G = 4 width / expert width"),
}


def effect(axis: Axis, lines: Sequence[Line], noise: SeedNoise | None) -> Plot | None:
    """Loss against sparsity (``s``) or granularity (``g``), relative to the lowest level; a panel for each budget."""
    if not lines:
        return None
    name, title = NAMES[axis]
    budgets = sorted({line.budget for line in lines})
    sizes = sorted({line.shape.active for line in lines})
    shades = dict(zip(sizes, colormaps["viridis"](np.linspace(0.0, 0.82, len(sizes))), strict=True))
    fixed = list(dict.fromkeys(line.name for line in lines))
    styles = dict(zip(fixed, STYLES * len(fixed), strict=False))
    figure, panes = panels(len(budgets))
    for pane, budget in zip(panes, budgets, strict=True):
        own = [line for line in lines if line.budget == budget]
        for line in own:
            _draw_line(pane, axis, line, shades[line.shape.active], styles[line.name])
        widths = [
            found[0]
            for line in own
            for cell in line.cells[1:]
            if (found := reach(noise, [(line.cells[0].family, 1.0), (cell.family, 1.0)]))
        ]
        if widths:
            pane.axhspan(-max(widths), max(widths), color="#333333", alpha=0.07, linewidth=0)
        pane.axhline(0, color="#333333", linewidth=0.8)
        _mark_values(pane, axis, sorted({value for line in own for value in line.values}))
        first = pane is panes[0]
        label(
            pane, title, "loss minus the first level's (nats/token)" if first else "", f"{formats.flops(budget)} FLOPs"
        )
    handles = [Line2D([], [], color=shades[n], label=f"{formats.count(n)} active") for n in sizes]
    handles += [Line2D([], [], color="#333333", linestyle=styles[text], label=text)
                for text in fixed]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    rows = [row for line in lines for row in _effect_rows(line, noise)]
    dense = " The dense model counts as S = 0: all experts active." if axis == "s" else ""
    band = (
        "Band: how far seeds alone may put single runs of two of the families drawn apart (95 %, the widest). "
        if noise
        else "Seed noise was not measured, so none of these differences can be told from chance. "
    )
    caption = (
        f"Final loss of cells that differ in {name} alone (equal shape, compute, batch and learning rate), minus that "
        f"of the lowest {name}; below 0 is better.{dense} {band}Points: means over seeds; dashes: single seeds. "
        "Table: each level against the one before."
    )
    columns = ("budget (FLOPs)", "active parameters, no router", "fixed", name, "family", NATS, "seeds",
               "sd over seeds", "lower than the level before by (nats/token, 95 %)", "verdict")  # fmt: skip
    return Plot(name, f"Loss against {name}", as_image(figure), caption, columns, rows)


def _draw_line(pane: Axes, axis: Axis, line: Line, colour: Any, style: str) -> None:
    places, first = _places(axis, line.values), line.cells[0].mean
    pane.plot(places, [cell.mean - first for cell in line.cells], "o", linestyle=style, color=colour, markersize=4,
              linewidth=1.1)  # fmt: skip
    for place, cell in zip(places, line.cells, strict=True):
        if len(cell.losses) > 1:
            pane.plot([place] * len(cell.losses), np.array(cell.losses) - first, "_", color=colour, markersize=9)


def _effect_rows(line: Line, noise: SeedNoise | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for value, cell, step in zip(line.values, line.cells, (None, *line.steps), strict=True):
        digits = formats.decimals(noise.of(cell.family)[1].sd if noise else None)
        spread = f"{np.std(cell.losses, ddof=1):.{digits}f}" if len(cell.losses) > 1 else ""
        told = ""
        if step is not None:
            told = verdict(step) + (f" ({step.pairs} pairs of seeds)" if step.pairs else "")
        rows.append(
            (formats.flops(line.budget), formats.count(line.shape.active), line.name, f"{value:.4g}", cell.family,
             formats.fixed(cell.mean, digits), str(len(cell.losses)), spread,
             formats.with_error(step.value, step.reach) if step else "", told)
        )  # fmt: skip
    return rows


def _places(axis: Axis, values: Sequence[float]) -> list[float]:
    """Sparsity is drawn as the share of inactive over active experts plus one, 1 / (1 - s): equal steps a doubling."""
    return [1 / (1 - value) for value in values] if axis == "s" else list(values)


def _mark_values(drawn: Axes, axis: Axis, values: Sequence[float]) -> None:
    drawn.set_xscale("log", base=2)
    drawn.xaxis.set_major_locator(FixedLocator(_places(axis, values)))
    drawn.xaxis.set_minor_locator(NullLocator())
    drawn.set_xticklabels([f"{value:.3g}" for value in values])
    drawn.margins(x=0.08, y=0.12)


def rate_plot(checks: Sequence[RateCheck]) -> Plot | None:
    """Loss above the rule's against the learning rate over the rule's."""
    if not checks:
        return None
    figure, (drawn,) = panels(1)
    palette = colours(list(dict.fromkeys(check.family for check in checks)))
    labelled: set[str] = set()
    rows = []
    for check in checks:
        base = next(x for x, ratio in zip(check.losses, check.ratios, strict=True) if ratio == 1.0) or 0.0
        known = [(r, x - base) for r, x in zip(check.ratios, check.losses, strict=True) if x is not None]
        colour = palette[check.family]
        name = None if check.family in labelled else check.family
        labelled.add(check.family)
        drawn.plot(*zip(*known, strict=True), "o" if check.parabola else "o-", color=colour, markersize=4, label=name)
        if check.parabola:
            ratios = np.geomspace(known[0][0], known[-1][0], 40)
            drawn.plot(ratios, np.polyval(check.parabola, np.log(ratios)) - base, color=colour, linewidth=1)
        digits = formats.decimals(check.reach)
        rows += [
            (check.family, formats.count(check.active), formats.flops(check.budget), f"{ratio:g}",
             formats.significant(ratio * check.lr), formats.fixed(loss, digits) if loss is not None else "not finished",
             "" if loss is None else f"{loss - base:+.{digits}f}",
             formats.NONE if check.reach is None else f"{check.reach:.{digits}f}")
            for ratio, loss in zip(check.ratios, check.losses, strict=True)
        ]  # fmt: skip
    limits = [check.reach for check in checks if check.reach is not None]
    if limits:
        drawn.axhspan(-max(limits), max(limits), color="#333333", alpha=0.07, linewidth=0, label="seed noise (95 %)")
    drawn.axhline(0, color="#333333", linewidth=0.8)
    ratios_used = sorted({ratio for check in checks for ratio in check.ratios})
    drawn.set_xscale("log")
    drawn.set_xticks(ratios_used, [f"{ratio:g}" for ratio in ratios_used])
    drawn.xaxis.set_minor_formatter(NullFormatter())
    label(drawn, "learning rate / the rule's", "loss minus the rule's (nats/token)")
    legend(drawn)
    caption = (
        "Final loss of runs that differ from a run by the rule in the peak learning rate alone (equal seed), minus "
        "that run's. Curves: parabola in the logarithm of the rate, where there are three losses or more and it has a "
        "minimum between them. These runs are left out of everything else."
    )
    columns = ("family", "active parameters", "budget (FLOPs)", "rate / rule's", "peak rate", f"held-out {NATS}",
               "minus the rule's", "± by seeds (95 %)")  # fmt: skip
    return Plot("rates", "Learning-rate check", as_image(figure), caption, columns, rows)


def saving_plot(found: Sequence[Saving]) -> Plot | None:
    """Data saved over budgets, a point for each cell."""
    known = [s for s in found if s.share is not None]
    if not found:
        return None
    families = list(dict.fromkeys(s.family for s in found))
    palette = colours(families)
    rows = [
        (s.family, formats.flops(s.budget), formats.count(s.active), formats.count(s.tokens),
         formats.count(s.dense_tokens), formats.percent(s.share), formats.percents(s.low, s.high), _remark(s))
        for s in found
    ]  # fmt: skip
    budgets = sorted({s.budget for s in known} or {s.budget for s in found})
    figure, panes = panels(len(budgets))
    for pane, budget in zip(panes, budgets, strict=True):
        for place, family in enumerate(families):
            shift = 1.04 ** (place - (len(families) - 1) / 2)  # so that bars do not hide one another
            for s in (s for s in known if (s.family, s.budget) == (family, budget)):
                if s.low is not None and s.high is not None:
                    pane.plot([s.active * shift] * 2, [100 * max(s.low, LOWEST), 100 * max(s.high, LOWEST)],
                              color=palette[family], linewidth=1, alpha=0.6)  # fmt: skip
                pane.plot(s.active * shift, 100 * (s.share or 0.0), "o", color=palette[family], markersize=4,
                          markerfacecolor="none" if s.extrapolated else palette[family])  # fmt: skip
        pane.axhline(0, color="#333333", linewidth=0.8)
        log_x(pane)
        pane.margins(x=0.15)
        first = pane is panes[0]
        label(pane, "active parameters", "data saved (%)" if first else "", f"{formats.flops(budget)} FLOPs")
    handles = [Line2D([], [], color=palette[family], marker="o", markersize=4, label=family) for family in families]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    rest = "the law fitted to the dense runs" if found[0].by_law else "a line through the dense runs of the same shape"
    caption = (
        "Data saved = 1 - D / D_dense: D, the tokens of a run of the family; D_dense, the tokens after which a dense "
        f"model with as many active parameters reaches the same loss, by {rest}. Bars: 95 % "
        "(error of that dense reference and, where measured, seed noise), cut at -150 %. Hollow: D_dense lies outside "
        "the dense runs' tokens, by less than a factor of two; further away no value is given."
    )
    columns = ("family", "budget (FLOPs)", "active parameters", "D (tokens)", "D_dense (tokens)", "data saved",
               "95 %", "remarks")  # fmt: skip
    return Plot("saved", "Data saved at equal active parameters", as_image(figure), caption, columns, rows)


def _remark(s: Saving) -> str:
    if s.share is None:
        return s.why
    texts = ["unresolved"] if s.resolved is False else ["no interval"] if s.resolved is None else []
    return ", ".join(texts + (["extrapolated"] if s.extrapolated else []))


def residuals(name: str, fit: Fit, points: Sequence[Point]) -> Plot | None:
    """Residuals of a fit against compute, coloured by family, or by size where there is one family."""
    by_run = {point.run: point for point in points}
    rows = [(by_run[row.name], row) for row in fit.rows if row.name in by_run and by_run[row.name].c]
    if not rows:
        return None
    families = families_of([point for point, _ in rows])
    sizes = sorted({point.n_active or 0.0 for point, _ in rows})
    shades = colormaps["viridis"](np.linspace(0.0, 0.82, len(sizes)))
    if len(families) > 1:
        groups = [(family, colour, lambda p, family=family: p.family == family)
                  for family, colour in colours(families).items() if family in families]  # fmt: skip
    else:
        groups = [
            (formats.count(size), shade, lambda p, size=size: (p.n_active or 0.0) == size)
            for size, shade in zip(sizes, shades, strict=True)
        ]
    figure, (drawn,) = panels(1, height=2.8)
    for text, colour, belongs in groups:
        for held in (False, True):
            own = [(p.c, 100 * row.residual) for p, row in rows if row.held == held and belongs(p)]
            if own:
                drawn.plot(*zip(*own, strict=True), "D" if held else "o", color=colour, markersize=5 if held else 4,
                           markerfacecolor="none" if held else colour, alpha=0.85)  # fmt: skip
        drawn.plot([], [], "o", color=colour, label=text)
    if any(row.held for _, row in rows):
        drawn.plot([], [], "D", color="#333333", markerfacecolor="none", label="held out")
    drawn.axhline(0, color="#333333", linewidth=0.8)
    log_x(drawn)
    drawn.xaxis.set_major_formatter(lambda value, _: formats.flops(value))
    label(drawn, "training compute (FLOPs)", "log(prediction / loss) (%)")
    legend(drawn, ncols=2 if len(groups) > 6 else 1)
    what = "family" if len(families) > 1 else "active parameters"
    caption = (
        f"Residuals of {name}, coloured by {what}; hollow diamonds were held out. A trend along compute or a colour "
        "that lies on one side means that the law's form does not fit."
    )
    table = [
        (point.run, point.family, formats.count(point.n_active), formats.count(point.d), formats.flops(point.c),
         f"{row.residual:+.2%}", "held out" if row.held else "fitted")
        for point, row in rows
    ]  # fmt: skip
    columns = ("run", "family", "active parameters", "tokens", "FLOPs", "residual", "used")
    return Plot(f"residuals-{name}", f"Residuals of {name}", as_image(figure), caption, columns, table)
