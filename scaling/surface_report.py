"""Surfaces over size and sparsity: contours with the runs on them, and the optima they support."""

import math
from collections.abc import Sequence

from . import formats
from .figures import Plot, as_image, label, log_x, panels
from .page import Block, Heading, Points, Table
from .surface import Optimum, Surface

SHOWN = 6  # panels


def plot(found: Sequence[Surface]) -> Plot | None:
    """Residuals of every surface over size, coloured by sparsity."""
    fitted = [surface for surface in found if not surface.why]
    if not fitted:
        return None
    shown = fitted[-SHOWN:]
    figure, axes = panels(len(shown))
    rows = []
    for axis, surface in zip(axes, shown, strict=True):
        depth = -math.log1p(-float(surface.s.max())) or 1.0
        for n, s, loss, value in zip(surface.n, surface.s, surface.loss, surface.fitted, strict=True):
            share = -math.log1p(-float(s)) / depth
            colour = (0.15 + 0.7 * share, 0.35 - 0.15 * share, 0.75 - 0.5 * share)
            axis.plot(n, loss, "o", color=colour, markersize=4)
            axis.plot([n, n], [loss, value], color=colour, linewidth=1)
            rows.append(
                (formats.flops(surface.budget), f"{surface.g:g}", formats.count(float(n)), f"{s:.3g}", f"{loss:.4f}",
                 f"{value - loss:+.4f}")
            )  # fmt: skip
        for s in sorted(set(surface.s)):
            line = sorted((n, v) for n, at, v in zip(surface.n, surface.s, surface.fitted, strict=True) if at == s)
            if len(line) > 1:
                axis.plot(*zip(*line, strict=True), color="#999999", linewidth=0.8)
        log_x(axis)
        title = f"{formats.flops(surface.budget)} FLOPs, G {surface.g:g}"
        label(axis, "total parameters", "loss (nats/token)" if axis is axes[0] else "", title)
    caption = (
        "Points: means over seeds, from blue (dense) to red (sparsest); the stroke from each leads to the surface. "
        "Grey lines join the surface's values at runs of one sparsity."
    )
    columns = ("budget (FLOPs)", "G", "total parameters", "S", "loss (nats/token)", "surface minus loss")
    return Plot("surface", "Loss over size and sparsity", as_image(figure), caption, columns, rows)


def blocks(found: Sequence[Surface]) -> list[Block]:
    """The optima of every surface with the error on the sparsest runs, and why others have none."""
    result: list[Block] = []
    for surface in found:
        if surface.why:
            continue
        title = f"{formats.flops(surface.budget)} FLOPs, G {surface.g:g}"
        result += [Heading(title), Points([_quality(surface)]), Table(COLUMNS, _rows(surface))]
    refused = [
        f"{formats.flops(surface.budget)} FLOPs, G {surface.g:g}: no surface: {surface.why}."
        for surface in found
        if surface.why
    ]
    return [*result, *([Points(refused)] if refused else [])]


COLUMNS = ("at", "best total parameters (95 %)", "best sparsity (95 %)", "loss (nats/token)", "remarks")


def _quality(surface: Surface) -> str:
    text = f"{surface.points} places in N and S, residual {surface.rmse:.4f} nats/token"
    if surface.held_error is None:
        return f"{text}; without the sparsest runs the others do not determine a surface, so nothing was held out."
    return (
        f"{text}; the runs of S {surface.held_s:.3g}, held out, were predicted to {surface.held_error:.4f} nats/token "
        "(root mean square)."
    )


def _rows(surface: Surface) -> list[tuple[str, ...]]:
    everything = [*surface.at_s, *surface.at_n, *([surface.overall] if surface.overall else [])]
    return [_row(one) for one in everything]


def _row(one: Optimum) -> tuple[str, ...]:
    n = s = formats.NONE
    if one.n is not None and one.n.value is not None:
        n = formats.significant_count(one.n.value)
        if one.n.low is not None and one.n.high is not None:
            n += f" ({formats.significant_count(one.n.low)} to {formats.significant_count(one.n.high)})"
    if one.s is not None and one.s.value is not None:
        s = f"{one.s.value:.3g}"
        if one.s.low is not None and one.s.high is not None:
            s += f" ({one.s.low:.3g} to {one.s.high:.3g})"
    return one.fixed, n, s, formats.fixed(one.loss, 4), one.remark
