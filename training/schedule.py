"""Learning rate by step."""

import math

from ..base.errors import UserError
from .config import RunConfig, ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Steps of linear warm-up in a run of ``steps``."""
    return round(schedule.warmup * steps) if schedule.warmup < 1 else int(schedule.warmup)


def decay_start(schedule: ScheduleConfig, steps: int) -> int:
    """The step after which a ``wsd`` run of ``steps`` begins to decay; a branch of that length starts there."""
    return steps - max(round(schedule.decay * steps), 1)


def check_schedule(config: RunConfig, steps: int) -> None:
    """Refuse a schedule that a run of ``steps`` cannot follow.

    Raises:
        UserError: warm-up without an end, a decay that begins inside it, a branch that the trunk never reaches.
    """
    schedule = config.schedule
    warmup = warmup_steps(schedule, steps)
    if warmup >= steps:
        raise UserError(
            f"schedule.warmup ({schedule.warmup:g}) is {warmup} of {steps} steps: the peak is never reached; lower it"
        )
    if schedule.kind != "wsd":
        return
    for total in (steps, *schedule.branches):
        if decay_start(schedule, total) < max(warmup, 1):
            raise UserError(
                f"schedule.decay ({schedule.decay:g}) begins after step {decay_start(schedule, total)} of {total}, "
                f"inside the warm-up ({warmup} steps); lower one of them"
            )
        if total > steps:
            raise UserError(f"schedule.branches ({total}) is longer than its trunk ({steps} steps); lengthen the trunk")


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 1) in a run of ``steps``.

    Warm-up is linear to the peak. ``cosine`` then falls to ``min_ratio`` of it along half a cosine; ``wsd`` stays
    and falls linearly over the last share ``decay`` (Hägele et al. 2024, 2405.18392).
    """
    schedule, peak = config.schedule, config.optimizer.lr
    warmup = warmup_steps(schedule, steps)
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    floor = schedule.min_ratio
    if schedule.kind == "cosine":
        share = (step - warmup) / max(steps - warmup, 1)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))
    start = decay_start(schedule, steps)
    if step <= start:
        return peak
    return peak * (1 - (1 - floor) * (step - start) / (steps - start))


def branch_steps(config: RunConfig) -> dict[int, int]:
    """Steps at which a trunk keeps a checkpoint, each with the total length of the branch that starts there."""
    return {decay_start(config.schedule, total): total for total in config.schedule.branches}
