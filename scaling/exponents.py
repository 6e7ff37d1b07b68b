"""How the optimal size and the optimal number of tokens grow with compute, by family.

Two roads to the same exponents (Hoffmann et al. 2022, approaches 2 and 3): a power law through the interior minima of
the isoFLOP profiles, and the closed form of a fitted ``L = E + A / n^alpha + B / d^beta``, whose n_opt grows as
C^(beta / (alpha + beta)) under that law's convention C = 6 n d. They differ where attention, router and head are a
large part of C, which the exact count holds and 6 n d does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .fitted import Estimate, Fit
from .isoflop import Profile
from .laws import CHINCHILLA
from .lines import PowerLine, power_line
from .seeds import SeedNoise


@dataclass(frozen=True)
class Growth:
    """The power law of one family's optima over compute.

    Attributes:
        what: ``n`` (active parameters) or ``d`` (tokens).
        line: through the interior minima; None with fewer than three.
        optima, budgets: interior minima, and budgets measured.
        by_law: the same exponent from the fitted law of n and d; None without one.
        open: whether the interval of a minimum goes on beyond the sizes measured: ``line``'s is then too narrow.
    """

    family: str
    what: Literal["n", "d"]
    line: PowerLine | None
    optima: int
    budgets: int
    by_law: Estimate | None
    open: bool


def growths(profiles: Sequence[Profile], fits: Mapping[str, Fit], noise: SeedNoise | None) -> list[Growth]:
    """Exponents of n_opt and d_opt for every family."""
    found = []
    for family in dict.fromkeys(profile.family for profile in profiles):
        own = [profile for profile in profiles if profile.family == family]
        inside = [profile for profile in own if profile.interior]
        freedom = noise.of(family)[1].freedom if noise else 0
        by_law = _by_law(fits.get(f"{CHINCHILLA.name}-{family}"))
        budgets = [profile.budget for profile in inside]
        wide = any(profile.minimum.open_low or profile.minimum.open_high for profile in inside)
        errors = [_errors(profile) for profile in inside]
        known = all(error is not None for error in errors)
        lines = (
            ("n", [profile.n_best for profile in inside], [error[0] for error in errors if error]),
            ("d", [profile.d_best for profile in inside], [error[1] for error in errors if error]),
        )
        for place, (what, values, deviations) in enumerate(lines):
            line = power_line(budgets, values, deviations if known and deviations else None, freedom)
            law = by_law[place] if by_law else None
            found.append(Growth(family, "n" if what == "n" else "d", line, len(inside), len(own), law, wide))
    return found


def _errors(profile: Profile) -> tuple[float, float] | None:
    """Standard deviations of ln n_opt and ln d_opt from seed noise; None where that was not measured."""
    draws = profile.minimum.draws
    if not len(draws):
        return None
    log_n, log_d = np.log([(size.n, size.d) for size in profile.sizes]).T
    return float(draws.std(ddof=1)), float(np.interp(draws, log_n, log_d).std(ddof=1))


def _by_law(fit: Fit | None) -> tuple[Estimate, Estimate] | None:
    """Exponents of n_opt and d_opt; None without a fit, or where an exponent is 0."""
    if fit is None or min(fit.values["alpha"], fit.values["beta"]) <= 0:
        return None

    def of_n(values: Mapping[str, float]) -> float:
        total = values["alpha"] + values["beta"]
        return values["beta"] / total if total > 0 else float("nan")

    value = of_n(fit.values)
    ends = fit.interval(of_n)
    if ends is None or not np.isfinite(ends).all():
        return Estimate(value, None, None), Estimate(1 - value, None, None)
    return Estimate(value, *ends), Estimate(1 - value, 1 - ends[1], 1 - ends[0])
