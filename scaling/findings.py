"""What a study found, in sentences that claim no more than its runs support."""

from collections import Counter
from collections.abc import Mapping, Sequence

from . import formats
from .fitted import Fit
from .isoflop import UNRESOLVED, Comparison, Profile, SeedNoise
from .points import Point


def in_words(
    points: Sequence[Point],
    found: Sequence[Profile],
    fits: Mapping[str, Fit],
    compared: Sequence[Comparison],
    noise: SeedNoise | None,
) -> list[str]:
    """The findings, most important first."""
    return [
        *_compared(compared),
        *_falling(found, fits),
        *_optima(found),
        _seeds(noise),
        *_unfinished(points),
    ]


def _compared(compared: Sequence[Comparison]) -> list[str]:
    """For each family one sentence, at the largest budget it shares with the dense one."""
    sentences = []
    for family in dict.fromkeys(c.family for c in compared):
        last = max((c for c in compared if c.family == family), key=lambda c: c.budget)
        direction = "lower" if last.gap > 0 else "higher"
        text = (
            f"At {formats.flops(last.budget)} FLOPs the best {family} model's loss is {abs(last.gap):.3f} nats/token "
            f"{direction} than the best dense one's"
        )
        if last.multiple is not None:
            ends = formats.interval(last.low, last.high)
            text += f", worth {last.multiple:.2f} times the compute" + (f" (95 %: {ends})" if ends else "")
            text += ", an extrapolation of the dense power law" if last.extrapolated else ""
        if last.resolved is False:
            text += f". This is within {UNRESOLVED:g} standard deviations of the seed noise: unresolved"
        elif last.resolved is None:
            text += ". Seed noise was not measured, so this may be chance"
        if last.edge:
            text += ". An optimum lies at the edge of the sizes measured: the gap may change with more sizes"
        sentences.append(text + ".")
    return sentences


def _falling(found: Sequence[Profile], fits: Mapping[str, Fit]) -> list[str]:
    sentences = []
    for family in dict.fromkeys(p.family for p in found):
        own = [p for p in found if p.family == family]
        if len(own) < 2:
            continue
        falls = all(after.loss_best < before.loss_best for before, after in zip(own, own[1:], strict=False))
        text = f"The best {family} loss {'falls' if falls else 'does not fall'} with every step in compute"
        if family in fits:
            text += f", as C^-b with b = {formats.estimate(fits[family].coefficients['b'])}"
            text += f" (residual {fits[family].rmse_log:.1%})"
        sentences.append(text + ".")
    return sentences


def _optima(found: Sequence[Profile]) -> list[str]:
    counted = [
        f"{family} {sum(p.interior for p in found if p.family == family)} of {sum(p.family == family for p in found)}"
        for family in dict.fromkeys(p.family for p in found)
    ]
    if not counted:
        return []
    flagged = "" if all(p.interior for p in found) else "; the others are flagged as edges"
    return [f"Optimal sizes bracketed by measured ones: {', '.join(counted)} budgets{flagged}."]


def _seeds(noise: SeedNoise | None) -> str:
    if noise is None:
        return "No cell was run with several seeds, so no difference between two runs can be told from chance."
    threshold = UNRESOLVED * 2**0.5 * noise.sd
    return (
        f"The standard deviation of the final loss over seeds is {noise.sd:.4f} nats/token ({noise.freedom} degrees of "
        f"freedom): differences between two runs below {threshold:.3f} are called unresolved."
    )


def _unfinished(points: Sequence[Point]) -> list[str]:
    states = Counter(point.state for point in points if point.state != "done")
    if not states:
        return [f"All {len(points)} runs finished."]
    counted = formats.listed([f"{number} {state}" for state, number in sorted(states.items())])
    finished = len(points) - states.total()
    return [f"{finished} of {len(points)} runs finished; the others ({counted}) are left out of all comparisons."]
