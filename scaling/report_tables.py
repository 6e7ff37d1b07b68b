"""The tables of a report that stand beside no plot, and the sentences that lead them."""

from collections.abc import Sequence

from . import formats
from .analysis import Analysis
from .findings import verdict
from .page import Block, Heading, Points, Table, Terms, Text
from .plots import remarks
from .points import Point
from .seeds import SeedNoise

CONVENTIONS = {
    "N": "non-embedding parameters; total and active (those that one token uses) are both listed, plots use active",
    "D": "training tokens seen",
    "C": "training FLOPs, exact: all matrix products of forward and backward pass, attention scores, router and head",
    "G": "granularity, 4 x model width / expert width (half of it in some papers)",
    "S": "sparsity, 1 - K / E over routed experts; shared experts not counted",
    "loss": "nats a token on held-out documents of the training domains, after the last step",
    "budget": "runs whose C lie within 10 % share one",
    "best loss": "minimum of a parabola through the losses over log N, or the smallest loss where the best size is at "
    "an edge",
    "compute multiple": "C' / C, where C' is the compute at which the power law of the best dense losses reaches the "
    "loss that the other family reaches at C; its interval holds the uncertainty of that power law and, where "
    "measured, the seed noise of the other family's loss",
    "data saved": "1 - D / D_dense, where D_dense is the number of tokens after which a dense model with as many "
    "active parameters reaches the loss that the other family reaches after D",
    "shape": "parameters that every token uses, routers aside, and embeddings",
    "resolved": "a difference larger than half its 95 % interval: Student's t times the standard error from the seed "
    "deviations of the two families and their numbers of seeds (Welch); with three or more seeds in both, of the "
    "differences at equal seeds",
}


def decimals_of(noise: SeedNoise | None) -> int:
    """Decimals of a loss that the least noisy family supports."""
    return formats.decimals(min(s.sd for s in noise.families.values()) if noise else None)


def best_models(study: Analysis) -> list[Block]:
    """Each family at each budget: best loss, size, tokens, gap and compute multiple."""
    by_cell = {(c.family, c.budget): c for c in study.comparisons}
    rows: list[tuple[str, ...]] = []
    for profile in sorted(study.profiles, key=lambda p: p.budget):
        comparison = by_cell.get((profile.family, profile.budget))
        notes = [profile.remark] if profile.remark else []
        gap, multiple = "", ""
        if comparison is not None:
            gap = formats.with_error(comparison.gap.value, comparison.gap.reach)
            if comparison.multiple is not None:
                ends = formats.interval(comparison.low, comparison.high)
                multiple = formats.significant(comparison.multiple, 2) + (f" ({ends})" if ends else "")
            notes += [text for text in remarks(comparison) if text != "an optimum at an edge"]
        spread = study.noise.of(profile.family)[1].sd if study.noise else None
        rows.append(
            (formats.flops(profile.budget), profile.family, formats.fixed(profile.loss_best, formats.decimals(spread)),
             formats.significant_count(profile.n_best), formats.significant_count(profile.d_best), gap, multiple,
             "; ".join(notes))
        )  # fmt: skip
    columns = ("compute (FLOPs)", "family", "best loss (nats/token)", "active parameters", "tokens",
               "below dense by (nats/token, 95 %)", "compute multiple (95 %)", "remarks")  # fmt: skip
    return [Table(columns, rows)] if rows else []


def seed_blocks(study: Analysis) -> list[Block]:
    """Deviations by family, the cells they come from, and families at equal seeds."""
    noise = study.noise
    if noise is None:
        return []
    families = [(family, f"{s.sd:.{formats.decimals(s.sd)}f}", str(s.freedom)) for family, s in noise.families.items()]
    pooled = f"{noise.pooled.sd:.{formats.decimals(noise.pooled.sd)}f}"
    families += [("all, pooled", pooled, str(noise.pooled.freedom))] if len(noise.families) > 1 else []
    cells = [
        (cell.family, formats.flops(cell.budget), formats.count(cell.runs[0].n_active),
         ", ".join(f"{loss:.4f}" for loss in cell.losses), f"{max(cell.losses) - min(cell.losses):.4f}")
        for cell in noise.cells
    ]  # fmt: skip
    blocks: list[Block] = [
        Table(("family", "standard deviation of the final loss (nats/token)", "degrees of freedom"), families),
        Table(("family", "budget (FLOPs)", "active parameters", "final losses (nats/token)", "range"), cells),
    ]
    if study.pairings:
        pairs = [
            (p.family, formats.flops(p.budget), formats.count(p.active),
             ", ".join(f"{apart:+.3f}" for apart in p.apart.values()),
             formats.with_error(p.difference.value, p.difference.reach), verdict(p.difference))
            for p in study.pairings
        ]  # fmt: skip
        blocks += [
            Heading("At equal seeds"),
            Text(
                "Runs of one seed see the same data in the same order, so what a seed does to both families cancels "
                "in their difference. Dense minus the family, nats/token:"
            ),
            Table(
                ("family", "budget (FLOPs)", "active parameters, no router", "by seed", "mean (95 %)", "verdict"), pairs
            ),
        ]
    return blocks


