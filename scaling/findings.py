"""What a study found, in sentences that claim no more than its runs support."""

from collections import Counter
from collections.abc import Mapping, Sequence

from . import formats, optimum_words
from .analysis import Analysis
from .downstream import Gap
from .effects import Line
from .fitted import Fit
from .isoflop import Comparison, Profile
from .points import Point
from .rates import RateCheck
from .saving import Saving
from .seeds import Difference, SeedNoise


def findings(study: Analysis) -> list[str]:
    """The findings, most important first."""
    further = [
        *optimum_words.predicted(study.outcomes),
        *_paired(study),
        *_saved(study),
        *_effects("sparsity", study.sparsity),
        *_effects("granularity", study.granularity),
    ]
    closing = [
        *optimum_words.grown(study.growths),
        *_noise_ratios(study),
        *(
            optimum_words.setting_ratio(one)
            for one in study.setting_ratios
            if one.what == "b" or one.resolved is not None
        ),
        *score_gaps(study.score_gaps),
        *_rates(study.rates),
        *_future(study.points),
    ]
    return in_words(study.points, study.profiles, study.powers, study.comparisons, study.noise, further, closing)


def in_words(
    points: Sequence[Point],
    found: Sequence[Profile],
    fits: Mapping[str, Fit],
    compared: Sequence[Comparison],
    noise: SeedNoise | None,
    further: Sequence[str] = (),
    closing: Sequence[str] = (),
) -> list[str]:
    """Best losses against dense, then ``further``; laws and optima, then ``closing``; seed noise and failures."""
    return [
        *_compared(compared),
        *further,
        *_falling(found, fits),
        *_optima(found),
        *closing,
        *_seeds(noise),
        *_unfinished(points),
    ]


def warnings_of(study: Analysis) -> list[str]:
    """What the reader must know before believing the findings."""
    return [
        *optimum_words.register_warnings(study.outcomes),
        *_future(study.points),
        *(_refuted(check) for check in study.rates if check.refuted),
    ]


def _future(points: Sequence[Point]) -> list[str]:
    """Families whose routing uses future tokens, in training or always."""
    when = {
        "training": "In training, routing of {} uses future tokens; in evaluation it does not.",
        "always": "Routing of {} uses future tokens in evaluation too: these losses are not a language model's, and "
        "are left out of all comparisons and fits.",
    }
    told = {key: list(dict.fromkeys(p.family for p in points if p.future == key)) for key in when}
    return [when[key].format(formats.listed(families)) for key, families in told.items() if families]


def verdict(difference: Difference) -> str:
    """``resolved``, ``unresolved`` or why neither can be said."""
    if difference.resolved is None:
        return "seed noise not measured"
    return "resolved" if difference.resolved else "unresolved"


def _weight(comparison: Comparison) -> tuple[bool, float, float]:
    """What makes one comparison more worth telling than another."""
    return comparison.gap.resolved is True, comparison.budget, abs(comparison.gap.value)


def _compared(compared: Sequence[Comparison]) -> list[str]:
    """A sentence for each family, at the largest budget it shares with the dense one; what is resolved comes first."""
    largest = {c.family: c for c in sorted(compared, key=lambda c: c.budget)}
    sentences = []
    for family, last in sorted(largest.items(), key=lambda item: _weight(item[1]), reverse=True):
        gap = last.gap
        digits = formats.decimals(gap.reach)
        text = (
            f"At {formats.flops(last.budget)} FLOPs the best {family} model's loss is {abs(gap.value):.{digits}f} "
            f"nats/token {'lower' if gap.value > 0 else 'higher'} than the best dense one's"
        )
        if gap.reach is not None:
            text += f" (± {gap.reach:.{digits}f}, 95 %)"
        if last.multiple is not None:
            ends = formats.interval(last.low, last.high)
            text += f", worth {formats.significant(last.multiple, 2)} times the compute"
            text += f" (95 %: {ends})" if ends else " (no finite interval)"
            text += ", an extrapolation of the dense power law" if last.extrapolated else ""
        if gap.resolved is False:
            text += ". The gap is within its seed noise: unresolved"
        elif gap.resolved is None:
            text += ". Seed noise was not measured, so this may be chance"
        if last.edge:
            text += ". An optimum lies at the edge of the sizes measured: the gap may change with more sizes"
        sentences.append(text + ".")
    return sentences


