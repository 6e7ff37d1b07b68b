"""The plots of a report, each with its data. A function returns None where there is nothing to draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from . import formats
from .cells import families_of
from .figures import Plot, as_image, budget_x, colours, label, legend, log_x, panels
from .fitted import Fit
from .isoflop import Comparison, Profile
from .laws import Array
from .points import Point
from .record import Record

MARKS = 60  # points of a curve that are drawn at most
TABLED = 12  # points of a curve that its table shows at most
NATS = "loss (nats/token)"


def thin(x: Array, y: Array, bins: int) -> tuple[Array, Array]:
    """Means of y over equal parts of log x; curves of thousands of noisy steps become readable lines."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= bins:
        return x, y
    edges = np.logspace(np.log10(x[0]), np.log10(x[-1]), bins + 1)[1:-1]
    place = np.searchsorted(edges, x)
    used = np.unique(place)
    return np.array([x[place == p].mean() for p in used]), np.array([y[place == p].mean() for p in used])


def column(lines: Sequence[Mapping[str, Any]], name: str) -> Array:
    """A field over lines of a record [n]; null as NaN."""
    return np.array([np.nan if line[name] is None else line[name] for line in lines], dtype=float)


def loss_curves(points: Sequence[Point], records: Mapping[str, Record]) -> Plot | None:
    """Training loss against tokens, one line a run."""
    shown = [point for point in points if point.run in records and records[point.run].steps]
    if not shown:
        return None
    palette = colours(families_of(points))
    figure, (axis,) = panels(1, height=3.9)
    rows, values = [], []
    for point in shown:
        steps = records[point.run].steps
        tokens, loss = column(steps, "tokens"), column(steps, "loss")
        axis.plot(*thin(tokens, loss, MARKS), color=palette[point.family], linewidth=0.9, alpha=0.65,
                  linestyle=":" if point.check else "--" if point.future else "-")  # fmt: skip
        values += list(loss[len(loss) // 20 :][np.isfinite(loss[len(loss) // 20 :])])
        rows += [
            (point.run, point.family, formats.count(x), formats.fixed(y))
            for x, y in zip(*thin(tokens, loss, TABLED), strict=True)
        ]
    log_x(axis)
    if values:
        low, high = min(values), float(np.quantile(values, 0.98))
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    label(axis, "training tokens", f"training {NATS}")
    used = dict.fromkeys(point.family for point in shown)
    axis.legend([Line2D([], [], color=palette[f]) for f in used], list(used), fontsize=8, frameon=False,
                loc="upper right")  # fmt: skip
    caption = "Training loss, one line a run, averaged over equal parts of log tokens. The steep beginning is cut off."
    if any(point.check for point in shown):
        caption += " Dotted: runs that only check the learning rate."
    if any(point.future for point in shown):
        caption += " Dashed: routing uses future tokens, in training at least (see findings)."
    return Plot("curves", "Loss curves", as_image(figure), caption, ("run", "family", "tokens", "loss"), rows)


def isoflop_profiles(found: Sequence[Profile], digits: int) -> Plot | None:
    """Final loss against active parameters, a panel for each family, a line for each budget.

    Args:
        digits: decimals of losses that the seed noise leaves.
    """
    if not found:
        return None
    families = list(dict.fromkeys(profile.family for profile in found))
    budgets = sorted({profile.budget for profile in found})
    shades = colormaps["viridis"](np.linspace(0.0, 0.82, len(budgets)))
    figure, axes = panels(len(families))
    rows = []
    for family, axis in zip(families, axes, strict=True):
        for profile in (p for p in found if p.family == family):
            shade = shades[budgets.index(profile.budget)]
            sizes, losses = [s.n for s in profile.sizes], [s.loss for s in profile.sizes]
            line = "none" if profile.minimum.parabola else ":"
            axis.plot(sizes, losses, "o", linestyle=line, markersize=4, linewidth=0.9, color=shade)
            if profile.minimum.parabola:
                *curve, center = profile.minimum.parabola
                x = np.linspace(np.log(sizes[0]), np.log(sizes[-1]), 60)
                axis.plot(np.exp(x), np.polyval(curve, x - center), color=shade, linewidth=1.2)
            face = shade if profile.interior else "none"
            axis.plot(profile.n_best, profile.loss_best, "D", markersize=7.5, markerfacecolor=face, color=shade)
            rows += [
                (family, formats.flops(profile.budget), formats.count(s.n), formats.count(s.d),
                 formats.fixed(s.loss, digits), str(s.seeds),
                 "interior" if profile.interior else f"edge: {profile.remark}")
                for s in profile.sizes
            ]  # fmt: skip
        log_x(axis)
        label(axis, "active parameters", f"held-out {NATS}" if axis is axes[0] else "", family)
    handles = [Line2D([], [], color=shade, marker="o", markersize=4) for shade in shades]
    figure.legend(
        handles, [f"{formats.flops(b)} FLOPs" for b in budgets], loc="outside lower center", ncols=min(len(budgets), 5),
        fontsize=8, frameon=False,
    )  # fmt: skip
    caption = (
        "Final loss of each size at equal compute, means over seeds. Filled diamonds: minimum of a parabola in log N, "
        "with measured sizes on both sides. Hollow diamonds on dotted lines: the best size is at the edge of what "
        "was measured, so the true optimum may be lower and elsewhere."
    )
    columns = ("family", "budget (FLOPs)", "active parameters", "tokens", NATS, "seeds", "optimum")
    return Plot("isoflop", "IsoFLOP profiles", as_image(figure), caption, columns, rows)


def best_losses(found: Sequence[Profile], fits: Mapping[str, Fit], digits: int) -> Plot | None:
    """Best loss against compute with the power laws; ``digits`` as above."""
    if not found:
        return None
    families = list(dict.fromkeys(profile.family for profile in found))
    palette = colours(families)
    figure, (axis,) = panels(1)
    rows = []
    for family in families:
        own = [p for p in found if p.family == family]
        for profile in own:
            face = palette[family] if profile.interior else "none"
            axis.plot(profile.budget, profile.loss_best, "o", color=palette[family], markerfacecolor=face)
            rows.append(
                (family, formats.flops(profile.budget), formats.fixed(profile.loss_best, digits),
                 formats.significant_count(profile.n_best), formats.significant_count(profile.d_best),
                 _residual(fits.get(family), profile), profile.remark or "interior")
            )  # fmt: skip
        text = family
        if family in fits:
            budgets = [p.budget for p in own]
            compute = np.logspace(np.log10(min(budgets)), np.log10(max(budgets)), 40)
            axis.plot(compute, fits[family].predict({"c": compute}), color=palette[family], linewidth=1.2)
            text += f": b = {formats.estimate(fits[family].coefficients['b'])}"
        axis.plot([], [], "o-", color=palette[family], label=text)
    budget_x(axis, sorted({p.budget for p in found}))
    label(axis, "training compute (FLOPs)", f"best held-out {NATS}")
    legend(axis)
    caption = (
        "Best loss at each budget (the profile's minimum; hollow: an edge, so only an upper bound) and power laws "
        "L = a C^-b through them where there are three budgets or more. No offset is fitted."
    )
    columns = ("family", "budget (FLOPs)", f"best {NATS}", "active parameters", "tokens", "residual of the law",
               "optimum")  # fmt: skip
    return Plot("best", "Best loss against compute", as_image(figure), caption, columns, rows)


def _residual(law: Fit | None, profile: Profile) -> str:
    """log(prediction / loss) of a best loss."""
    if law is None:
        return formats.NONE
    return f"{np.log(law.predict({'c': np.array([profile.budget])})[0] / profile.loss_best):+.2%}"


def comparisons(found: Sequence[Comparison]) -> Plot | None:
    """Gap to dense, and the compute multiple, over budgets."""
    if not found:
        return None
    families = list(dict.fromkeys(c.family for c in found))
    palette = colours(families)
    figure, (left, right) = panels(2, share_y=False)
    for place, family in enumerate(families):
        own = [c for c in found if c.family == family]
        shift = 1.03 ** (place - (len(families) - 1) / 2)  # so that bars do not hide one another
        x = [c.budget * shift for c in own]
        left.plot(x, [c.gap.value for c in own], "o-", color=palette[family], markersize=4, label=family)
        known = [(c.budget * shift, c.multiple) for c in own if c.multiple is not None]
        if known:
            right.plot(*zip(*known, strict=True), "o-", color=palette[family], markersize=4, label=family)
        for at, c in zip(x, own, strict=True):
            if c.gap.reach is not None:
                ends = [c.gap.value - c.gap.reach, c.gap.value + c.gap.reach]
                left.plot([at] * 2, ends, color=palette[family], linewidth=1, alpha=0.6)
            if c.low is not None and c.high is not None:
                right.plot([at] * 2, [c.low, c.high], color=palette[family], linewidth=1, alpha=0.6)
    left.axhline(0, color="#333333", linewidth=0.8)
    right.axhline(1, color="#333333", linewidth=0.8)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.yaxis.set_minor_formatter(NullFormatter())
    for axis in (left, right):
        budget_x(axis, sorted({c.budget for c in found}))
    label(left, "training compute (FLOPs)", "dense minus MoE (nats/token)")
    label(right, "training compute (FLOPs)", "compute multiple")
    legend(left)
    bars = "Bars: 95 %; where they cross the line, the difference is unresolved."
    if all(c.gap.reach is None for c in found):
        bars = "Seed noise was not measured, so gaps have no bars."
    caption = (
        "Left: best dense loss minus best MoE loss at the same compute; above 0 the MoE is better. Right: the compute "
        "at which the power law of the best dense losses reaches the MoE's loss, over the MoE's compute; drawn where "
        f"there is such a law. {bars}"
    )
    columns = ("family", "budget (FLOPs)", "gap (nats/token, 95 %)", "compute multiple", "95 %", "remarks")
    rows = [
        (c.family, formats.flops(c.budget), formats.with_error(c.gap.value, c.gap.reach),
         formats.significant(c.multiple, 2), formats.interval(c.low, c.high), "; ".join(remarks(c)))
        for c in found
    ]  # fmt: skip
    return Plot("compare", "Dense against MoE at equal compute", as_image(figure), caption, columns, rows)


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know about a comparison."""
    texts = []
    if comparison.gap.resolved is False:
        texts.append("unresolved")
    if comparison.gap.resolved is None:
        texts.append("seed noise not measured")
    if comparison.edge:
        texts.append("an optimum at an edge")
    if comparison.extrapolated:
        texts.append("multiple extrapolated")
    return texts
