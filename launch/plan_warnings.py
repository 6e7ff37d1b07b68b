"""What a plan warns of: runs that will start, and yet show less than they cost."""

from collections.abc import Iterable, Mapping, Sequence

import psutil

from .. import data
from ..base.progress import memory
from ..parallel.topology import Topology
from ..training.config import RunConfig
from .planned import Plan, PlannedRun, PlanRow
from .study_config import StudyConfig

# Below so many steps a run is mostly warm-up, and its loss says little about its budget.
FEW_STEPS = 50
# Impossible runs that are explained one by one.
_SHOWN = 20
# The family that the report compares others with, and the ratio of FLOPs within which budgets are one: those of
# scaling.cells, which takes a second to import.
_DENSE = "dense"
_SAME_BUDGET = 1.1


def runs_warnings(plan: Plan) -> list[str]:
    """About any runs that are to be done together."""
    warnings = [f"{run.name} is impossible and left out: {run.reason}" for run in plan.impossible[:_SHOWN]]
    if len(plan.impossible) > _SHOWN:
        warnings.append(f"{len(plan.impossible) - _SHOWN} more runs are impossible and left out")
    few = [f"{row.name} ({row.steps})" for row in plan.rows if row.steps < FEW_STEPS]
    if few:
        warnings.append(
            f"{_runs(few, 'has', 'have')} fewer than {FEW_STEPS} steps: {_some(few)}; give them a larger budget or a "
            "smaller training.batch"
        )
    return warnings


def memory_warnings(plan: Plan) -> list[str]:
    """About runs that are to be done here."""
    available = psutil.virtual_memory().available
    if plan.memory_bytes <= available:
        return []
    together = f"{plan.workers} runs side by side need" if plan.workers > 1 else "the largest run needs"
    advice = "lower workers" if plan.workers > 1 else "lower training.micro_batch, or the study's scale"
    return [f"{together} about {memory(plan.memory_bytes)} and {memory(available)} are available; {advice}"]


def routing_warnings(configs: Sequence[RunConfig]) -> list[str]:
    """About mixtures whose result depends on the layout, or that see the future."""
    coupled: dict[str, list[str]] = {}
    ahead: dict[str, list[str]] = {}
    for config in configs:
        if config.moe is not None:
            for setting in config.moe.inexact:
                coupled.setdefault(setting, []).append(config.name)
            ahead.setdefault(config.moe.future, []).append(config.name)
    warnings = [
        f"{_runs(names, 'has', 'have')} {setting}, which couples the sequences of a micro-batch: results depend on the "
        f"layout and on training.micro_batch: {_some(names)}"
        for setting, names in coupled.items()
    ]
    if names := ahead.get("training", []):
        warnings.append(
            f"{_runs(names, 'uses', 'use')} future tokens for routing in training; evaluation does not: {_some(names)}"
        )
    if names := ahead.get("always", []):
        warnings.append(
            f"{_runs(names, 'uses', 'use')} future tokens for routing, in evaluation too, so that the loss is not a "
            f"language model's and is left out of comparisons: {_some(names)}; moe.grouping=position and "
            "moe.drop=position do not look ahead"
        )
    return warnings


def node_warnings(topologies: Mapping[str, Topology]) -> list[str]:
    """About groups that talk within every layer and reach over several nodes; topologies by name of the run."""
    warnings = []
    for key, ranks, what in (
        ("tensor", Topology.tensor_groups, "activations"),
        ("expert", Topology.expert_groups, "tokens"),
    ):
        nodes = {name: max(map(topology.nodes_of, ranks(topology))) for name, topology in topologies.items()}
        reaching = [f"{name} ({count} nodes)" for name, count in nodes.items() if count > 1]
        if reaching:
            warnings.append(
                f"{_runs(reaching, 'has', 'have')} {key} groups over several nodes, so that {what} go through the "
                f"network in every layer: {_some(reaching)}; a smaller parallel.{key} stays inside a node"
            )
    return warnings


def study_warnings(study: StudyConfig, rows: Sequence[PlanRow], configs: Sequence[RunConfig]) -> list[str]:
    """About runs that are to be compared with each other; ``configs`` are those of ``rows``."""
    return [
        *_never_compared(rows),
        *([] if study.lr_rule else _one_learning_rate(rows, configs)),
        *routing_warnings(configs),
    ]


def _never_compared(rows: Sequence[PlanRow]) -> list[str]:
    budgets: dict[str, list[float]] = {}
    for row in rows:
        if not row.check:
            budgets.setdefault(row.family, []).append(row.flops)
    dense = budgets.pop(_DENSE, [])
    if not budgets:
        return []
    if not dense:
        return [f"no family is named {_DENSE}, so the report compares {', '.join(budgets)} with nothing"]
    alone = [
        family
        for family, own in budgets.items()
        if not any(1 / _SAME_BUDGET <= flops / other <= _SAME_BUDGET for flops in own for other in dense)
    ]
    return [
        f"family {family} has no budget that family {_DENSE} has too, so the two are never compared; give them one"
        for family in alone
    ]


def _one_learning_rate(rows: Sequence[PlanRow], configs: Sequence[RunConfig]) -> list[str]:
    """Families of several widths at one learning rate, or all families together."""
    settings: dict[str, set[tuple[int, float]]] = {}
    for row, config in zip(rows, configs, strict=True):
        settings.setdefault(row.family, set()).add((config.model.width, config.optimizer.lr))
    groups = {f"family {family}": found for family, found in settings.items()}
    if len(groups) > 1:
        groups = {"the study": set().union(*settings.values()), **groups}
    for who, found in groups.items():
        widths, rates = sorted({width for width, _ in found}), {rate for _, rate in found}
        if len(widths) > 1 and len(rates) == 1:
            return [
                f"optimizer.lr is {rates.pop():g} at all widths of {who} ({', '.join(map(str, widths))}): sizes and "
                "families are compared at different distances from their best rate, and dense against MoE would be a "
                "learning-rate artefact; give lr_rule, or sweep optimizer.lr"
            ]
    return []


def text_warnings(plan: Plan, runs: Iterable[PlannedRun], train_tokens: Mapping[str, int | None]) -> list[str]:
    """Runs that see their training text more than once, and whether that could not be told.

    Args:
        train_tokens: unique training tokens by data section, as the JSON that pydantic dumps; None: not prepared yet.
    """
    tokens = {row.name: row.tokens for row in plan.rows}
    repeated, unknown = [], False
    for run in runs:
        unique = train_tokens[run.config.data.model_dump_json()]
        unknown = unknown or unique is None
        if unique and tokens.get(run.name, 0) > unique:
            repeated.append(f"{run.name} ({tokens[run.name] / unique:.1f} times)")
    warnings = []
    if repeated:
        warnings.append(f"{_runs(repeated, 'sees', 'see')} training text more than once: {_some(repeated)}")
    if unknown:
        warnings.append(
            "whether runs see their training text more than once is not known until moescale data prepare has counted "
            "its tokens"
        )
    return warnings


def found_tokens(runs: Iterable[PlannedRun]) -> dict[str, int | None]:
    """Unique training tokens by data section, as far as the data is prepared already."""
    sections = {run.config.data.model_dump_json(): run.config.data for run in runs}
    prepared = {key: data.find_prepared(section) for key, section in sections.items()}
    return {key: found.train_tokens if found else None for key, found in prepared.items()}


def _runs(names: Sequence[str], one: str, several: str) -> str:
    return f"{len(names)} run {one}" if len(names) == 1 else f"{len(names)} runs {several}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
