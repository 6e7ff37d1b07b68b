"""What a study's runs can and cannot show, from facts of that study."""

import math
from collections.abc import Callable

from . import formats
from .analysis import Analysis
from .cells import DENSE, cells_of, families_of, finished
from .points import Point

FEW_DECADES = 2.0  # of compute, below which an offset cannot be told from a smaller exponent


def limits(study: Analysis) -> list[str]:
    """Sentences, none of which holds for every study."""
    done = finished(study.points)
    if not done:
        return ["No run finished: nothing is shown."]
    return [
        _sizes(done),
        *_budgets(study, done),
        *_optima(study),
        *_seeds(study, done),
        *_rates(study, done),
        *_batches(done),
        *_family(done),
        *_data(study),
        *_tests(study),
        *_quality(study),
    ]


def _range(points: list[Point], value: Callable[[Point], float], show: Callable[[float], str]) -> str:
    values = [value(point) for point in points]
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _sizes(done: list[Point]) -> str:
    largest = max(done, key=lambda p: p.n_active or 0.0)
    total = max(p.n_total or p.n_active or 0.0 for p in done)
    ratio = _range(done, lambda p: (p.d or 0.0) / (p.n_active or 1.0), lambda x: f"{x:.2g}")
    return (
        f"The largest model has {formats.count(largest.n_active)} active parameters (most in total: "
        f"{formats.count(total)}); tokens per active parameter: {ratio}. Which sparsity, granularity or family is best "
        "for much larger models or other ratios is not measured here."
    )


def _budgets(study: Analysis, done: list[Point]) -> list[str]:
    budgets = sorted({cell.budget for cell in cells_of(done)})
    if len(budgets) == 1:
        return [f"All runs share one budget, {formats.flops(budgets[0])} FLOPs: nothing is said about other compute."]
    decades = math.log10(budgets[-1] / budgets[0])
    text = (
        f"Compute runs from {formats.flops(budgets[0])} to {formats.flops(budgets[-1])} FLOPs: {len(budgets)} budgets "
        f"over {decades:.1f} decades. "
    )
    if decades < FEW_DECADES:
        text += (
            "Over less than two decades an irreducible loss cannot be told from a smaller exponent: exponents of "
            "power laws without offset describe this range, and must not be set beside those of laws with one. "
        )
    return [text + f"A prediction beyond {formats.flops(budgets[-1])} FLOPs rests on the form of the law alone."]


def _optima(study: Analysis) -> list[str]:
    edges = [p for p in study.profiles if not p.interior]
    if not edges:
        return []
    told = formats.listed([f"{p.family} at {formats.flops(p.budget)} ({p.remark})" for p in edges])
    return [
        f"{len(study.profiles) - len(edges)} of {len(study.profiles)} optimal sizes lie between measured ones. At the "
        f"others the best loss is only an upper bound: {told}."
    ]


def _seeds(study: Analysis, done: list[Point]) -> list[str]:
    cells = cells_of(done)
    single = sum(len(cell.by_seed) < 2 for cell in cells)
    if study.noise is None:
        return [f"Each of the {formats.plural(len(cells), 'cell')} was run with one seed: no difference has an error."]
    sentences = []
    if single:
        sentences.append(
            f"{single} of {len(cells)} cells have one seed. Their error is taken from cells with several, which "
            "assumes that it is the same at other sizes and budgets."
        )
    fewest = min(spread.freedom for spread in study.noise.families.values())
    if fewest < 5:
        sentences.append(
            f"A standard deviation with {formats.plural(fewest, 'degree')} of freedom is itself uncertain by a factor "
            "of about two or more; Student's t widens the intervals accordingly."
        )
    return sentences


def _rates(study: Analysis, done: list[Point]) -> list[str]:
    checked = {check.family for check in study.rates}
    unchecked = [family for family in families_of(done) if family not in checked]
    if not unchecked:
        return []
    return [
        f"The learning rate was not checked for {formats.listed(unchecked)}: a difference between families may come "
        "from a rate that suits one of them better."
    ]


def _batches(done: list[Point]) -> list[str]:
    tried: dict[tuple[object, ...], set[float | None]] = {}
    for cell in cells_of(done):
        tried.setdefault((cell.family, cell.budget, cell.shape), set()).add(cell.setting[0])
    if any(len(batches) > 1 for batches in tried.values()):
        return []
    batches = _range(done, lambda p: p.b or 0.0, formats.count)
    return [f"No size was run with two batches (used: {batches} tokens), so the batch was not tuned for any family."]


def _family(done: list[Point]) -> list[str]:
    families = families_of(done)
    if DENSE not in families:
        return ["No dense model was run: mixtures are compared with one another only."]
    if len(families) == 1:
        return ["Only dense models were run: nothing is said about mixtures."]
    return []


def _data(study: Analysis) -> list[str]:
    headers = [record.headers[-1] for record in study.records.values() if record.headers]
    data, tokenizers = ({header[key] for header in headers} for key in ("data_hash", "tokenizer_hash"))
    if not headers:
        return []
    return [
        f"{formats.plural(len(data), 'corpus' if len(data) == 1 else 'data set')} and "
        f"{formats.plural(len(tokenizers), 'tokenizer')}. Records do not say how many different tokens were read, so "
        "how often text was repeated cannot be told from them."
    ]


def _tests(study: Analysis) -> list[str]:
    if study.noise is None or study.tests < 2:
        return []
    return [
        f"{study.tests} differences are held against 95 % intervals, each by itself: by chance alone about "
        f"{max(round(0.05 * study.tests), 1)} of them would be called resolved."
    ]


def _quality(study: Analysis) -> list[str]:
    if any(line["score"] is not None for record in study.records.values() for line in record.evals):
        return []
    return [
        "Only the loss on held-out text was measured, no task: sparse models have been reported to do worse at reading "
        "comprehension than dense ones of equal loss (Abnar et al. 2025, arXiv 2501.12370)."
    ]
