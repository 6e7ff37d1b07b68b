"""How plots look, and how they become part of a page. Uses matplotlib's figures without its global state.

It takes a second to import, and who only prints what was found draws nothing: so functions import what they use.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .formats import count, flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DENSE_COLOUR = "#333333"
COLOURS = ("#0b6fb8", "#cf4a30", "#2f8f4e", "#7b4fa3", "#c98a00", "#1295a3", "#a83f7c", "#7a5c3e")
GRID = "#e3e3e3"
SIZE = 9  # points, of all text
WIDTH = 7.4  # inches


@dataclass(frozen=True)
class Plot:
    """A picture with the data it shows.

    Attributes:
        key: names it inside the page.
        image: data URI of an SVG.
        caption: what is drawn, and how to read it.
        columns, rows: the data as text.
    """

    key: str
    title: str
    image: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def colours(families: Sequence[str], dense: str = "dense") -> dict[str, str]:
    """One colour for each family, dark grey for the dense one."""
    others = [family for family in families if family != dense]
    return {dense: DENSE_COLOUR} | {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(others)}


def panels(number: int, height: float = 3.6, share_y: bool = True) -> "tuple[Figure, list[Axes]]":
    """A figure with ``number`` panels, at most three in a row."""
    from matplotlib.figure import Figure

    columns = min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, height if rows == 1 else 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    flat = list(axes.flat)
    for axis in flat[number:]:
        axis.set_visible(False)
    for axis in flat[:number]:
        axis.grid(True, color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=SIZE - 1, labelleft=True)
    return figure, flat[:number]


def label(axis: "Axes", x: str, y: str, title: str = "") -> None:
    axis.set_xlabel(x, fontsize=SIZE)
    axis.set_ylabel(y, fontsize=SIZE)
    if title:
        axis.set_title(title, fontsize=SIZE, loc="left")


def log_x(axis: "Axes") -> None:
    """A logarithmic x axis of parameters or tokens, labelled 200k instead of 2 x 10^5."""
    axis.set_xscale("log")
    _label_counts(axis.xaxis, *axis.get_xlim())


def log_y(axis: "Axes") -> None:
    """A logarithmic y axis of tokens."""
    axis.set_yscale("log")
    _label_counts(axis.yaxis, *axis.get_ylim())


def _label_counts(axis: "Axis", low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ratio = high / low
    subs = (1, 2, 3, 5) if ratio < 8 else (1, 2, 5) if ratio < 30 else (1, 3) if ratio < 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axis.set_minor_formatter(NullFormatter())


def budget_x(axis: "Axes", budgets: Sequence[float]) -> None:
    """A logarithmic x axis of compute, with a label at each budget."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.set_xticks(list(budgets), [flops(budget) for budget in budgets])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.08)


def legend(axis: "Axes", **options: Any) -> None:
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=SIZE - 1, frameon=False, **options)


def as_image(figure: "Figure") -> str:
    """The figure as a data URI."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
