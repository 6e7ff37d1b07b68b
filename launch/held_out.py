"""Which runs are trained last, since laws predict them first; known from the plan, without a fit."""

from typing import TYPE_CHECKING

from ..base.errors import UserError
from .condition import parse_condition
from .planned import Expansion, Plan, PlannedRun, PlanRow
from .study_config import FitRequest, StudyConfig

if TYPE_CHECKING:
    from ..scaling.points import Point  # imports scipy, for which most plans need not wait


def predicted_runs(study: StudyConfig, expansion: Expansion, plan: Plan) -> dict[str, list[FitRequest]]:
    """Runs that fits of ``study`` predict before they are trained, each with these fits.

    Raises:
        UserError: a condition speaks of what is not known before a run, holds for no run or for all of a fit's, or for
            the trunk of a run that it does not hold for.
    """
    if not any(request.predict for request in study.fit):
        return {}
    runs = {run.name: run for run in expansion.runs}
    points = [point_of(runs[row.name], row) for row in plan.rows if not row.check]
    found: dict[str, list[FitRequest]] = {}
    for request in study.fit:
        if not request.predict:
            continue
        own = [point for point in points if request.family in (None, point.family)]
        held = [point.run for point in own if _holds(request, point)]
        if not held or len(held) == len(own):
            raise UserError(
                f"fit {request.name}: hold_out ({request.hold_out}) holds for {len(held)} of its {len(own)} runs, so "
                f"{'there is nothing to predict' if not held else 'nothing is left to fit'}"
            )
        for name in held:
            found.setdefault(name, []).append(request)
    for row in plan.rows:
        if row.trunk in found and row.name not in found:
            raise UserError(
                f"fit {found[row.trunk][0].name}: {row.trunk} is to be predicted before it is trained, but "
                f"{row.name} branches from it; hold out both, or leave branch out of the group"
            )
    return found


def _holds(request: FitRequest, point: "Point") -> bool:
    assert request.hold_out is not None
    condition = parse_condition(request.hold_out)
    for name in sorted(condition.columns):
        if not isinstance(getattr(point, name, None), int | float):
            raise UserError(
                f"fit {request.name}: hold_out ({request.hold_out}): {name} is not known before a run is trained, so "
                "it cannot say which runs to predict; use c, d, n_total, n_active, e, k, g, s, b, lr or seed"
            )
    return condition.holds({name: getattr(point, name) for name in condition.columns})


def point_of(run: PlannedRun, row: PlanRow) -> "Point":
    """What is known of a run before it starts, as its point will have it."""
    from ..scaling.points import Point

    config, moe = run.config, run.config.moe
    routed, active = (moe.experts, moe.active) if moe else (1, 1)
    return Point(
        run=run.name,
        family=run.family,
        state="pending",
        check=run.check,
        seed=config.training.seed,
        n_total=row.n_total,
        n_active=row.n_active,
        d=row.tokens,
        c=row.flops,
        c_6nd=6.0 * row.n_active * row.tokens,
        e=routed,
        k=active,
        g=4 * config.model.width / moe.width_of_expert(config.model.width) if moe else 1,
        s=1 - active / routed,
        shared=moe.shared if moe else 0,
        b=row.tokens / row.steps,
        lr=config.optimizer.lr,
    )
