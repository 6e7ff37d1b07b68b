"""Tables of optima: sizes at each budget, their growth with compute, models for a budget, sparsity and granularity."""

from collections.abc import Sequence

from . import formats
from .analysis import Analysis
from .effects import Axis, optimum
from .fitted import Estimate
from .frontier import Best, frontier
from .minima import Minimum
from .page import Block, Heading, Points, Table, Text

FURTHER = 10.0  # times the largest budget: the one extrapolation that the report shows


def between(found: Minimum, text: str = "{}") -> str:
    """The interval of an optimum in words: ``50k to 77k``, ``below 50k``, or why there is none."""
    if not found.interior:
        return found.remark
    if not len(found.draws):
        return "seed noise not measured"
    low = None if found.low is None else text.format(formats.significant_count(found.low))
    high = None if found.high is None else text.format(formats.significant_count(found.high))
    if low is None and high is None:
        return "not bounded by what was measured"
    return f"below {high}" if low is None else f"above {low}" if high is None else f"{low} to {high}"


def size_blocks(study: Analysis) -> list[Block]:
    """Optimal sizes: parabola with interval, and interpolation beside it."""
    rows = [
        (profile.family, formats.flops(profile.budget), formats.significant_count(profile.n_best),
         between(profile.minimum), formats.significant_count(profile.minimum.akima),
         formats.significant_count(profile.d_best))
        for profile in study.profiles
        if len(profile.sizes) > 1
    ]  # fmt: skip
    if not rows:
        return []
    columns = ("family", "budget (FLOPs)", "best active size (parabola)", "95 %", "by interpolation", "tokens there")
    return [
        Text(
            "Optimal sizes. Intervals hold seed noise and the parabola's residuals; the interpolation (Akima's) needs "
            "four sizes. Where it differs from the parabola by more than the interval, the valley is no parabola here."
        ),
        Table(columns, rows),
    ]


def growth_blocks(study: Analysis) -> list[Block]:
    """Exponents of n_opt and d_opt."""
    told = [growth for growth in study.growths if growth.budgets > 2 or growth.by_law is not None]
    if not told:
        return []
    rows = []
    for growth in told:
        line = growth.line
        minima = (
            formats.estimate(line.power) if line else f"not determined: {growth.optima} of {growth.budgets} interior"
        )
        by_law = formats.estimate(growth.by_law) if growth.by_law else formats.NONE
        notes = [f"{line.n} minima, {line.told}"] if line else []
        notes += ["too narrow: a minimum may lie beyond the sizes measured"] if growth.open and line else []
        rows.append((growth.family, f"{growth.what} over C", minima, by_law, "; ".join(notes)))
    columns = ("family", "exponent of the optimal", "from isoFLOP minima (95 %)", "from the law of n and d (95 %)",
               "remarks")  # fmt: skip
    return [
        Text(
            "n: active non-embedding parameters; d: tokens; C: FLOPs by the exact count for the minima, 6 n d for the "
            "law, so that the two columns answer slightly different questions."
        ),
        Table(columns, rows),
    ]


def frontier_blocks(study: Analysis) -> list[Block]:
    """The frontier at the budgets measured and at ten times the largest."""
    budgets = sorted({profile.budget for profile in study.profiles})
    if not budgets:
        return []
    rows, missing = frontier(study, [*budgets, FURTHER * budgets[-1]])
    if not rows:
        return []
    return [Table(FRONTIER_COLUMNS, frontier_rows(rows)), *([Points(missing)] if missing else [])]


FRONTIER_COLUMNS = ("compute (FLOPs)", "family", "active parameters (95 %)", "total", "tokens", "E", "K", "G", "S",
                    "batch (tokens)", "lr", "loss (95 %)", "hours here", "remarks")  # fmt: skip


def frontier_rows(rows: Sequence[Best]) -> list[tuple[str, ...]]:
    """A frontier as text."""
    return [
        (formats.flops(row.compute), row.family, _counted(row.n_active), formats.significant_count(row.n_total),
         formats.significant_count(row.d), formats.significant(row.e), formats.significant(row.k),
         formats.significant(row.g), formats.significant(row.s), formats.significant_count(row.b),
         formats.significant(row.lr, 2), formats.estimate(row.loss) if row.loss else formats.NONE,
         formats.significant(row.hours, 2), "; ".join([f"size by {row.by}", *row.remarks]))
        for row in rows
    ]  # fmt: skip


def _counted(value: Estimate) -> str:
    text = formats.significant_count(value.value)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({formats.significant_count(value.low)} to {formats.significant_count(value.high)})"


def axis_blocks(axis: Axis, study: Analysis) -> list[Block]:
    """The best sparsity or granularity along each line of three levels or more."""
    rows = []
    for line in study.sparsity if axis == "s" else study.granularity:
        best = optimum(line, study.noise)
        if best is None:
            continue
        rows.append(
            (formats.flops(line.budget), formats.count(line.shape.active), line.name,
             _level(axis, best.at) if best.interior else "at the edge: not determined", _levels(axis, best),
             formats.NONE if best.akima is None else _level(axis, best.akima))
        )  # fmt: skip
    if not rows:
        return []
    name = "sparsity at fixed active size and compute" if axis == "s" else "granularity at fixed size and compute"
    columns = ("budget (FLOPs)", "active parameters, no router", "at", f"best {'S' if axis == 's' else 'G'}", "95 %",
               "by interpolation")  # fmt: skip
    return [Heading(f"Optimal {name}"), Table(columns, rows)]


def _level(axis: Axis, x: float) -> str:
    """x is G, or 1 / (1 - S)."""
    return formats.significant(x if axis == "g" else 1 - 1 / x, 2)


def _levels(axis: Axis, best: Minimum) -> str:
    if not best.interior or not len(best.draws):
        return between(best)
    low = None if best.low is None else _level(axis, best.low)
    high = None if best.high is None else _level(axis, best.high)
    if low is None and high is None:
        return "not bounded by what was measured"
    return f"below {high}" if low is None else f"above {low}" if high is None else f"{low} to {high}"
