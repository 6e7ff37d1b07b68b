"""The section of registered predictions: predicted against measured."""

from collections.abc import Sequence

from . import formats
from .cells import families_of
from .figures import Plot, as_image, colours, label, legend, panels
from .optimum_words import predicted
from .outcomes import Outcome
from .page import Block, Points
from .points import Point

COLUMNS = ("run", "by", "predicted (nats/token)", "95 %", "measured", "measured minus predicted", "in %", "inside",
           "registered (UTC)", "which was", "run ended (UTC)", "hash", "remarks")  # fmt: skip


def plot(found: Sequence[Outcome], points: Sequence[Point]) -> Plot | None:
    """Measured minus predicted with the interval of the prediction, a row for each; all rows in the table."""
    if not found:
        return None
    palette = colours(families_of(points))
    height = max(1.6, 0.9 + 0.24 * len(found))
    figure, (axis,) = panels(1, height=height)
    for place, one in enumerate(reversed(found)):
        colour = palette.get(one.family, "#777777")
        axis.plot([100 * (one.low / one.predicted - 1), 100 * (one.high / one.predicted - 1)], [place] * 2,
                  color=colour, linewidth=5, alpha=0.3, solid_capstyle="butt")  # fmt: skip
        if one.share is not None:
            axis.plot(100 * one.share, place, "o", color=colour, markersize=5,
                      markerfacecolor=colour if one.counts else "none")  # fmt: skip
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set_yticks(range(len(found)), [f"{one.run}, {one.fit}" for one in reversed(found)])
    axis.set_ylim(-0.6, len(found) - 0.4)
    for family in dict.fromkeys(one.family for one in found if one.family):
        axis.plot([], [], "o", color=palette[family], label=family)
    label(axis, "measured minus predicted loss (%)", "")
    legend(axis)
    caption = (
        "Bars: 95 % interval of each prediction. Points: what was measured; hollow where the prediction was not "
        "registered before the run's first step, or its entry does not hold. Without a point: not measured yet."
    )
    return Plot(
        "predictions", "Predicted beforehand, then measured", as_image(figure), caption, COLUMNS,
        [_row(one) for one in found],
    )  # fmt: skip


def _row(one: Outcome) -> tuple[str, ...]:
    digits = formats.decimals((one.high - one.low) / 2)
    return (
        one.run, one.fit, formats.fixed(one.predicted, digits),
        f"{one.low:.{digits}f} to {one.high:.{digits}f}", formats.fixed(one.measured, digits),
        formats.NONE if one.error is None else f"{one.error:+.{digits}f}",
        formats.NONE if one.share is None else f"{one.share:+.2%}",
        formats.NONE if one.inside is None else "yes" if one.inside else "no",
        one.registered, one.when, one.ended, one.hash[:12], "; ".join(one.faults) or "intact",
    )  # fmt: skip


def blocks(found: Sequence[Outcome]) -> list[Block]:
    """What stands below the plot."""
    said = predicted(found)
    late = [one for one in found if not one.before]
    if late:
        said.append(
            f"{formats.plural(len(late), 'entry')} made after the run had begun or ended: no test of the law."
            if len(late) == 1
            else f"{len(late)} entries made after their runs had begun or ended: no tests of the laws."
        )
    return [Points(said)] if said else []
