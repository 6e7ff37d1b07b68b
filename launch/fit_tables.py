"""Fits and their comparison for a terminal."""

from rich.table import Table

from ..scaling.criteria import Contest
from ..scaling.fitted import Fit

STATED = ("source", "predicts", "objective", "intervals")  # conventions shown before those of the variables


def fit_table(result: Fit) -> Table:
    """Coefficients with their intervals, and how good the fit is."""
    quality = [f"{result.n_points} points", f"rmse {result.rmse_log:.3%} of what it predicts"]
    quality.append(f"{result.agreeing} of {result.tried} starts agree")
    if result.held_out is not None:
        held = result.held_out
        quality.append(f"held out: {held.n} points, rmse {held.rmse_log:.3%}, at most {held.max_rel:.3%}")
    table = Table(title=str(result.conventions["equation"]), caption="; ".join(quality), caption_justify="left")
    table.add_column("coefficient")
    for heading in ("value", "95 % from", "to"):
        table.add_column(heading, justify="right")
    for name, estimate in result.coefficients.items():
        value = "undetermined" if estimate.value is None else f"{estimate.value:.4g}"
        table.add_row(name, value, *("" if end is None else f"{end:.4g}" for end in (estimate.low, estimate.high)))
    return table


def fit_words(result: Fit) -> str:
    """What the table rests on: a line for each variable as it was counted, then how it was fitted."""
    stated = result.conventions
    lines = [f"{name}: {stated[name]}" for name in result.variables if name in stated]
    lines += [f"{name}: {stated[name]}" for name in STATED if name in stated]
    return "\n".join([*lines, result.identifiability.words])


def contest_table(contest: Contest) -> Table:
    """Laws, best first."""
    table = Table(caption="\n".join(contest.sentences), caption_justify="left")
    table.add_column("law", no_wrap=True)
    headings = ("coefficients", "rmse fitted", "rmse held out", "worst held out", "AICc", "BIC", "starts agreeing")
    for heading in headings:
        table.add_column(heading, justify="right")
    for fit, ahead in zip(contest.fits, contest.ahead, strict=True):
        held = fit.held_out
        table.add_row(
            fit.law,
            str(len(fit.values)),
            f"{fit.rmse_log:.3%}",
            f"{held.rmse_log:.3%}" if held else "",
            f"{held.max_rel:.3%}" if held else "",
            "" if ahead is None else f"+{ahead:.1f}",
            f"{fit.criteria.bic:.1f}",
            f"{fit.agreeing} of {fit.tried}",
        )
    return table
