"""Sentences about registered predictions, the growth of optima, and best settings of mixtures against dense models."""

from collections.abc import Sequence

from . import formats
from .exponents import Growth
from .outcomes import Outcome
from .settings import Ratio

NAMES = {"lr": "learning rate", "b": "batch"}


def predicted(found: Sequence[Outcome]) -> list[str]:
    """How well laws predicted runs that they had not seen; entries that are no test are told apart."""
    said = []
    for fit in dict.fromkeys(one.fit for one in found):
        tests = [one for one in found if one.fit == fit and one.counts]
        if not tests:
            continue
        inside = sum(bool(one.inside) for one in tests)
        errors = [one.share for one in tests if one.share is not None]
        spread = f"{min(errors):+.1%} to {max(errors):+.1%}" if len(errors) > 1 else f"{errors[0]:+.1%}"
        said.append(
            f"Predicted before they began by {fit}: {formats.plural(len(tests), 'run')}, {inside} inside "
            f"{'its' if len(tests) == 1 else 'their'} 95 % interval{'' if len(tests) == 1 else 's'}; measured minus "
            f"predicted: {spread}."
        )
    open_ones = sum(one.measured is None for one in found)
    if open_ones:
        said.append(f"{formats.plural(open_ones, 'registered prediction')} not yet measured.")
    return said


def register_warnings(found: Sequence[Outcome]) -> list[str]:
    """Entries of the register that do not hold."""
    return [f"Register of predictions, {one.run} by {one.fit}: {fault}." for one in found for fault in one.faults]


def grown(found: Sequence[Growth]) -> list[str]:
    """The exponents that three interior minima or more determine."""
    names = {"n": "active size", "d": "number of tokens"}
    return [
        f"The optimal {names[one.what]} of {one.family} grows as C to the power {formats.estimate(one.line.power)} "
        f"({one.line.n} interior minima)."
        for one in found
        if one.line is not None
    ]


def setting_ratio(ratio: Ratio) -> str:
    """Whether a family's best batch or rate differs from the dense one's."""
    where = "" if ratio.where is None else f" at a batch of {formats.count(ratio.where)} tokens"
    text = (
        f"Best {NAMES[ratio.what]} of {ratio.family} over that of dense, {formats.flops(ratio.budget)} FLOPs{where}: "
    )
    if ratio.resolved is None:
        return f"{text}not determined ({ratio.open})."
    answer = "unresolved" if not ratio.resolved or ratio.open else "larger" if ratio.value > 1 else "smaller"
    ends = formats.interval(ratio.low, ratio.high)
    caution = f" ({ratio.open})" if ratio.open else ""
    return f"{text}{formats.significant(ratio.value, 2)} (95 %: {ends}): {answer}{caution}."
