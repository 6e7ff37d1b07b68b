"""From a study to its runs: every combination of every group, named, validated, each computed once."""

from collections.abc import Iterable, Sequence
from itertools import chain

from ..base.config import merge, validate
from ..base.errors import UserError
from ..training.config import RunConfig
from .branches import branch
from .combinations import Combination, combinations
from .lr_check import learning_rate_checks
from .naming import naming_keys, run_name
from .places import written_as
from .planned import Expansion, ImpossibleRun, PlannedRun
from .run_keys import Content
from .scale import StudyScale
from .sharing import Candidate, refuse_equal_names, share
from .study_config import StudyConfig

_LONGEST_NAME = 200


def expand(study: StudyConfig) -> Expansion:
    """All runs of ``study``.

    Groups may overlap: a run that two groups of the same family ask for is one run, under the shorter name. Two
    families may not share a run, because a point of the study carries one label. A combination that is not valid does
    not keep the others from running.

    Raises:
        UserError: a group of which no combination is valid, for one and the same reason; a run that stands twice in a
            group, belongs to two families, or cannot be told from another by its name. Says which groups and keys.
    """
    groups = {name: combinations(study, name) for name in study.groups}
    scale = StudyScale(study.scale, [combination.content for combination in chain(*groups.values())])
    candidates: list[Candidate] = []
    impossible: list[ImpossibleRun] = []
    for name, members in groups.items():
        keys = tuple(naming_keys(study.groups[name]))
        tried = [_try(study, keys, combination, scale) for combination in members]
        failed = [found for found in tried if isinstance(found, ImpossibleRun)]
        if len(failed) == len(tried) and (faults := shared_complaints(failed)):
            where = [written_as(study, members[0], fault) for fault in faults]
            raise UserError("\n".join(f"{members[0]}: {fault}{w}" for fault, w in zip(faults, where, strict=True)))
        candidates += [found for found in tried if isinstance(found, Candidate)]
        impossible += failed
    runs = branch(study, share(candidates))
    checks, warnings = learning_rate_checks(study.lr_rule, candidates, runs)
    everything = [*runs.values(), *checks]
    impossible = _merged(impossible)
    refuse_equal_names(everything, impossible)
    return Expansion(
        runs=tuple(sorted(everything, key=lambda run: run.name)),
        impossible=tuple(sorted(impossible, key=lambda run: run.name)),
        warnings=tuple(warnings),
    )


def shared_complaints(runs: Sequence[ImpossibleRun]) -> list[str]:
    """What all of ``runs`` are impossible for: a fault of the file rather than of one combination."""
    first, *others = (run.complaints for run in runs)
    return [complaint for complaint in first if all(complaint in complaints for complaints in others)]


def _try(
    study: StudyConfig, keys: tuple[str, ...], combination: Combination, scale: StudyScale
) -> Candidate | ImpossibleRun:
    """The run that ``combination`` describes, or why there is none."""
    family = study.groups[combination.group].family
    content, origin = combination.content, str(combination)
    rule = study.lr_rule
    try:
        content = scale.shrink(content)
        optimizer = content.get("optimizer")
        by_rule = rule is not None and (
            optimizer is None or (isinstance(optimizer, dict) and optimizer.get("lr") is None)
        )
        if rule is not None and by_rule:
            content = merge(content, {"optimizer": {"lr": rule.base_lr}})
        config = validate(RunConfig, {**content, "name": study.name}, origin)
    except UserError as error:
        complaints = tuple(line.removeprefix(f"{origin}: ") for line in str(error).splitlines())
        return ImpossibleRun(_name(family, keys, content, origin), family, (combination.group,), complaints)
    if rule is not None and by_rule:
        rate = rule.learning_rate(config.model.width)
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": rate})})
    name = _name(family, keys, content, origin)
    config = config.model_copy(update={"name": name})
    return Candidate(combination, content, keys, by_rule, PlannedRun(name, family, (combination.group,), config))


def _name(family: str, keys: Iterable[str], content: Content, origin: str) -> str:
    name = run_name(family, keys, content)
    if len(name) > _LONGEST_NAME:
        raise UserError(
            f"{origin}: the name {name} is longer than {_LONGEST_NAME} characters; shorten values or family"
        )
    return name


def _merged(runs: Iterable[ImpossibleRun]) -> list[ImpossibleRun]:
    """Combinations of several groups that are one and the same are listed once."""
    found: dict[tuple[str, str], ImpossibleRun] = {}
    for run in runs:
        other = found.setdefault((run.family, run.name), run)
        groups = tuple(sorted({*other.groups, *run.groups}))
        found[run.family, run.name] = ImpossibleRun(run.name, run.family, groups, other.complaints)
    return list(found.values())
