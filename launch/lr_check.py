"""Runs that show how far the learning-rate rule is from the best: one of each family, at other learning rates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..base.config import merge
from .naming import run_name
from .planned import PlannedRun
from .run_keys import check_rule, matches, shown
from .sharing import Candidate
from .study_config import LearningRateCheck, LearningRateRule

CHECK = "lr"


def learning_rate_checks(
    rule: LearningRateRule | None, candidates: Sequence[Candidate], runs: Mapping[str, PlannedRun]
) -> tuple[list[PlannedRun], list[str]]:
    """The runs that ``rule.check`` adds to ``runs`` (by scientific hash), and a warning for each family without one.

    ``at`` is compared with the study file's own values, before any scale.

    Raises:
        UserError: ``at`` names a key that no group gives, or matches no run at all.
    """
    if rule is None or rule.check is None:
        return [], []
    check_rule("lr_rule.check.at", rule.check.at, [candidate.combination.content for candidate in candidates])
    added: dict[str, PlannedRun] = {}
    warnings = []
    for family in dict.fromkeys(candidate.run.family for candidate in candidates):
        base = _base([candidate for candidate in candidates if candidate.run.family == family], rule.check)
        if base is None:
            warnings.append(
                f"lr_rule.check: family {family} has no run with a learning rate by the rule at "
                f"{shown(rule.check.at)}, so nothing checks it there"
            )
            continue
        for factor in rule.check.factors:
            run = _at_other_rate(base, rule, factor)
            if run.config.scientific_hash not in runs:  # a group that sweeps the rate has it already
                added[run.config.scientific_hash] = run
    return list(added.values()), warnings


def _base(candidates: Sequence[Candidate], check: LearningRateCheck) -> Candidate | None:
    """The run of lowest seed that the check speaks of."""
    found = [c for c in candidates if c.by_rule and matches(check.at, c.combination.content)]
    return min(found, key=lambda c: (c.run.config.training.seed, len(c.run.name), c.run.name), default=None)


def _at_other_rate(base: Candidate, rule: LearningRateRule, factor: float) -> PlannedRun:
    config = base.run.config
    rate = rule.learning_rate(config.model.width, factor)
    name = run_name(base.run.family, (*base.keys, "optimizer.lr"), merge(base.content, {"optimizer": {"lr": rate}}))
    optimizer = config.optimizer.model_copy(update={"lr": rate})
    return replace(
        base.run, name=name, config=config.model_copy(update={"name": name, "optimizer": optimizer}), check=CHECK
    )
