"""Which runs may be compared: finished ones, at one budget, alike in all but what is compared."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .points import Point

DENSE = "dense"  # the family that others are compared with
SAME_BUDGET = 1.1  # ratio of FLOPs within which runs count as one budget


class Shape(NamedTuple):
    """What two models of one size agree in, whatever their experts: parameters that every token uses, router aside."""

    embedding: float
    active: float


@dataclass(frozen=True)
class Cell:
    """Runs that differ in the seed alone, as far as points tell.

    Attributes:
        budget: FLOPs, nominal.
        shape: None where a table does not say how many parameters are routers'.
        setting: batch in tokens and peak learning rate.
    """

    family: str
    budget: float
    shape: Shape | None
    setting: tuple[float | None, float | None]
    runs: tuple[Point, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(float(p.loss) for p in self.runs if p.loss is not None)

    @property
    def seeds_alone(self) -> bool:
        """Whether every seed occurs once; otherwise the runs differ in something that points do not tell."""
        return len(self.runs) == 1 or len(self.by_seed) == len(self.runs)

    @property
    def mean(self) -> float:
        return float(np.mean(self.losses))

    @property
    def by_seed(self) -> dict[int, float]:
        return {p.seed: float(p.loss) for p in self.runs if p.seed is not None and p.loss is not None}


def finished(points: Iterable[Point]) -> list[Point]:
    """The points that profiles, comparisons and seed noise are made of.

    Runs that only check a setting are not, nor those whose evaluation knows later tokens.
    """
    return [p for p in completed(points) if not p.check and p.future != "always"]


def completed(points: Iterable[Point]) -> list[Point]:
    """Points that ended well, runs that only check a setting included."""
    return [p for p in points if p.state == "done" and None not in (p.loss, p.c, p.d, p.n_active)]


def families_of(points: Sequence[Point]) -> list[str]:
    """Families in order of appearance, the dense one first."""
    return sorted(dict.fromkeys(point.family for point in points), key=lambda family: family != DENSE)


def budgets_of(points: Sequence[Point]) -> dict[str, float]:
    """Run -> nominal budget: runs whose FLOPs lie close together share their geometric mean, at two digits."""
    ordered = sorted(points, key=lambda p: p.c or 0.0)
    groups: list[list[Point]] = []
    for point in ordered:
        if groups and (point.c or 0.0) <= SAME_BUDGET * (groups[-1][0].c or 0.0):
            groups[-1].append(point)
        else:
            groups.append([point])
    result = {}
    for group in groups:
        mean = math.exp(float(np.mean([math.log(p.c or 1.0) for p in group])))
        result.update({p.run: float(f"{mean:.1e}") for p in group})
    return result


def shape_of(point: Point) -> Shape | None:
    """None where the routers' share of a mixture's parameters is not known."""
    router = 0.0 if point.e in (None, 1) else point.n_router
    if router is None or point.n_active is None:
        return None
    return Shape(point.n_embedding or 0.0, point.n_active - router)


def cells_of(points: Sequence[Point]) -> list[Cell]:
    """All finished runs, those that differ in the seed alone together, in order of appearance."""
    points = finished(points)
    budgets = budgets_of(points)
    groups: dict[tuple[object, ...], list[Point]] = {}
    for p in points:
        key = (p.family, budgets[p.run], p.n_total, p.n_active, p.n_embedding, p.d, *setting_of(p))
        groups.setdefault(key, []).append(p)
    return [
        Cell(runs[0].family, budgets[runs[0].run], shape_of(runs[0]), setting_of(runs[0]), tuple(runs))
        for runs in groups.values()
    ]


def setting_of(point: Point) -> tuple[float | None, float | None]:
    """Batch and peak learning rate; the latter without the last bits of a schedule's arithmetic."""
    return point.b, None if point.lr is None else float(f"{point.lr:.4g}")
