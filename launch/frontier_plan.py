"""What the best models for a budget would cost on a cluster: runs of a study at that size, laid out and timed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.config import apply_overrides, validate
from ..base.errors import UserError
from ..models.config import ModelConfig
from ..models.counts import count_parameters
from ..models.shapes import SHAPES
from ..moe.config import MoEConfig
from ..scaling.frontier import Best
from ..training.config import RunConfig
from .cluster_config import ClusterConfig
from .placing import placed
from .plan import plan_placed
from .planned import Expansion, Plan, PlannedRun
from .vocabularies import Vocabularies

# Keys of the model section that a rung of the ladder gives.
_OF_SHAPE = ("shape", "layers", "width", "heads", "kv_heads", "head_dim", "ffn")


def plan_frontier(
    rows: Sequence[Best], runs: Mapping[str, RunConfig], cluster: ClusterConfig, world: int | None, overrides: list[str]
) -> Plan:
    """Plan each of ``rows`` on ``cluster``, as the study's run that it is most like (`Best.like`), with the shape of
    the ladder whose active size is nearest.

    Args:
        runs: name -> configuration, of the study's runs.
        world: ranks of each model; None: those of the fewest device-hours.
        overrides: ``key=value`` that win over the study's, such as training.dtype=bf16.

    Raises:
        UserError: the cluster file does not tell its hardware, an override is wrong, or no model fits the cluster.
    """
    vocabularies = Vocabularies()
    models = []
    for row in rows:
        like = runs[row.like]
        config = _brought_to(row, like, vocabularies.of(like.data), overrides)
        models.append(PlannedRun(config.name, row.family, (), config))
    return plan_placed(placed(Expansion(tuple(models)), cluster, world))


def _brought_to(row: Best, like: RunConfig, vocab: int, overrides: list[str]) -> RunConfig:
    assert row.n_active.value is not None  # else there is no row
    shape = _nearest_shape(row.n_active.value, like, vocab)
    given = like.model_dump(mode="json")
    training = {key: value for key, value in given["training"].items() if key not in ("micro_batch", "recompute")}
    told = apply_overrides({}, overrides).get("training")
    seq = told.get("seq") if isinstance(told, dict) else None
    seq = seq if isinstance(seq, int) and seq > 0 else like.training.seq  # of another kind: refused below
    batch = like.training.batch if row.b is None else max(round(row.b / seq), 1)
    enough = math.ceil(row.d / seq) + batch  # of the size that is wanted: an override's may take more
    content = {
        **{key: value for key, value in given.items() if key not in ("parallel", "noise")},
        "name": f"{row.family}-{shape}-{row.compute:g}",
        "model": _model_of(shape, like),
        "moe": None if like.moe is None else _mixture_of(like),
        "training": {**training, "tokens": None, "steps": None, "flops": row.compute, "batch": batch},
        "schedule": {**given["schedule"], "branches": [], "parent": None},
        "data": {**given["data"], "samples": max(like.data.samples, 1000 * enough)},
    }
    return validate(RunConfig, apply_overrides(content, overrides), content["name"])


def _nearest_shape(n_active: float, like: RunConfig, vocab: int) -> str:
    """The rung whose active size is nearest by ratio, of those that the run's attention and experts allow."""
    sizes = {}
    for name in SHAPES:
        try:
            model = ModelConfig.model_validate(_model_of(name, like))
            moe = None if like.moe is None else MoEConfig.model_validate(_mixture_of(like))
            sizes[name] = count_parameters(model, moe, vocab).active
        except ValueError:
            continue  # such experts do not divide this width
    if not sizes:
        raise UserError(f"{like.name}: no shape of the ladder can have its attention and experts")
    return min(sizes, key=lambda name: abs(math.log(sizes[name] / n_active)))


def _model_of(shape: str, like: RunConfig) -> dict[str, Any]:
    """The run's model at another size, its feed-forward layers as wide in proportion."""
    kept = {key: value for key, value in like.model.model_dump(mode="json").items() if key not in _OF_SHAPE}
    return {**kept, "shape": shape, "ffn": round(like.model.ffn / like.model.width * SHAPES[shape].width)}


def _mixture_of(like: RunConfig) -> dict[str, Any]:
    """The run's experts, of the same granularity at any width."""
    assert like.moe is not None
    granularity = like.moe.granularity or 4 * like.model.width / (like.moe.expert_width or 1)
    return {**like.moe.model_dump(mode="json"), "granularity": granularity, "expert_width": None}
