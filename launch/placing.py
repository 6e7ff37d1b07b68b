"""A study on a cluster: each run with the layout that the cost model finds the fastest there."""

from dataclasses import replace

from ..base.errors import UserError
from .cluster_config import ClusterConfig
from .layout_choice import LayoutChooser
from .planned import Expansion, ImpossibleRun, PlannedRun
from .vocabularies import Vocabularies


def placed(expansion: Expansion, cluster: ClusterConfig, world: int | None) -> Expansion:
    """``expansion`` with what its files leave open of layout, micro-batch and recomputation chosen for ``cluster``.

    Args:
        world: ranks of each run; None: those of the fewest device-hours.

    Returns:
        Runs that fit nowhere on the cluster are among the impossible ones, with what they would need.

    Raises:
        UserError: the cluster file does not tell its hardware.
    """
    chooser, vocabularies = LayoutChooser(cluster), Vocabularies()
    runs: list[PlannedRun] = []
    refused: list[ImpossibleRun] = []
    for run in expansion.runs:
        try:
            choice = chooser.choose(run.config, vocabularies.of(run.config.data), world)
        except UserError as error:
            complaints = tuple(str(error).removeprefix(f"{run.name}: ").splitlines())
            refused.append(ImpossibleRun(run.name, run.family, run.groups, complaints))
            continue
        runs.append(replace(run, config=choice.option.applied_to(run.config), choice=choice))
    impossible = sorted((*expansion.impossible, *refused), key=lambda run: run.name)
    return replace(expansion, runs=tuple(runs), impossible=tuple(impossible))
