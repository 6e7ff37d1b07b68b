"""Plots of what happens inside runs: noise scale, router load, bits per byte."""

from collections.abc import Mapping, Sequence

import numpy as np

from . import formats
from .cells import budgets_of, families_of, finished
from .figures import Plot, as_image, colours, label, legend, log_x, log_y, panels
from .gradient_noise import KINDS, Measured
from .noise import NoiseAverage
from .plots import NATS, TABLED, column, thin
from .points import Point
from .record import Record

KIND_NAMES = {"all": "all parameters", "dense": "parameters that every token uses", "expert": "experts"}


def noise_scale(found: Sequence[Measured]) -> Plot | None:
    """B_simple against training loss, a panel for each set of parameters: where gradient noise equals the signal."""
    shown = [m for m in found if m.average.b_simple is not None]
    if not shown:
        return None
    kinds = [kind for kind in KINDS if any(m.kind == kind for m in shown)]
    figure, axes = panels(len(kinds))
    families = families_of([m.point for m in shown])
    palette = colours(families)
    for axis, kind in zip(axes, kinds, strict=True):
        for family in families:
            own = [m for m in shown if m.kind == kind and m.point.family == family]
            axis.plot([m.loss for m in own], [m.average.b_simple or 0.0 for m in own], "o", color=palette[family],
                      markersize=4, alpha=0.75, label=family if own else None)  # fmt: skip
            bars = [(m.loss, m.average.low, m.average.high) for m in own if m.average.low and m.average.high]
            axis.vlines(*np.reshape(bars, (-1, 3)).T, color=palette[family], linewidth=0.8, alpha=0.4)
        for batch in sorted({m.batch for m in shown}):
            axis.axhline(batch, color="#333333", linewidth=0.8, linestyle="--")
        axis.invert_xaxis()
        label(axis, f"training {NATS}", "B_simple (tokens)" if axis is axes[0] else "", KIND_NAMES[kind])
    sizes = [m.average.b_simple for m in shown if m.average.b_simple] + [m.batch for m in shown]
    for axis in axes:  # intervals may reach far beyond
        axis.set_ylim(min(sizes) / 3, 3 * max(sizes))
        log_y(axis)
    axes[0].plot([], [], "--", color="#333333", linewidth=0.8, label="batch in use")
    legend(axes[0])
    caption = (
        "Gradient noise scale tr(Sigma) / |G|^2 against training loss (training runs from left to right). Each point "
        "averages numerator and denominator over a sixth of a run's measurements; bars: 95 % (cut by the "
        "frame where they go on), measurements taken as independent."
    )
    columns = ("run", "family", "parameters", "loss (nats/token)", "B_simple (tokens)", "95 %", "measurements",
               "batch in use (tokens)")  # fmt: skip
    rows = [
        (m.point.run, m.point.family, m.kind, formats.fixed(m.loss, 2), formats.significant_count(m.average.b_simple),
         _ends(m.average), str(m.average.n), formats.count(m.batch))
        for m in found
    ]  # fmt: skip
    return Plot("noise", "Gradient noise scale", as_image(figure), caption, columns, rows)


def _ends(found: NoiseAverage) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"{formats.significant_count(found.low)} to {formats.significant_count(found.high)}"


def router_load(points: Sequence[Point], records: Mapping[str, Record]) -> Plot | None:
    """Largest relative overload of an expert over training, mean over layers, one line a run."""
    shown = [p for p in points if p.run in records and any(step["router"] for step in records[p.run].steps)]
    if not shown:
        return None
    palette = colours(families_of(points))
    figure, (axis,) = panels(1)
    rows = []
    labelled: set[str] = set()
    for point in shown:
        steps = records[point.run].steps
        tokens = column(steps, "tokens")
        violation = np.array([np.mean(column(step["router"], "max_violation")) for step in steps])
        name = None if point.family in labelled else point.family
        labelled.add(point.family)
        axis.plot(*thin(tokens, violation, 40), color=palette[point.family], linewidth=0.9, alpha=0.7, label=name)
        dead = np.array([np.mean(column(step["router"], "dead")) for step in steps])
        dropped = np.array([np.mean(column(step["router"], "dropped")) for step in steps])
        late = slice(len(steps) // 2, None)
        rows.append(
            (point.run, point.family, *(formats.fixed(y) for y in thin(tokens, violation, TABLED)[1][[0, -1]]),
             formats.fixed(float(violation[late].mean())), formats.fixed(float(dead[late].mean())),
             formats.fixed(float(dropped[late].mean())))
        )  # fmt: skip
    log_x(axis)
    axis.set_ylim(bottom=0)
    label(axis, "training tokens", "largest load / mean load, minus 1")
    legend(axis)
    caption = (
        "How much busier the busiest expert of a layer is than the mean one, averaged over layers and smoothed over "
        "steps; 0 is perfect balance. The table's last columns are means over the second half of the run."
    )
    columns = ("run", "family", "begin", "end", "second half", "dead experts (share)", "dropped (share)")
    return Plot("router", "Router load", as_image(figure), caption, columns, rows)


def bits_per_byte(points: Sequence[Point], records: Mapping[str, Record]) -> Plot | None:
    """Final bits per byte by domain: the best run of each family at the largest budget that all families share."""
    done = [point for point in finished(points) if point.run in records]
    values = {point.run: _final_bits(records[point.run]) for point in done}
    domains = sorted({domain for found in values.values() for domain in found})
    if not domains:
        return None
    budgets = budgets_of(done)
    families = families_of(done)
    shared = set.intersection(*({budgets[p.run] for p in done if p.family == family} for family in families))
    budget = max(shared) if shared else None
    palette = colours(families_of(points))
    figure, (axis,) = panels(1, height=1.4 + 0.35 * len(domains))
    for family in families:
        own = [p for p in done if p.family == family and budget in (None, budgets[p.run])]
        best = values[min(own, key=lambda p: p.loss or 0.0).run]
        places = [place for place, domain in enumerate(domains) if domain in best]
        axis.plot([best[domains[place]] for place in places], places, "o", color=palette[family], label=family)
    axis.set_yticks(range(len(domains)), domains)
    axis.set_ylim(-0.6, len(domains) - 0.4)
    label(axis, "bits per byte", "")
    legend(axis)
    at = f"at {formats.flops(budget)} FLOPs" if budget else "(they share no budget, so these are not comparable)"
    caption = f"Held-out text by domain: the best run of each family {at}. The tokenizer does not matter in this unit."
    rows = [
        (p.run, p.family, formats.flops(budgets[p.run]), domain, formats.fixed(value))
        for p in done
        for domain, value in values[p.run].items()
    ]
    columns = ("run", "family", "budget (FLOPs)", "domain", "bits per byte")
    return Plot("domains", "Bits per byte by domain", as_image(figure), caption, columns, rows)


def _final_bits(record: Record) -> dict[str, float]:
    """Bits per byte by domain after the last step."""
    plain = [line for line in record.final_evals if line.get("task") is None]
    return {line["domain"]: line["bits_per_byte"] for line in plain if line["bits_per_byte"] is not None}
