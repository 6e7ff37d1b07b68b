"""Seed noise: how far two runs that differ in the seed alone lie apart, and which differences exceed it.

A family's standard deviation is pooled over its own cells with several seeds: families can differ in it by a factor
of several. A difference between means of two families has the standard error that their own deviations and numbers
of seeds give (Welch), and counts as resolved when it exceeds Student's t (95 %, two-sided) times that error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc, stdtrit

from .cells import DENSE, Cell, cells_of, families_of
from .points import Point

FEWEST_PAIRS = 3  # seeds in both families from which their paired difference is used
UNLIKE = 3.0  # ratio of families' standard deviations from which a pooled one is not used
UNLIKELY = 0.05  # p of Bartlett's test below which a pooled one is not used


@dataclass(frozen=True)
class Spread:
    """A standard deviation of the final loss over seeds, nats a token, and its degrees of freedom."""

    sd: float
    freedom: int


@dataclass(frozen=True)
class SeedNoise:
    """Spread of the final loss over seeds.

    Attributes:
        pooled: over all families.
        families: over a family's own cells, for families that have such.
        cells: with several seeds.
        p_alike: of Bartlett's test that families have one standard deviation; None with one family.
    """

    pooled: Spread
    families: Mapping[str, Spread]
    cells: tuple[Cell, ...]
    p_alike: float | None

    @property
    def ratio(self) -> float:
        """The largest of the families' standard deviations over the smallest."""
        deviations = [spread.sd for spread in self.families.values()]
        if min(deviations) == 0:
            return 1.0 if max(deviations) == 0 else math.inf
        return max(deviations) / min(deviations)

    @property
    def alike(self) -> bool:
        """Whether one standard deviation describes all families that have one, as far as can be told.

        Bartlett's test sees little with two degrees of freedom each, so that a large ratio counts too.
        """
        return self.ratio <= UNLIKE and (self.p_alike is None or self.p_alike >= UNLIKELY)

    def of(self, family: str) -> tuple[str, Spread]:
        """A family's spread and whose it is: its own; the pooled one; or, where families differ, the largest."""
        if family in self.families:
            return family, self.families[family]
        if self.alike:
            return "all families", self.pooled
        largest = max(self.families, key=lambda name: self.families[name].sd)
        return largest, self.families[largest]


@dataclass(frozen=True)
class Difference:
    """A difference between two mean losses.

    Attributes:
        value: nats a token.
        reach: half the width of its 95 % interval; None where seed noise was not measured.
        freedom: degrees of freedom of the standard error behind ``reach``.
        pairs: seeds in both means, if the interval rests on their paired differences; else 0.
    """

    value: float
    reach: float | None
    freedom: float | None = None
    pairs: int = 0

    @property
    def resolved(self) -> bool | None:
        """Whether it exceeds its interval; None where that is not known."""
        return None if self.reach is None else abs(self.value) > self.reach


def seed_noise(points: Sequence[Point]) -> SeedNoise | None:
    """Spread over seeds, from runs that agree in all but the seed; None where no cell has two."""
    several = [cell for cell in cells_of(points) if len(cell.runs) > 1 and cell.seeds_alone]
    if not several:
        return None
    families = {
        family: _pooled([cell for cell in several if cell.family == family])
        for family in families_of([cell.runs[0] for cell in several])
    }
    several.sort(key=lambda cell: cell.family != DENSE)
    return SeedNoise(_pooled(several), families, tuple(several), _bartlett(list(families.values())))


def _pooled(cells: Sequence[Cell]) -> Spread:
    freedom = sum(len(cell.losses) - 1 for cell in cells)
    squares = sum(float(np.var(cell.losses)) * len(cell.losses) for cell in cells)
    return Spread(math.sqrt(squares / freedom), freedom)


def _bartlett(spreads: Sequence[Spread]) -> float | None:
    """p of Bartlett's test of equal variances."""
    if len(spreads) < 2 or min(s.sd for s in spreads) == 0:
        return None
    total = sum(s.freedom for s in spreads)
    mean = sum(s.freedom * s.sd**2 for s in spreads) / total
    statistic = total * math.log(mean) - sum(s.freedom * math.log(s.sd**2) for s in spreads)
    correction = 1 + (sum(1 / s.freedom for s in spreads) - 1 / total) / (3 * (len(spreads) - 1))
    return float(chdtrc(len(spreads) - 1, statistic / correction))


def t_factor(freedom: float) -> float:
    """Student's t of a two-sided 95 % interval."""
    return float(stdtrit(freedom, 0.975))


def reach(noise: SeedNoise | None, parts: Sequence[tuple[str, float]]) -> tuple[float, float] | None:
    """Half the width of a 95 % interval of a sum of independent means, and its degrees of freedom.

    Args:
        parts: family and variance of each mean, in units of the variance of one run of the family.
    """
    if noise is None:
        return None
    used: dict[str, tuple[Spread, float]] = {}  # one estimate of a spread used twice is not two estimates
    for family, variance in parts:
        source, spread = noise.of(family)
        used[source] = (spread, used.get(source, (spread, 0.0))[1] + variance)
    squares = [(variance * spread.sd**2, spread.freedom) for spread, variance in used.values()]
    total = sum(square for square, _ in squares)
    if total == 0:
        return 0.0, float(sum(freedom for _, freedom in squares))
    freedom = total**2 / sum(square**2 / freedom for square, freedom in squares)
    return t_factor(freedom) * math.sqrt(total), freedom


def difference(one: Cell, other: Cell, noise: SeedNoise | None) -> Difference:
    """Mean loss of ``one`` minus that of ``other``: paired by seed where there are pairs enough."""
    common = [seed for seed in one.by_seed if seed in other.by_seed]
    if len(common) >= FEWEST_PAIRS:
        apart = np.array([one.by_seed[seed] - other.by_seed[seed] for seed in common])
        freedom = len(common) - 1
        error = float(apart.std(ddof=1)) / math.sqrt(len(common))
        return Difference(float(apart.mean()), t_factor(freedom) * error, freedom, len(common))
    found = reach(noise, [(one.family, 1 / len(one.losses)), (other.family, 1 / len(other.losses))])
    value = one.mean - other.mean
    return Difference(value, None) if found is None else Difference(value, *found)


@dataclass(frozen=True)
class Pairing:
    """Runs of one seed, shape and budget in two families: they saw the same data in the same order.

    Attributes:
        apart: dense loss minus this family's, for each seed.
    """

    family: str
    budget: float
    active: float
    apart: Mapping[int, float]
    difference: Difference


def pairings(points: Sequence[Point]) -> list[Pairing]:
    """Every family against the dense one in cells of equal shape, budget and setting with pairs enough."""
    cells = cells_of(points)
    reference = {(c.shape, c.budget, c.setting): c for c in cells if c.family == DENSE}
    found = []
    for cell in cells:
        dense = reference.get((cell.shape, cell.budget, cell.setting))
        if cell.family == DENSE or cell.shape is None or dense is None:
            continue
        apart = {s: dense.by_seed[s] - loss for s, loss in cell.by_seed.items() if s in dense.by_seed}
        if len(apart) >= FEWEST_PAIRS:
            found.append(Pairing(cell.family, cell.budget, cell.shape.active, apart, difference(dense, cell, None)))
    return found
