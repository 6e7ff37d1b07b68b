"""What a study's noise measurements say: B_simple over a run, against loss, and dense against mixtures.

A run's measurements are averaged in consecutive parts, numerator and denominator apart. Fits are least squares of
ln B over ln L through the parts, which count alike; intervals are Student's t from the residuals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from .cells import DENSE
from .laws import Array
from .lines import FEWEST, distance, regression
from .noise import NoiseAverage, NoiseEstimate, average
from .points import Point
from .record import Record

Kind = Literal["all", "dense", "expert"]
KINDS: tuple[Kind, ...] = ("all", "dense", "expert")
PARTS = 6  # of a run's measurements, each averaged to one value


@dataclass(frozen=True)
class Measured:
    """One part of a run.

    Attributes:
        kind: parameters that it is the noise scale of.
        loss: mean training loss over the part, nats a token.
        batch: tokens of the batch in use.
    """

    point: Point
    kind: Kind
    loss: float
    average: NoiseAverage
    batch: float


@dataclass(frozen=True)
class BatchLaw:
    """``B = B_star / L^(1 / a_B)`` (Kaplan et al. 2020) through the parts of one family.

    Attributes:
        power: 1 / a_B, with low and high: its 95 % interval.
        scale: B_star in tokens.
        resolved: whether B changes with L beyond its uncertainty.
    """

    family: str
    n: int
    power: float
    low: float
    high: float
    scale: float
    loss_range: tuple[float, float]

    @property
    def resolved(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class NoiseRatio:
    """B_simple of a family over that of the dense one at equal loss, with a 95 % interval.

    Attributes:
        n: parts that it rests on, of both families.
        loss_range: that both families passed through.
    """

    family: str
    ratio: float
    low: float
    high: float
    n: int
    loss_range: tuple[float, float]

    @property
    def resolved(self) -> bool:
        return self.low > 1 or self.high < 1


def measurements(points: Sequence[Point], records: Mapping[str, Record]) -> list[Measured]:
    """Every part of every run, for all parameters, the dense and the expert ones; a dense run has ``all`` alone."""
    return [
        part
        for point in points
        if point.run in records
        for kind in KINDS
        if kind == "all" or point.family != DENSE
        for part in _parts(point, records[point.run], kind)
    ]


def _parts(point: Point, record: Record, kind: Kind) -> list[Measured]:
    lines = [step for step in record.steps if step["noise"] and step["noise"][kind] and step["loss"] is not None]
    lines = [step for step in lines if None not in (step["noise"][kind]["g2"], step["noise"][kind]["trace"])]
    parts = min(PARTS, len(lines))
    edges = [len(lines) * i // parts for i in range(parts + 1)] if parts else []
    found = []
    for low, high in pairwise(edges):
        part = lines[low:high]
        estimates = [NoiseEstimate(s["noise"][kind]["g2"], s["noise"][kind]["trace"], None) for s in part]
        loss = math.fsum(step["loss"] for step in part) / len(part)
        found.append(Measured(point, kind, loss, average(estimates), float(part[-1]["batch_tokens"])))
    return found


def batch_laws(found: Sequence[Measured]) -> list[BatchLaw]:
    """A power law of B_simple (all parameters) over loss for each family with enough distinct losses."""
    laws = []
    for family in dict.fromkeys(m.point.family for m in found):
        log_l, log_b = _logs(found, family)
        if len(np.unique(log_l)) <= FEWEST:  # one more than distinct losses wanted, to have residuals
            continue
        design = np.column_stack([np.ones_like(log_l), -log_l])
        values, errors, factor = regression(design, log_b)
        reach = factor * errors[1]
        ends = (float(np.exp(log_l.min())), float(np.exp(log_l.max())))
        power, scale = float(values[1]), math.exp(min(float(values[0]), 600.0))
        laws.append(BatchLaw(family, len(log_l), power, power - reach, power + reach, scale, ends))
    return laws


def noise_ratios(found: Sequence[Measured]) -> list[NoiseRatio]:
    """Each family against the dense one: parallel lines in (ln L, ln B) where both were measured."""
    dense = _logs(found, DENSE)
    ratios: list[NoiseRatio] = []
    for family in dict.fromkeys(m.point.family for m in found if m.point.family != DENSE):
        apart = distance(*dense, *_logs(found, family))
        if apart is not None:
            low, high = apart.value - apart.reach, apart.value + apart.reach
            span = (math.exp(apart.span[0]), math.exp(apart.span[1]))
            ratios.append(NoiseRatio(family, math.exp(apart.value), math.exp(low), math.exp(high), apart.n, span))
    return ratios


def _logs(found: Sequence[Measured], family: str) -> tuple[Array, Array]:
    """ln loss and ln B_simple of a family's parts, where both gradient and noise came out positive."""
    known = [
        (m.loss, m.average.b_simple)
        for m in found
        if m.point.family == family and m.kind == "all" and m.average.b_simple is not None
    ]
    log_l, log_b = np.log(np.array(known).reshape(-1, 2)).T
    return log_l, log_b