def batch_blocks(study: Analysis) -> list[Block]:
    """Whether B_simple follows the loss, and whether families differ in it at equal loss."""
    sentences = []
    fitted = {law.family for law in study.batch_laws}
    for law in study.batch_laws:
        losses = f"losses {law.loss_range[1]:.2f} to {law.loss_range[0]:.2f}, {law.n} values"
        power = f"{formats.significant(law.power, 2)} (95 %: {formats.interval(law.low, law.high)})"
        if law.resolved:
            sentences.append(
                f"{law.family}: B_simple = B* / L^(1/a_B) with 1/a_B = {power}, "
                f"B* = {formats.significant(law.scale, 2)} tokens ({losses})."
            )
        else:
            sentences.append(
                f"{law.family}: the change of B_simple with loss is not resolved, 1/a_B = {power} ({losses}): a "
                "critical batch as a function of loss is not determined."
            )
    few = [f for f in dict.fromkeys(m.point.family for m in study.gradient_noise) if f not in fitted]
    if few:
        sentences.append(
            f"{formats.listed(few)}: too few losses with a usable measurement; a critical batch as a function of loss "
            "is not determined."
        )
    for ratio in study.noise_ratios:
        ends = formats.interval(ratio.low, ratio.high)
        sentences.append(
            f"{ratio.family} over dense at equal loss (parallel lines of ln B over ln L, {ratio.n} values, losses "
            f"{ratio.loss_range[1]:.2f} to {ratio.loss_range[0]:.2f}): {formats.significant(ratio.ratio, 2)} "
            f"(95 %: {ends}), {'resolved' if ratio.resolved else 'not resolved'}."
        )
    runs = {m.point.run for m in study.gradient_noise}
    sentences.append(
        f"From {formats.plural(len(runs), 'run')}; values of one run share its data and initialisation, which these "
        "intervals do not contain. B_simple is a proxy of the critical batch: no batch was varied to find it."
    )
    return [Points(sentences)]


def run_table(points: Sequence[Point], digits: int) -> Table:
    """Every run, failed ones with their reason."""
    columns: tuple[str, ...] = (
        "run", "family", "state", "why", "N total", "N active", "D (tokens)", "C (FLOPs)", "batch (tokens)", "peak lr",
        "seed", "loss (nats/token)", "train loss (nats/token)", "bits/byte", "tokens/s",
    )  # fmt: skip
    rows = [_run_row(point, digits) for point in points]
    for title, values in (
        ("uses future tokens", [point.future for point in points]),
        ("only checks", [point.check for point in points]),
    ):
        if any(values):
            columns = (*columns[:4], title, *columns[4:])
            rows = [(*row[:4], value, *row[4:]) for row, value in zip(rows, values, strict=True)]
    return Table(columns, rows)


def _run_row(point: Point, digits: int) -> tuple[str, ...]:
    return (
        point.run, point.family, point.state, point.why, formats.count(point.n_total), formats.count(point.n_active),
        formats.count(point.d), formats.flops(point.c), formats.count(point.b), formats.significant(point.lr),
        formats.NONE if point.seed is None else str(point.seed), formats.fixed(point.loss, digits),
        formats.fixed(point.train_loss, digits), formats.fixed(point.bits_per_byte, digits),
        formats.count(point.tokens_per_second),
    )  # fmt: skip


def conventions(study: Analysis) -> list[Block]:
    """What symbols mean, and what the runs themselves recorded; a convention that differs is shown with every value."""
    values: dict[str, list[str]] = {}
    for record in study.records.values():
        for header in record.headers[-1:]:
            for name, text in header["conventions"].items():
                if text not in values.setdefault(name, []):
                    values[name].append(text)
    blocks: list[Block] = [Terms(CONVENTIONS)]
    if values:
        recorded = {name: " / ".join(texts) for name, texts in values.items()}
        blocks += [Heading("As the runs recorded them"), Terms(recorded)]
    return blocks
