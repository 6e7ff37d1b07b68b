"""The report of a study: one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from ..base.files import write_atomically
from . import formats, isoflop, plots, run_plots
from .figures import Plot
from .findings import in_words
from .fitted import Estimate, Fit
from .isoflop import UNRESOLVED, Comparison, Profile, SeedNoise
from .points import Point
from .record import Record

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: Path,
    *,
    title: str,
    points: Sequence[Point],
    records: Mapping[str, Record],
    fits: Mapping[str, Fit],
    provenance: Mapping[str, str],
    warnings: Sequence[str],
) -> None:
    """Write the report of a study.

    Args:
        points: every run, failed ones too.
        records: run -> its record; runs without one are missing from the plots of what happened inside runs.
        fits: name -> law fitted to the points.
        provenance: what names the study's origin, in the order to show: code version, machine, corpus, date, ...
        warnings: what the reader must know before believing anything.

    Raises:
        OSError: ``path`` cannot be written; nothing is left behind.
    """
    found = isoflop.profiles(points)
    powers = isoflop.best_loss_fits(found)
    noise = isoflop.seed_noise(points)
    compared = isoflop.compare(found, powers, noise)
    threshold = UNRESOLVED * 2**0.5 * noise.sd if noise else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    drawn: list[Plot | None] = [
        plots.isoflop_profiles(found),
        plots.best_losses(found, powers),
        plots.comparisons(compared, threshold),
        plots.loss_curves(points, records),
        run_plots.bits_per_byte(points, records),
        run_plots.noise_scale(points, records),
        run_plots.router_load(points, records),
    ]
    page = environment.get_template("report.html.j2").render(
        title=title,
        findings=in_words(points, found, powers, compared, noise),
        warnings=list(dict.fromkeys(warnings)),
        headline=_headline(found, compared),
        plots=[plot for plot in drawn if plot is not None],
        power_fits=_power_rows(powers),
        fits=[_fit_view(name, fit) for name, fit in fits.items() if not _is_among(fit, powers)],
        runs=[_run_row(point) for point in points],
        seeds=_seed_rows(noise),
        conventions=_conventions(records),
        provenance=list(provenance.items()),
    )
    write_atomically(path, page)


def _headline(found: Sequence[Profile], compared: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Rows of budget, family, best loss, optimal size, tokens, gap, multiple, remarks."""
    by_cell = {(c.family, c.budget): c for c in compared}
    rows: list[tuple[str, ...]] = []
    for profile in sorted(found, key=lambda p: p.budget):
        comparison = by_cell.get((profile.family, profile.budget))
        notes = [profile.remark] if profile.remark else []
        gap, multiple = "", ""
        if comparison is not None:
            gap = f"{comparison.gap:+.3f}"
            if comparison.multiple is not None:
                ends = formats.interval(comparison.low, comparison.high)
                multiple = formats.fixed(comparison.multiple, 2) + (f" ({ends})" if ends else "")
            notes += [text for text in plots.remarks(comparison) if text != "an optimum at an edge"]
        rows.append(
            (formats.flops(profile.budget), profile.family, formats.fixed(profile.loss_best),
             formats.count(profile.n_best), formats.count(profile.d_best), gap, multiple, "; ".join(notes))
        )  # fmt: skip
    return rows


def _power_rows(powers: Mapping[str, Fit]) -> list[tuple[str, ...]]:
    return [
        (family, formats.estimate(fit.coefficients["a"]), formats.estimate(fit.coefficients["b"]),
         f"{fit.rmse_log:.2%}", str(fit.n_points), "; ".join(fit.warnings))
        for family, fit in powers.items()
    ]  # fmt: skip


def _is_among(fit: Fit, powers: Mapping[str, Fit]) -> bool:
    """Whether ``fit`` is one of the power laws of best losses, which have a table of their own."""
    return any(fit.law == power.law and fit.values == power.values for power in powers.values())


def _fit_view(name: str, fit: Fit) -> dict[str, object]:
    """A fit as the template shows it."""
    held = fit.held_out
    facts = [
        f"{fit.n_points} points",
        f"residual {fit.rmse_log:.2%} (root mean square)",
        f"{fit.agreeing} of {fit.tried} starts agree",
    ]
    if held is not None:
        facts.append(f"on {held.n} held-out points: {held.rmse_log:.2%} (root mean square), {held.max_rel:.2%} at most")
    return {
        "name": name,
        "law": fit.law,
        "equation": fit.as_law().equation,
        "facts": "; ".join(facts),
        "coefficients": [
            (key, formats.estimate(Estimate(e.value, None, None), 4), formats.interval(e.low, e.high))
            for key, e in fit.coefficients.items()
        ],
        "warnings": fit.warnings,
        "conventions": list(fit.conventions.items()),
    }  # fmt: skip


def _run_row(point: Point) -> tuple[str, ...]:
    return (
        point.run, point.family, point.state, formats.count(point.n_total), formats.count(point.n_active),
        formats.count(point.d), formats.flops(point.c), formats.count(point.b), formats.significant(point.lr),
        formats.NONE if point.seed is None else str(point.seed), formats.fixed(point.loss, 4),
        formats.fixed(point.train_loss, 4), formats.fixed(point.bits_per_byte), formats.count(point.tokens_per_second),
        point.why,
    )  # fmt: skip


def _seed_rows(noise: SeedNoise | None) -> list[tuple[str, ...]]:
    if noise is None:
        return []
    return [
        (cell, ", ".join(f"{loss:.4f}" for loss in losses), f"{max(losses) - min(losses):.4f}")
        for cell, losses in noise.cells
    ]


def _conventions(records: Mapping[str, Record]) -> list[tuple[str, str]]:
    """What the runs themselves recorded; a convention that differs between runs is shown with every value."""
    values: dict[str, list[str]] = {}
    for record in records.values():
        for header in record.headers[-1:]:
            for name, text in header["conventions"].items():
                if text not in values.setdefault(name, []):
                    values[name].append(text)
    return [(name, " / ".join(texts)) for name, texts in values.items()]
