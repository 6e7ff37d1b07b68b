"""What a table of runs shows, whoever trained them: the analysis of a study's report, without a study."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..scaling.analysis import Analysis, analyse
from ..scaling.cells import families_of, finished
from ..scaling.findings import findings, warnings_of
from ..scaling.fit import Fit
from ..scaling.fitted import Estimate
from ..scaling.frontier import Best, frontier
from ..scaling.laws import CHINCHILLA
from ..scaling.minima import Minimum
from ..scaling.optimum_report import growth_blocks, size_blocks
from ..scaling.page import Block, write_page
from ..scaling.points import Point, read_points
from ..scaling.report import sections
from ..scaling.settings_report import blocks as setting_blocks
from .collect import BOOTSTRAP
from .fitting import fit_points

NEEDED = ("c", "d", "n_active", "loss")
POSITIVE = (*NEEDED, "n_total", "b", "lr", "e", "k", "g", "bits_per_byte", "b_simple", "seconds")


@dataclass(frozen=True)
class AnalysedTable:
    """A table of runs, and what it shows.

    Attributes:
        fits: each family's law of n and d; the power laws of best losses are in ``analysis``.
        unfitted: why a law of n and d could not be fitted.
    """

    path: Path
    points: Sequence[Point]
    fits: Mapping[str, Fit]
    unfitted: Sequence[str]
    analysis: Analysis

    @classmethod
    def read(cls, path: Path, mapping: Mapping[str, str]) -> "AnalysedTable":
        """Read and analyse the table at ``path``; runs without a family are one, named like the file.

        Args:
            mapping: field of a point -> the column that holds it, where the names differ.

        Raises:
            UserError: no table, or no run in it whose compute, tokens, active parameters and loss are known.
        """
        points = [replace(point, family=point.family or path.stem) for point in read_points(path, mapping)]
        if not finished(points):
            lacking = [name for name in NEEDED if all(point.number(name) is None for point in points)]
            if not lacking:
                raise UserError(f"{path}: no finished run has all of {', '.join(NEEDED)}")
            raise UserError(
                f"{path}: no run has {' or '.join(lacking)}; name the column that holds it, as in "
                f"--map {lacking[0]}=COLUMN"
            )
        for point in finished(points):
            _refuse_senseless(path, point)
        fits, unfitted = _fits(points)
        return cls(path, points, fits, unfitted, analyse(points, {}, fits))

    @cached_property
    def headlines(self) -> list[str]:
        """The main results, a sentence each."""
        return findings(self.analysis)

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before believing anything."""
        return list(dict.fromkeys([*self.unfitted, *warnings_of(self.analysis)]))

    @property
    def blocks(self) -> list[Block]:
        """Optimal sizes, their growth, batches and learning rates."""
        return [*size_blocks(self.analysis), *growth_blocks(self.analysis), *setting_blocks(self.analysis)]

    def frontier(self, compute: Sequence[float]) -> tuple[list[Best], list[str]]:
        """The best model of each family for each of these FLOPs, and which families have none and why."""
        return frontier(self.analysis, compute) if compute else ([], [])

    def write_report(self, out: Path) -> None:
        """The report as one HTML file.

        Raises:
            UserError: it cannot be written.
        """
        try:
            write_page(out, self.path.stem, sections(self.analysis, {"table": str(self.path)}, self.unfitted))
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None


def _refuse_senseless(path: Path, point: Point) -> None:
    """Numbers that no run can have: their logarithms would end the analysis, or bend every curve."""
    for name in POSITIVE:
        value = point.number(name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(
                f"{path}, run {point.run}: {name} ({value:g}) must be positive; correct it or leave the row out"
            )
    bounds = {"s": 1.0, "n_router": point.number("n_active"), "n_embedding": math.inf}
    for name, bound in bounds.items():
        value = point.number(name)
        if value is not None and bound is not None and not 0 <= value < bound:
            raise UserError(
                f"{path}, run {point.run}: {name} ({value:g}) must be at least 0 and below {bound:g}; correct it or "
                "leave the row out"
            )


def _fits(points: Sequence[Point]) -> tuple[dict[str, Fit], list[str]]:
    used = finished(points)
    fits, unfitted = {}, []
    for family in families_of(used):
        own = [point for point in used if point.family == family]
        try:
            fits[f"{CHINCHILLA.name}-{family}"] = fit_points(own, CHINCHILLA, None, BOOTSTRAP, 0)
        except UserError as error:
            unfitted.append(f"{family}: no law of n and d: {error}")
    return fits, unfitted


def table_as_json(found: AnalysedTable, rows: Sequence[Best], missing: Sequence[str]) -> dict[str, Any]:
    """What programs read of an analysed table."""
    study = found.analysis
    fits = {**{f"power-best-{family}": fit for family, fit in study.powers.items()}, **found.fits}
    return {
        "table": str(found.path),
        "runs": len(found.points),
        "headlines": found.headlines,
        "warnings": found.warnings,
        "fits": {name: result.as_json() for name, result in fits.items()},
        "sizes": [
            {"family": one.family, "budget": one.budget, **_minimum(one.minimum), "tokens": one.d_best}
            for one in study.profiles
        ],
        "growths": [
            {
                "family": one.family, "what": one.what, "optima": one.optima, "budgets": one.budgets,
                "by_minima": _estimate(one.line.power if one.line else None), "by_law": _estimate(one.by_law),
            }
            for one in study.growths
        ],
        "rates": [
            {"family": grid.family, "budget": grid.budget, "n": grid.n, "batch": row.batch, **_minimum(row.best)}
            for grid in study.grids
            for row in grid.rows
        ],
        "batches": [
            {"family": grid.family, "budget": grid.budget, "n": grid.n, **_minimum(grid.batch)}
            for grid in study.grids
            if grid.batch is not None
        ],
        "frontier": {"rows": [asdict(row) for row in rows], "missing": list(missing)},
    }  # fmt: skip


def _minimum(found: Minimum) -> dict[str, Any]:
    names = ("interior", "at", "low", "high", "open_low", "open_high", "akima", "loss", "remark")
    return {name: getattr(found, name) for name in names}


def _estimate(found: Estimate | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}
