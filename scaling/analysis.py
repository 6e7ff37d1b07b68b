"""Everything that a study's points and records say, computed once for the report and for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import isoflop, seeds, settings
from .downstream import Answered, Gap, answered, gaps_at_loss
from .effects import Line, lines_along
from .exponents import Growth, growths
from .fitted import Fit
from .gradient_noise import BatchLaw, Measured, NoiseRatio, batch_laws, measurements, noise_ratios
from .outcomes import Outcome
from .points import Point
from .rates import RateCheck, rate_checks
from .record import Record
from .saving import Saving, savings
from .surface import Surface, surfaces


@dataclass(frozen=True)
class Analysis:
    """What was computed from a study.

    Attributes:
        fits: name -> law fitted to points.
        powers: family -> power law of its best losses.
        noise: None where no cell has several seeds.
        pairings: families against dense at equal seeds.
        rates: checks of the learning rate.
        answered: how runs answered downstream tasks.
        score_gaps: families against dense in these, at equal loss.
        outcomes: registered predictions beside what was measured.
        growths: how optimal size and tokens grow with compute.
        surfaces: loss over size and sparsity, by budget and granularity.
        grids: batch and learning rate, with their power laws and families against dense.
    """

    points: Sequence[Point]
    records: Mapping[str, Record]
    fits: Mapping[str, Fit]
    profiles: list[isoflop.Profile]
    powers: dict[str, Fit]
    noise: seeds.SeedNoise | None
    comparisons: list[isoflop.Comparison]
    pairings: list[seeds.Pairing]
    savings: list[Saving]
    sparsity: list[Line]
    granularity: list[Line]
    rates: list[RateCheck]
    gradient_noise: list[Measured]
    batch_laws: list[BatchLaw]
    noise_ratios: list[NoiseRatio]
    answered: list[Answered]
    score_gaps: list[Gap]
    outcomes: Sequence[Outcome]
    growths: list[Growth]
    surfaces: list[Surface]
    grids: list[settings.Grid]
    setting_laws: list[settings.Law]
    setting_ratios: list[settings.Ratio]

    @property
    def tests(self) -> int:
        """Differences that are held against their intervals."""
        steps = sum(len(line.steps) for line in (*self.sparsity, *self.granularity))
        settings = sum(ratio.resolved is not None for ratio in self.setting_ratios)
        counted = (self.comparisons, self.pairings, self.rates, self.score_gaps)
        return sum(len(tests) for tests in counted) + steps + settings


def analyse(
    points: Sequence[Point],
    records: Mapping[str, Record],
    fits: Mapping[str, Fit],
    outcomes: Sequence[Outcome] = (),
) -> Analysis:
    """Analyse a study.

    Args:
        points: every run, failed ones too.
        records: run -> its record; may lack some.
        fits: name -> law fitted to the points.
        outcomes: registered predictions beside what was measured.
    """
    noise = seeds.seed_noise(points)
    profiles = isoflop.profiles(points, noise)
    powers = isoflop.best_loss_fits(profiles, noise)
    measured = measurements(points, records)
    asked = answered(points, records)
    grids = settings.grids(points, noise)
    return Analysis(
        points=points,
        records=records,
        fits=fits,
        profiles=profiles,
        powers=powers,
        noise=noise,
        comparisons=isoflop.compare(profiles, powers, noise),
        pairings=seeds.pairings(points),
        savings=savings(points, fits, noise),
        sparsity=lines_along("s", points, noise),
        granularity=lines_along("g", points, noise),
        rates=rate_checks(points, noise),
        gradient_noise=measured,
        batch_laws=batch_laws(measured),
        noise_ratios=noise_ratios(measured),
        answered=asked,
        score_gaps=gaps_at_loss(asked),
        outcomes=outcomes,
        growths=growths(profiles, fits, noise),
        surfaces=surfaces(points, noise),
        grids=grids,
        setting_laws=settings.laws(grids, noise),
        setting_ratios=settings.ratios(grids, noise),
    )
