"""Grids of batch and learning rate: the best of each, and how they grow.

Runs of one family, shape and budget that differ in batch and peak learning rate form a grid. Along each batch the
losses over the learning rate are a U: its minimum is the best rate for that batch (`minima`). The losses at those
minima over the batch are a U again: its minimum is the best batch. Both count only where measured values lie on both
sides. Power laws of the best rate and the best batch in compute, loss, size or tokens need three optima; the best rate
over the batch, at equal size and budget, needs three batches.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .cells import DENSE, Cell, Shape, cells_of
from .lines import PowerLine, power_line
from .minima import Minimum, minimum
from .points import Point
from .seeds import SeedNoise, Spread, t_factor

FEWEST = 3  # rates for a U
Over = Literal["c", "loss", "n", "d", "b"]


@dataclass(frozen=True)
class Rates:
    """Losses over the learning rate at one batch.

    Attributes:
        batch: tokens.
        rates, losses, seeds: by ascending rate; losses are means over seeds.
        best: over the rate.
    """

    batch: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    seeds: tuple[int, ...]
    best: Minimum


@dataclass(frozen=True)
class Grid:
    """One family, shape and budget at several batches and learning rates.

    Attributes:
        n, d: active parameters and tokens of its runs.
        rows: by ascending batch.
        batch: over the batch, each at its best rate; None with fewer than three batches.
    """

    family: str
    budget: float
    shape: Shape | None
    n: float
    d: float
    rows: tuple[Rates, ...]
    batch: Minimum | None

    @property
    def best_rate(self) -> Minimum | None:
        """The best learning rate at the measured batch that is nearest to the best one."""
        if self.batch is None:
            return self.rows[0].best if len(self.rows) == 1 else None
        at = math.log(self.batch.at)
        return min(self.rows, key=lambda row: abs(math.log(row.batch) - at)).best

    @property
    def loss(self) -> float:
        """Smallest loss, interpolated where that is possible."""
        return self.batch.loss if self.batch is not None else min(row.best.loss for row in self.rows)


@dataclass(frozen=True)
class Law:
    """A power law of the best learning rate or batch."""

    family: str
    what: Literal["lr", "b"]
    over: Over
    line: PowerLine


@dataclass(frozen=True)
class Ratio:
    """A family's optimum over the dense one's at equal shape and budget.

    Attributes:
        where: the batch at which rates are compared; empty for batches.
        value: with its 95 % interval, from the seed noise of all losses; None without such.
        open: why there is none, or why it is not bounded: one of the optima lies at an edge or near one.
    """

    family: str
    what: Literal["lr", "b"]
    budget: float
    where: float | None
    value: float
    low: float | None
    high: float | None
    open: str

    @property
    def resolved(self) -> bool | None:
        """Whether the interval excludes 1; None without one."""
        return None if self.low is None or self.high is None else self.low > 1 or self.high < 1


def grids(points: Sequence[Point], noise: SeedNoise | None) -> list[Grid]:
    """Every grid with at least three rates at one batch; the runs of the learning-rate check are in `rates`."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells_of(points):
        if None in cell.setting:
            continue
        sample = cell.runs[0]
        key = (cell.family, cell.budget, cell.shape, sample.n_total, sample.n_active)
        groups.setdefault(key, []).append(cell if cell.seeds_alone else _one_rate(cell))
    found = []
    for cells in groups.values():
        rows = _rows(cells, noise.of(cells[0].family)[1] if noise else None)
        if rows:
            found.append(_grid(cells, rows, noise.of(cells[0].family)[1] if noise else None))
    return sorted(found, key=lambda grid: (grid.family != DENSE, grid.family, grid.budget, grid.n))


def _one_rate(cell: Cell) -> Cell:
    """Of runs whose rates agree to four digits only those of the commonest exact rate: each seed then counts once."""
    rates = Counter(run.lr for run in cell.runs)
    commonest = max(rates, key=lambda rate: rates[rate])
    return replace(cell, runs=tuple({run.seed: run for run in cell.runs if run.lr == commonest}.values()))


def _rows(cells: Sequence[Cell], spread: Spread | None) -> list[Rates]:
    rows = []
    for batch in sorted({cell.setting[0] or 0.0 for cell in cells}):
        own = sorted((cell for cell in cells if cell.setting[0] == batch), key=lambda cell: cell.setting[1] or 0.0)
        rates = tuple(cell.setting[1] or 0.0 for cell in own)
        if len(set(rates)) < FEWEST or len(set(rates)) < len(rates):
            continue
        losses, seeds = tuple(cell.mean for cell in own), tuple(len(cell.runs) for cell in own)
        rows.append(Rates(batch, rates, losses, seeds, minimum(rates, losses, seeds, spread, "rate")))
    return rows


