"""Routers: which experts a token visits, and with which weights."""

from ..config import MoEConfig
from .base import Router, ScoredRouter
from .expert_choice import ExpertChoiceRouter
from .forced import ForcedRouter
from .hashed import HashRouter
from .sinkhorn import SinkhornRouter
from .topk import TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "ForcedRouter",
    "HashRouter",
    "Router",
    "ScoredRouter",
    "SinkhornRouter",
    "TopKRouter",
    "build_router",
]

_SCORED: dict[str, type[ScoredRouter]] = {
    "topk": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
}
_UNSCORED: dict[str, type[Router]] = {"hash": HashRouter, "forced": ForcedRouter}


def build_router(width: int, config: MoEConfig, layer: int) -> Router:
    """The router that ``config`` asks for, its parameters not yet drawn.

    Args:
        width: model width D.
        layer: number of the layer in the model, from 0.
    """
    if config.router in _UNSCORED:
        return _UNSCORED[config.router](config, layer)
    return _SCORED[config.router](width, config, layer)