def _paired(study: Analysis) -> list[str]:
    return [
        f"At equal shape and equal seeds ({p.difference.pairs} pairs, {formats.flops(p.budget)} FLOPs) dense minus "
        f"{p.family} is {formats.with_error(p.difference.value, p.difference.reach)} nats/token: "
        f"{verdict(p.difference)}."
        for p in study.pairings
    ]


def _saved(study: Analysis) -> list[str]:
    """For each family the data saved by its best model that has a value, at the largest budget that has one."""
    sentences = []
    for family in dict.fromkeys(s.family for s in study.savings):
        known = [s for s in study.savings if s.family == family and s.share is not None]
        if not known:
            why = formats.listed(list(dict.fromkeys(s.why for s in study.savings if s.family == family)))
            sentences.append(f"Data saved by {family} cannot be told: {why}.")
            continue
        budget = max(s.budget for s in known)
        sizes = {p.family: p.n_best for p in study.profiles if p.budget == budget}
        best = min(
            (s for s in known if s.budget == budget),
            key=lambda s: abs(s.active - sizes.get(family, s.active)),
        )
        sentences.append(_saving(best))
    return sentences


def _saving(best: Saving) -> str:
    share = best.share or 0.0
    ends = formats.percents(best.low, best.high)
    where = f"{best.family} with {formats.count(best.active)} active parameters"
    beyond = ", beyond the dense runs' tokens" if best.extrapolated else ""
    if best.resolved is False:
        return f"Data saved by {where}: {formats.percent(share)} (95 %: {ends}){beyond}: unresolved."
    return (
        f"{where} reaches in {formats.count(best.tokens)} tokens what a dense model of that active size needs "
        f"{formats.count(best.dense_tokens)} for{beyond}: {abs(share):.0%} {'fewer' if share >= 0 else 'more'} "
        + (f"(data saved, 95 %: {ends})." if ends else "(data saved; no interval).")
    )


def _effects(name: str, lines: Sequence[Line]) -> list[str]:
    """For each pair of neighbouring levels one sentence over all budgets and sizes."""
    pairs: dict[tuple[str, str, str], list[Difference]] = {}
    for line in lines:
        levels = zip(line.cells, line.cells[1:], line.values, line.values[1:], line.steps, strict=False)
        for low, high, a, b, step in levels:
            values = f"{line.axis.upper()} {a:.3g} to {b:.3g} at {line.name}"
            pairs.setdefault((low.family, high.family, values), []).append(step)
    return [
        f"Higher {name} alone, {low} to {high} ({values}, equal shape and compute): {_counted(steps)}."
        for (low, high, values), steps in pairs.items()
    ]


def _counted(steps: Sequence[Difference]) -> str:
    """How many differences are resolved, which way, and how large they are."""
    if len(steps) == 1:
        return f"lower by {formats.with_error(steps[0].value, steps[0].reach)} nats/token, {verdict(steps[0])}"
    digits = min(formats.decimals(step.reach) for step in steps)
    low, high = min(step.value for step in steps), max(step.value for step in steps)
    text = f"lower by {low:+.{digits}f} to {high:+.{digits}f} nats/token in {len(steps)} cells; "
    if steps[0].resolved is None:
        return text + "seed noise not measured"
    better = sum(bool(step.resolved) and step.value > 0 for step in steps)
    worse = sum(bool(step.resolved) and step.value < 0 for step in steps)
    if not better + worse:
        return text + "resolved in none"
    return text + f"resolved as lower in {better}, as higher in {worse}"


def _falling(found: Sequence[Profile], fits: Mapping[str, Fit]) -> list[str]:
    sentences = []
    for family in dict.fromkeys(p.family for p in found):
        own = [p for p in found if p.family == family]
        if len(own) < 2:
            continue
        falls = all(after.loss_best < before.loss_best for before, after in zip(own, own[1:], strict=False))
        text = f"The best {family} loss {'falls' if falls else 'does not fall'} with every step in compute"
        if family in fits:
            text += f", as C^-b with b = {formats.estimate(fits[family].coefficients['b'])} over {len(own)} budgets"
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


