"""Whether the learning rate that a study's rule gives is the best one nearby, family by family."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cells import budgets_of, completed
from .points import Point
from .seeds import SeedNoise, reach

FEWEST = 3  # rates for a parabola


@dataclass(frozen=True)
class RateCheck:
    """Runs of one model that differ in the learning rate alone.

    Attributes:
        active: active parameters.
        ratios: peak learning rate over the rule's, ascending.
        losses: for each ratio; None for a run that did not finish.
        parabola: of the losses over ln ratio, highest power first; None with fewer than three losses or no minimum.
        excess: the rule's loss minus the smallest one.
        reach: half the width of the 95 % interval of a difference between two such runs; None: not measured.
    """

    family: str
    active: float
    budget: float
    lr: float
    seed: int | None
    ratios: tuple[float, ...]
    losses: tuple[float | None, ...]
    parabola: tuple[float, float, float] | None
    excess: float
    reach: float | None

    @property
    def best_ratio(self) -> float:
        """Of the measured rates the one with the smallest loss."""
        return min((x, r) for x, r in zip(self.losses, self.ratios, strict=True) if x is not None)[1]

    @property
    def bracketed(self) -> bool:
        """Whether the smallest loss has a measured rate on either side; a run that diverged is a bound too."""
        return self.ratios[0] < self.best_ratio < self.ratios[-1]

    @property
    def refuted(self) -> bool:
        """Whether another rate is better by more than seeds explain."""
        return self.reach is not None and self.excess > self.reach


def rate_checks(points: Sequence[Point], noise: SeedNoise | None) -> list[RateCheck]:
    """Every run by the rule that has runs with other rates beside it, in order of family and budget."""
    bases = [p for p in completed(points) if not p.check and p.lr]
    others = [p for p in points if p.check == "lr" and p.lr and p.c and p.n_active]
    budgets = budgets_of([*bases, *others])
    groups: dict[Point, dict[float, float | None]] = {}
    for other in others:
        for base in bases:
            if _same_but_rate(base, other) and budgets[base.run] == budgets[other.run]:
                ratio = float(f"{(other.lr or 0.0) / (base.lr or 1.0):.3g}")
                groups.setdefault(base, {1.0: base.loss})[ratio] = other.loss if other.state == "done" else None
    return [_check(base, budgets[base.run], groups[base], noise) for base in bases if base in groups]


def _same_but_rate(base: Point, other: Point) -> bool:
    return all(getattr(base, name) == getattr(other, name) for name in ("family", "n_active", "n_total", "seed", "b"))


def _check(base: Point, budget: float, measured: dict[float, float | None], noise: SeedNoise | None) -> RateCheck:
    ratios = tuple(sorted(measured))
    losses = tuple(measured[ratio] for ratio in ratios)
    known = [(math.log(ratio), loss) for ratio, loss in measured.items() if loss is not None]
    found = reach(noise, [(base.family, 2.0)])
    return RateCheck(
        family=base.family,
        active=base.n_active or 0.0,
        budget=budget,
        lr=base.lr or 0.0,
        seed=base.seed,
        ratios=ratios,
        losses=losses,
        parabola=_parabola(known),
        excess=(base.loss or 0.0) - min(loss for _, loss in known),
        reach=found[0] if found else None,
    )


def _parabola(known: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    if len(known) < FEWEST:
        return None
    x, y = np.array(sorted(known)).T
    curve = np.polyfit(x, y, 2)
    if curve[0] <= 0 or not x[0] < -curve[1] / (2 * curve[0]) < x[-1]:
        return None
    return float(curve[0]), float(curve[1]), float(curve[2])