def _grid(cells: Sequence[Cell], rows: Sequence[Rates], spread: Spread | None) -> Grid:
    sample = cells[0].runs[0]
    batch = None
    if len(rows) >= FEWEST:
        # A row's smallest loss is worth 1 / variance runs.
        worth = [max(round(1 / row.best.variance), 1) for row in rows]
        batch = minimum([row.batch for row in rows], [row.best.loss for row in rows], worth, spread, "batch")
    return Grid(
        sample.family, cells[0].budget, cells[0].shape, sample.n_active or 0.0, sample.d or 0.0, tuple(rows), batch
    )


def laws(found: Sequence[Grid], noise: SeedNoise | None) -> list[Law]:
    """Power laws of the best rate and batch over compute, loss, size and tokens, and of the rate over the batch."""
    result: list[Law] = []
    for family in dict.fromkeys(grid.family for grid in found):
        own = [grid for grid in found if grid.family == family]
        freedom = noise.of(family)[1].freedom if noise else 0
        for what in ("lr", "b"):
            optima = [(grid, best) for grid in own if (best := grid.best_rate if what == "lr" else grid.batch)]
            inside = [(grid, best) for grid, best in optima if best.interior]
            for over in ("c", "loss", "n", "d"):
                x = [{"c": g.budget, "loss": g.loss, "n": g.n, "d": g.d}[over] for g, _ in inside]
                line = _line(x, [best for _, best in inside], freedom)
                if line is not None:
                    result.append(Law(family, "lr" if what == "lr" else "b", over, line))
        for grid in own:
            rows = [row for row in grid.rows if row.best.interior]
            line = _line([row.batch for row in rows], [row.best for row in rows], freedom)
            if line is not None:
                result.append(Law(f"{family} at {grid.budget:.1e}", "lr", "b", line))
    return result


def _line(x: Sequence[float], optima: Sequence[Minimum], freedom: int) -> PowerLine | None:
    errors = [best.error for best in optima]
    known = [error for error in errors if error]
    return power_line(x, [best.at for best in optima], known if len(known) == len(x) else None, freedom)


def ratios(found: Sequence[Grid], noise: SeedNoise | None) -> list[Ratio]:
    """Every family's best batch, and best rate at each common batch, over the dense one's at equal shape and budget."""
    dense = {(grid.shape, grid.budget): grid for grid in found if grid.family == DENSE}
    result = []
    for grid in found:
        base = dense.get((grid.shape, grid.budget))
        if grid.family == DENSE or grid.shape is None or base is None:
            continue
        pairs: list[tuple[Literal["lr", "b"], float | None, Minimum, Minimum]] = []
        if grid.batch is not None and base.batch is not None:
            pairs.append(("b", None, grid.batch, base.batch))
        rates = {row.batch: row.best for row in base.rows}
        pairs += [("lr", row.batch, row.best, rates[row.batch]) for row in grid.rows if row.batch in rates]
        for what, where, one, other in pairs:
            result.append(_ratio(grid, what, where, one, other, noise))
    return result


def _ratio(
    grid: Grid, what: Literal["lr", "b"], where: float | None, one: Minimum, other: Minimum, noise: SeedNoise | None
) -> Ratio:
    value = one.at / other.at
    edges = [name for name, best in ((grid.family, one), (DENSE, other)) if not best.interior]
    if edges:
        remark = f"{' and '.join(edges)}: best at the edge of what was tried"
        return Ratio(grid.family, what, grid.budget, where, value, None, None, remark)
    if noise is None or one.error is None or other.error is None:
        return Ratio(grid.family, what, grid.budget, where, value, None, None, "seed noise not measured")
    freedom = min(noise.of(grid.family)[1].freedom, noise.of(DENSE)[1].freedom)
    reach = t_factor(freedom) * math.hypot(one.error, other.error)
    wide = any((one.open_low, one.open_high, other.open_low, other.open_high))
    remark = "an optimum may lie beyond what was tried: the interval is too narrow" if wide else ""
    return Ratio(
        grid.family, what, grid.budget, where, value, value * math.exp(-reach), value * math.exp(reach), remark
    )
