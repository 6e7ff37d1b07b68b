"""What ``moescale fit`` does with its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UserError
from ..scaling.criteria import Contest, compare
from ..scaling.fit import Fit, Residuals
from ..scaling.laws import Law, law_named
from ..scaling.points import Point, read_points, variables_of
from .fitting import DEVIATION, WEIGHT, fit_points


@dataclass(frozen=True)
class FitOptions:
    """Options that a fit and a comparison share, as the command line has them."""

    points: Path
    mapping: Mapping[str, str]
    hold_out: str | None
    weight: str | None
    sd: str | None
    huber: float
    residuals: Residuals
    seed: int


def fit_law(options: FitOptions, name: str, bootstrap: int, plot: Path | None) -> Fit:
    """Fit one law; with ``plot``, draw what it leaves over.

    Raises:
        UserError: the table, the law or an option is wrong.
    """
    law = _law(name, options)
    points = _points(options, (law,))
    if plot is None:
        return _fit(options, points, law, bootstrap)
    from ..scaling.fit_plots import check_ending, write_fit_plot  # matplotlib takes a second

    check_ending(plot)
    result = _fit(options, points, law, bootstrap)
    variables, loss, _ = variables_of(points, law)
    write_fit_plot(plot, result, variables, loss)
    return result


def compare_laws(options: FitOptions, names: Sequence[str]) -> Contest:
    """Fit several laws to the same points; intervals are left out.

    Raises:
        UserError: fewer than two different laws, or as for `fit_law`.
    """
    if len(set(names)) < len(names) or len(names) < 2:
        raise UserError(f"--compare {','.join(names)}: give two or more different laws")
    laws = [_law(name, options) for name in names]
    if len({law.quantity for law in laws}) > 1:
        raise UserError(f"--compare {','.join(names)}: these laws predict different things, so no order means anything")
    points = _points(options, laws)
    return compare([_fit(options, points, law, 0) for law in laws])


def _law(name: str, options: FitOptions) -> Law:
    columns = {variable: column for variable, column in options.mapping.items() if variable != "loss"}
    return law_named(name, columns or None)


def _points(options: FitOptions, laws: Sequence[Law]) -> list[Point]:
    """The table, with the columns that laws and weights need."""
    if options.weight is not None and options.sd is not None:
        raise UserError("--weight and --sd: give one; --sd weighs by 1 / sd^2")
    columns = dict(options.mapping)
    for name, column in ((WEIGHT, options.weight), (DEVIATION, options.sd)):
        if column is not None:
            columns[name] = column
    own = {variable for law in laws for variable in law.variables}
    asked = [name for name in (WEIGHT, DEVIATION) if name in columns]
    return read_points(options.points, columns, sorted({*own, *asked}))


def _fit(options: FitOptions, points: Sequence[Point], law: Law, bootstrap: int) -> Fit:
    result = fit_points(
        points,
        law,
        options.hold_out,
        bootstrap,
        options.seed,
        huber_delta=options.huber,
        residuals=options.residuals,
        mapping=options.mapping,
    )
    if options.hold_out is not None and result.held_out is None:  # in a study, such runs may be still to come
        raise UserError(
            f"--hold-out {options.hold_out!r}: holds for none of the {result.n_points} points, so none is held out"
        )
    return result
