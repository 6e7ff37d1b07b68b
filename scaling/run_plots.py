"""Plots of what happens inside runs: noise scale, router load, bits per byte."""

from collections.abc import Mapping, Sequence

import numpy as np

from . import formats
from .figures import Plot, as_image, colours, label, legend, log_x, panels
from .isoflop import budgets_of, finished
from .noise import NoiseEstimate, average
from .plots import NATS, TABLED, column, families_of, thin
from .points import Point
from .record import Line, Record

NOISE_PARTS = 6  # of a run's measurements, each averaged to one point


def noise_scale(points: Sequence[Point], records: Mapping[str, Record]) -> Plot | None:
    """B_simple against training loss: the batch at which gradient noise equals the signal."""
    palette = colours(families_of(points))
    figure, (axis,) = panels(1)
    rows = []
    labelled: set[str] = set()
    for point in points:
        measured = [step for step in records.get(point.run, Record()).steps if _has_noise(step)]
        for part in np.array_split(np.array(measured, dtype=object), NOISE_PARTS):
            if not len(part):
                continue
            found = average([NoiseEstimate(s["noise"]["all"]["g2"], s["noise"]["all"]["trace"], None) for s in part])
            loss = float(np.mean([step["loss"] for step in part]))
            rows.append(
                (point.run, point.family, formats.fixed(loss), formats.count(found.b_simple),
                 formats.interval(found.low, found.high), str(found.n))
            )  # fmt: skip
            if found.b_simple is None:
                continue
            colour = palette[point.family]
            name = None if point.family in labelled else point.family
            labelled.add(point.family)
            axis.plot(loss, found.b_simple, "o", markersize=4, alpha=0.7, color=colour, label=name)
            if found.low is not None:
                axis.plot([loss] * 2, [found.low, found.high], color=colour, linewidth=0.8, alpha=0.5)
    if not labelled:
        return None
    axis.set_yscale("log")
    axis.invert_xaxis()
    label(axis, f"training {NATS}", "B_simple (tokens)")
    legend(axis)
    caption = (
        "Gradient noise scale tr(Sigma) / |G|^2 of all parameters against training loss (training runs from left to "
        "right). Each point averages numerator and denominator over a sixth of a run's measurements; bars: 95 %, "
        "measurements taken as independent."
    )
    columns = ("run", "family", "loss", "B_simple (tokens)", "95 %", "measurements")
    return Plot("noise", "Gradient noise scale", as_image(figure), caption, columns, rows)


def _has_noise(step: Line) -> bool:
    noise = step["noise"]
    return noise is not None and None not in (noise["all"]["g2"], noise["all"]["trace"], step["loss"])


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
    log_x(axis, counts=True)
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
    """Final bits per byte of each domain: for each family its best run at the largest budget that all families share."""
    done = finished(points)
    values = {
        p.run: {e["domain"]: e["bits_per_byte"] for e in records[p.run].evals
                if e["step"] == records[p.run].last_step and e["bits_per_byte"] is not None}
        for p in done if p.run in records
    }  # fmt: skip
    domains = sorted({domain for found in values.values() for domain in found})
    if not domains:
        return None
    budgets = budgets_of(done)
    families = families_of(done)
    shared = set.intersection(*({budgets[p.run] for p in done if p.family == f and p.run in values} for f in families))
    budget = max(shared) if shared else None
    palette = colours(families_of(points))
    figure, (axis,) = panels(1, height=1.4 + 0.35 * len(domains))
    for family in families:
        own = [p for p in done if p.family == family and p.run in values and budget in (None, budgets[p.run])]
        if own:
            best = values[min(own, key=lambda p: p.loss or 0.0).run]
            places = [i for i, domain in enumerate(domains) if domain in best]
            axis.plot([best[domains[i]] for i in places], places, "o", color=palette[family], label=family)
    axis.set_yticks(range(len(domains)), domains)
    axis.set_ylim(-0.6, len(domains) - 0.4)
    label(axis, "bits per byte", "")
    legend(axis)
    at = (
        f"at {formats.flops(budget)} FLOPs" if budget else "(the families share no budget, so these are not comparable)"
    )
    caption = (
        f"Held-out text by domain: the best run of each family {at}. Bits per byte do not depend on the tokenizer."
    )
    rows = [
        (p.run, p.family, formats.flops(budgets[p.run]), domain, formats.fixed(value))
        for p in done
        for domain, value in values.get(p.run, {}).items()
    ]
    return Plot("domains", "Bits per byte by domain", as_image(figure), caption,
                ("run", "family", "budget (FLOPs)", "domain", "bits per byte"), rows)  # fmt: skip
