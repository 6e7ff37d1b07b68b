"""Plots of what happens inside runs: noise scale, router load, bits per byte."""

from collections.abc import Mapping, Sequence

import numpy as np

from . import formats
from .figures import Plot, as_image, colours, label, legend, log_x, log_y, panels
from .isoflop import budgets_of, finished
from .noise import NoiseAverage, NoiseEstimate, average
from .plots import NATS, TABLED, column, families_of, thin
from .points import Point
from .record import Record

NOISE_PARTS = 6  # of a run's measurements, each averaged to one point


def noise_scale(points: Sequence[Point], records: Mapping[str, Record]) -> Plot | None:
    """B_simple against training loss: the batch at which gradient noise equals the signal."""
    found = [(point, *part) for point in points if point.run in records for part in _noise_of(records[point.run])]
    shown = [(point, loss, noise) for point, loss, noise in found if noise.b_simple is not None]
    if not shown:
        return None
    figure, (axis,) = panels(1)
    for family, colour in colours(families_of(points)).items():
        own = [(loss, noise) for point, loss, noise in shown if point.family == family]
        if own:
            axis.plot([x for x, _ in own], [a.b_simple or 0.0 for _, a in own], "o", color=colour, markersize=4,
                      alpha=0.7, label=family)  # fmt: skip
            bars = [(x, a.low, a.high) for x, a in own if a.low is not None and a.high is not None]
            axis.vlines(*np.reshape(bars, (-1, 3)).T, color=colour, linewidth=0.8, alpha=0.4)
    log_y(axis)
    axis.invert_xaxis()
    label(axis, f"training {NATS}", "B_simple (tokens)")
    legend(axis)
    caption = (
        "Gradient noise scale tr(Sigma) / |G|^2 of all parameters against training loss (training runs from left to "
        "right). Each point averages numerator and denominator over a sixth of a run's measurements; bars: 95 %, "
        "measurements taken as independent."
    )
    columns = ("run", "family", "loss", "B_simple (tokens)", "95 %", "measurements")
    rows = [
        (p.run, p.family, formats.fixed(x), formats.count(a.b_simple), formats.interval(a.low, a.high), str(a.n))
        for p, x, a in found
    ]
    return Plot("noise", "Gradient noise scale", as_image(figure), caption, columns, rows)


def _noise_of(record: Record) -> list[tuple[float, NoiseAverage]]:
    """Mean loss and averaged noise over equal parts of a run's measurements."""
    measured = [
        (step["loss"], NoiseEstimate(step["noise"]["all"]["g2"], step["noise"]["all"]["trace"], None))
        for step in record.steps
        if step["noise"] and None not in (step["loss"], step["noise"]["all"]["g2"], step["noise"]["all"]["trace"])
    ]
    edges = np.linspace(0, len(measured), min(NOISE_PARTS, len(measured)) + 1).astype(int)
    parts = [measured[low:high] for low, high in zip(edges, edges[1:], strict=False)]
    return [(float(np.mean([x for x, _ in part])), average([e for _, e in part])) for part in parts if part]


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
    final = [line for line in record.evals if line["step"] == record.last_step]
    return {line["domain"]: line["bits_per_byte"] for line in final if line["bits_per_byte"] is not None}
