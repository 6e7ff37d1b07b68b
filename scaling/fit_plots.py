"""What a fitted law leaves over: residuals over each variable, and prediction over measurement."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..base.errors import UserError
from ..base.files import write_atomically
from .figures import COLOURS, DENSE_COLOUR, Plot, as_image, label, legend, panels
from .fitted import Fit
from .laws import Array
from .page import Picture, Points, Section, Terms, Text, write_page

DOTS_PER_INCH = 160
KINDS = (".png", ".html")


def write_fit_plot(path: Path, result: Fit, variables: Mapping[str, Array], loss: Array) -> None:
    """Write the residuals of a fit as a PNG image, or as an HTML page with the data and what the fit states.

    Args:
        path: ends in .png or .html.
        variables, loss: of all points, held-out ones too, in the order of ``result.rows``, each [n].

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    check_ending(path)
    figure = _figure(result, variables, loss)
    try:
        if path.suffix == ".png":
            image = io.BytesIO()
            FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
            write_atomically(path, image.getvalue())
        else:
            write_page(path, f"{result.law}: {result.conventions['equation']}", _sections(result, figure, loss))
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error}") from None


def check_ending(path: Path) -> None:
    """Raises a `UserError` where ``path`` ends in no kind of picture that is written."""
    if path.suffix not in KINDS:
        raise UserError(f"--plot {path}: must end in {' or '.join(KINDS)}")


def _figure(result: Fit, variables: Mapping[str, Array], loss: Array) -> Figure:
    held = np.array([row.held for row in result.rows])
    residual = 100 * np.array([row.residual for row in result.rows])
    figure, axes = panels(len(variables) + 1, height=3.0, share_y=False)
    figure.set_dpi(DOTS_PER_INCH)
    for axis, (name, values) in zip(axes, variables.items(), strict=False):
        shown = 1 - values if name == "s" else values
        _dots(axis, shown, residual, held)
        axis.axhline(0, color=DENSE_COLOUR, linewidth=0.8)
        if np.ptp(np.log(shown)) > 0:
            axis.set_xscale("log")
        label(axis, "1 - s" if name == "s" else name, "log(prediction / measured) (%)")
    predicted = loss * np.exp(residual / 100)
    _dots(axes[-1], loss, predicted, held)
    ends = [min(loss.min(), predicted.min()), max(loss.max(), predicted.max())]
    axes[-1].plot(ends, ends, color=DENSE_COLOUR, linewidth=0.8)
    label(axes[-1], "measured", "predicted")
    legend(axes[-1])
    return figure


def _dots(axis: Axes, x: Array, y: Array, held: Array) -> None:
    fitted = held == 0
    axis.plot(x[fitted], y[fitted], "o", color=COLOURS[0], markersize=4, alpha=0.8, label="fitted")
    if held.any():
        axis.plot(x[held], y[held], "D", color=COLOURS[1], markersize=5, markerfacecolor="none", label="held out")


def _sections(result: Fit, figure: Figure, loss: Array) -> list[Section]:
    caption = (
        "Residuals over each variable and predictions over measurements. A trend, or a bend, means that the law's form "
        "does not fit; hollow diamonds were held out."
    )
    rows = [
        (row.name, f"{measured:.4f}", f"{row.residual:+.3%}", "held out" if row.held else "fitted")
        for row, measured in zip(result.rows, loss, strict=True)
    ]
    plot = Plot("residuals", "Residuals", as_image(figure), caption, ("point", "measured", "residual", "used"), rows)
    blocks: list[Picture | Points | Text] = [Picture(plot), Text(f"{result.identifiability.words}.")]
    if result.warnings:
        blocks.append(Points(result.warnings, warning=True))
    return [
        Section("residuals", "Residuals", blocks),
        Section("conventions", "Conventions", [Terms(result.conventions)]),
    ]