def _noise_ratios(study: Analysis) -> list[str]:
    sentences = []
    for ratio in study.noise_ratios:
        ends = formats.interval(ratio.low, ratio.high)
        answer = f"{'lower' if ratio.high < 1 else 'higher'}" if ratio.resolved else "not resolved"
        sentences.append(
            f"Is the gradient noise scale lower for {ratio.family} than for dense at equal loss? Ratio "
            f"{formats.significant(ratio.ratio, 2)} (95 %: {ends}) over losses {ratio.loss_range[0]:.2f} to "
            f"{ratio.loss_range[1]:.2f}: {answer}."
        )
    return sentences


def score_gaps(found: Sequence[Gap]) -> list[str]:
    """Whether mixtures answer downstream tasks better or worse than dense models of equal loss."""
    return [
        f"Downstream task {gap.task} at equal held-out loss: {gap.family} minus dense is "
        f"{formats.with_error(gap.apart.value, gap.apart.reach)} in score (95 %, parallel lines through "
        f"{gap.apart.n} runs, losses {gap.apart.span[0]:.2f} to {gap.apart.span[1]:.2f}): "
        f"{'resolved' if gap.resolved else 'unresolved'}."
        for gap in found
    ]


def _rates(checks: Sequence[RateCheck]) -> list[str]:
    """The families for which the rule's learning rate held; the others are told one by one."""
    held = [check for check in checks if not check.refuted]
    sentences = [_refuted(check) for check in checks if check.refuted]
    if held:
        families = formats.listed(list(dict.fromkeys(check.family for check in held)))
        excess = max(check.excess for check in held)
        counts = sorted({len(check.ratios) for check in held})
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        reach = held[0].reach
        limit = "seed noise was not measured" if reach is None else "within seed noise"
        best = "is the best" if excess == 0 else f"is within {excess:.3f} nats/token ({limit}) of the best"
        text = f"The rule's learning rate {best} of the {many} tried for {families}"
        ends = [f"{check.family} (best at {check.best_ratio:g} x)" for check in held if not check.bracketed]
        if ends:
            text += f"; the smallest loss lies at an end of the rates tried for {formats.listed(ends)}"
        sentences.append(text + ".")
    return sentences


def _refuted(check: RateCheck) -> str:
    return (
        f"{check.family}, {formats.count(check.active)} active parameters, {formats.flops(check.budget)} FLOPs: "
        f"{check.best_ratio:g} times the rule's learning rate is better by {check.excess:.3f} nats/token, more than "
        f"seeds explain (± {check.reach:.3f}): its losses by the rule are too high."
    )


def _seeds(noise: SeedNoise | None) -> list[str]:
    if noise is None:
        return ["No cell was run with several seeds, so no difference between two runs can be told from chance."]
    told = [
        f"{family} {spread.sd:.{formats.decimals(spread.sd)}f} ({spread.freedom} degrees of freedom)"
        for family, spread in noise.families.items()
    ]
    text = f"Standard deviation of the final loss over seeds, nats/token: {formats.listed(told)}."
    if len(noise.families) > 1:
        chance = "" if noise.p_alike is None else f" (Bartlett's test: p = {noise.p_alike:.2g})"
        if noise.alike:
            text += f" One value may hold for all{chance}; a family without seeds of its own is given the pooled one."
        else:
            text += (
                f" They lie a factor of {noise.ratio:.2g} apart{chance} and are not pooled; a family without seeds of "
                "its own is given the largest."
            )
    else:
        text += " Other families are given the same value, unmeasured."
    return [text]


def _unfinished(points: Sequence[Point]) -> list[str]:
    states = Counter(point.state for point in points if point.state != "done")
    if not states:
        return [f"All {len(points)} runs finished." if len(points) > 1 else "The run finished."]
    counted = formats.listed([f"{number} {state}" for state, number in sorted(states.items())])
    finished = len(points) - states.total()
    return [f"{finished} of {len(points)} runs finished; the others ({counted}) are left out of all comparisons."]
