"""The mixture layer and its parts. The layer needs torch, and neither Megatron nor DeepSpeed; its section of a run
file needs none of them, so that planning a study does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from .config import MoEConfig

if TYPE_CHECKING:
    from .context import RoutingContext
    from .layer import MoELayer, MoEOutput

__all__ = ["MoEConfig", "MoELayer", "MoEOutput", "RoutingContext"]


def __getattr__(name: str) -> Any:
    if name in ("MoELayer", "MoEOutput"):
        from . import layer

        return getattr(layer, name)
    if name == "RoutingContext":
        from .context import RoutingContext

        return RoutingContext
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
