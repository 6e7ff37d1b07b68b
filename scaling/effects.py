"""Loss against sparsity and against granularity: cells that differ in that alone.

Compared are cells of equal shape (the parameters that every token uses, routers aside), compute, batch and learning
rate. Along sparsity the granularity is the same too; the dense model counts as sparsity 0 of every granularity, being
what a layer is whose experts all serve every token. Along granularity the sparsity is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .cells import DENSE, Cell, Shape, cells_of
from .minima import Minimum, minimum
from .points import Point
from .seeds import Difference, SeedNoise, difference

Axis = Literal["s", "g"]


FEWEST_LEVELS = 3  # for an optimum along a line


@dataclass(frozen=True)
class Line:
    """Cells that differ in ``axis`` alone, by its ascending value.

    Attributes:
        fixed: granularity along sparsity, sparsity along granularity.
        steps: from each level to the next: its mean loss minus the next one's; positive: more of it is better.
    """

    axis: Axis
    budget: float
    shape: Shape
    fixed: float
    values: tuple[float, ...]
    cells: tuple[Cell, ...]
    steps: tuple[Difference, ...]

    @property
    def name(self) -> str:
        return f"G {self.fixed:g}" if self.axis == "s" else f"S {self.fixed:.3g}"


def lines_along(axis: Axis, points: Sequence[Point], noise: SeedNoise | None) -> list[Line]:
    """All lines of at least two levels, by budget, size and what is fixed.

    Where two families share a level, or a seed occurs twice in a cell, runs differ in something that points do not
    tell, so that level is left out.
    """
    groups: dict[tuple[object, ...], dict[float, list[Cell]]] = {}
    dense: dict[tuple[object, ...], Cell] = {}
    kept: dict[tuple[object, ...], tuple[float, Shape, float]] = {}
    for cell in cells_of(points):
        sample = cell.runs[0]
        place = (cell.budget, cell.shape, cell.setting)
        if cell.shape is None:
            continue
        if cell.family == DENSE:
            dense[place] = cell
        elif sample.s is not None and sample.g is not None and sample.e not in (None, 1):
            value, fixed = (sample.s, sample.g) if axis == "s" else (sample.g, sample.s)
            key: tuple[object, ...] = (*place, sample.shared, fixed)
            groups.setdefault(key, {}).setdefault(value, []).append(cell)
            kept[key] = (cell.budget, cell.shape, fixed)
    if axis == "s":
        for key, levels in groups.items():
            if key[:3] in dense:
                levels[0.0] = [dense[key[:3]]]
    found = []
    for key, levels in sorted(groups.items(), key=lambda item: kept[item[0]]):
        alone = {value: cells[0] for value, cells in sorted(levels.items()) if len(cells) == 1 and cells[0].seeds_alone}
        if len(alone) >= 2:
            ordered = tuple(alone.values())
            steps = tuple(difference(a, b, noise) for a, b in zip(ordered, ordered[1:], strict=False))
            budget, shape, fixed = kept[key]
            found.append(Line(axis, budget, shape, fixed, tuple(alone), ordered, steps))
    return found


def optimum(line: Line, noise: SeedNoise | None) -> Minimum | None:
    """The best granularity, or along sparsity the best 1 / (1 - S): experts for each that a token visits.

    Along sparsity active size and compute are fixed. None with fewer than three levels. Families along a line have few
    seeds each, so the deviation is the pooled one, or the largest where families differ in theirs.
    """
    if len(line.values) < FEWEST_LEVELS:
        return None
    x = [value if line.axis == "g" else 1 / (1 - value) for value in line.values]
    spread = None
    if noise is not None:
        spread = noise.pooled if noise.alike else max(noise.families.values(), key=lambda one: one.sd)
    return minimum(x, [cell.mean for cell in line.cells], [len(cell.runs) for cell in line.cells], spread, "level")
