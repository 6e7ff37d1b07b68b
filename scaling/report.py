"""The report of a study: one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import downstream_report, effect_plots, outcome_report, plots, run_plots, settings_report, surface_report
from .analysis import Analysis, analyse
from .figures import Plot
from .findings import findings, warnings_of
from .fitted import Fit
from .limits import limits
from .optimum_report import axis_blocks, frontier_blocks, growth_blocks, size_blocks
from .outcomes import Outcome
from .page import Block, Picture, Points, Section, Terms, write_page
from .points import Point
from .record import Record
from .report_laws import law_blocks
from .report_tables import (
    batch_blocks,
    best_models,
    conventions,
    decimals_of,
    run_table,
    seed_blocks,
)


def write_report(
    path: Path,
    *,
    title: str,
    points: Sequence[Point],
    records: Mapping[str, Record],
    fits: Mapping[str, Fit],
    provenance: Mapping[str, str],
    warnings: Sequence[str],
    outcomes: Sequence[Outcome] = (),
) -> None:
    """Write the report of a study.

    Args:
        points: every run, failed ones too.
        records: run -> its record; runs without one are missing from the plots of what happened inside runs.
        fits: name -> law fitted to the points.
        provenance: what names the study's origin, in the order to show: code version, machine, corpus, date, ...
        warnings: what the reader must know before believing anything.
        outcomes: registered predictions beside what was measured.

    Raises:
        OSError: ``path`` cannot be written; nothing is left behind.
    """
    study = analyse(points, records, fits, outcomes)
    write_page(path, title, sections(study, provenance, warnings))


def sections(study: Analysis, provenance: Mapping[str, str], warnings: Sequence[str]) -> list[Section]:
    """All sections of a report; those without content stay empty."""
    points, records = study.points, study.records
    digits = decimals_of(study.noise)
    cautions = list(dict.fromkeys([*warnings, *warnings_of(study)]))
    return [
        Section("findings", "Findings", [Points(findings(study)), *_if(Points(cautions, warning=True), cautions)]),
        Section("limits", "What these runs can and cannot show", [Points(limits(study))]),
        Section("headline", "Best models at equal compute", best_models(study)),
        _plotted(plots.isoflop_profiles(study.profiles, digits), size_blocks(study)),
        _plotted(plots.best_losses(study.profiles, study.powers, digits)),
        _plotted(plots.comparisons(study.comparisons)),
        _plotted(effect_plots.saving_plot(study.savings)),
        _plotted(effect_plots.effect("s", study.sparsity, study.noise), axis_blocks("s", study)),
        _plotted(effect_plots.effect("g", study.granularity, study.noise), axis_blocks("g", study)),
        _plotted(surface_report.plot(study.surfaces), surface_report.blocks(study.surfaces)),
        _plotted(outcome_report.plot(study.outcomes, points), outcome_report.blocks(study.outcomes)),
        Section("growth", "Optimal size and tokens over compute", growth_blocks(study)),
        Section("frontier", "The best models for a budget", frontier_blocks(study)),
        Section("laws", "Fitted laws", law_blocks(study)),
        Section("seeds", "Seed noise", seed_blocks(study)),
        _plotted(effect_plots.rate_plot(study.rates)),
        _plotted(settings_report.plot(study.grids), settings_report.blocks(study)),
        _plotted(run_plots.noise_scale(study.gradient_noise), batch_blocks(study)),
        _plotted(downstream_report.scores(study.answered), downstream_report.blocks(study)),
        _plotted(plots.loss_curves(points, records)),
        _plotted(run_plots.bits_per_byte(points, records)),
        _plotted(run_plots.router_load(points, records)),
        Section("runs", "All runs", [run_table(points, digits)]),
        Section("conventions", "Conventions", conventions(study)),
        Section("provenance", "Provenance", _if(Terms(provenance), provenance)),
    ]


def _if(block: Block, content: object) -> list[Block]:
    return [block] if content else []


def _plotted(plot: Plot | None, more: Sequence[Block] = ()) -> Section:
    """A plot as a section of its own, with what it was used for."""
    if plot is None:
        return Section("", "")
    return Section(plot.key, plot.title, [Picture(plot), *more])
