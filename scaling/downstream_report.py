"""The report's section on downstream tasks."""

from collections.abc import Sequence

from . import formats
from .analysis import Analysis
from .cells import DENSE, families_of
from .downstream import Answered
from .figures import Plot, as_image, colours, label, legend, panels
from .findings import score_gaps
from .page import Block, Points
from .plots import NATS


def scores(found: Sequence[Answered]) -> Plot | None:
    """Score against held-out loss, a panel for each task; dense models as circles, mixtures as squares."""
    if not found:
        return None
    tasks = list(dict.fromkeys(one.task for one in found))
    families = families_of([one.point for one in found])
    palette = colours(families)
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for family in families:
            own = [one for one in found if (one.task, one.point.family) == (task, family)]
            at = [one.point.loss or 0.0 for one in own]
            axis.plot(at, [one.score for one in own], "o" if family == DENSE else "s", color=palette[family],
                      markersize=4.5, alpha=0.8, label=family if own else None)  # fmt: skip
            axis.vlines(at, [one.score - one.error for one in own], [one.score + one.error for one in own],
                        color=palette[family], linewidth=0.9, alpha=0.5)  # fmt: skip
        for chance in sorted({one.chance for one in found if one.task == task}):
            axis.axhline(chance, color="#333333", linewidth=0.8, linestyle="--")
        axis.invert_xaxis()
        label(axis, f"held-out {NATS}", "score" if axis is axes[0] else "", task)
    axes[0].plot([], [], "--", color="#333333", linewidth=0.8, label="chance")
    legend(axes[0])
    caption = (
        "Share of questions answered right (largest log-likelihood a character) against held-out loss, both after the "
        "last step; better models stand to the right. Bars: one binomial standard error, which runs asked the same "
        "questions share in part. Dashed: a blind guess. Circles are dense models, squares mixtures."
    )
    columns = ("run", "family", "task", "held-out loss (nats/token)", "score", "standard error", "raw score", "chance",
               "questions", "loss of right choices (nats/token)", "contexts cut")  # fmt: skip
    rows = [
        (one.point.run, one.point.family, one.task, formats.fixed(one.point.loss), formats.fixed(one.score),
         formats.fixed(one.error), formats.fixed(one.raw_score), formats.fixed(one.chance), str(one.questions),
         formats.fixed(one.choice_loss), str(one.cut))
        for one in found
    ]  # fmt: skip
    return Plot("downstream", "Downstream", as_image(figure), caption, columns, rows)


def blocks(study: Analysis) -> list[Block]:
    """How many runs beat a blind guess, and families at equal loss."""
    sentences = []
    for task in dict.fromkeys(one.task for one in study.answered):
        own = [one for one in study.answered if one.task == task]
        above = sum(one.above_chance for one in own)
        sentences.append(
            f"{task}: {above} of {formats.plural(len(own), 'run')} above chance by more than two standard errors of a "
            "blind guess."
        )
    sentences += score_gaps(study.score_gaps)
    if not study.score_gaps:
        sentences.append("Too few runs of a mixture and of dense models share a range of losses to compare them there.")
    return [Points(sentences)]
