"""The mixture layer and its parts. Importing this needs torch and pydantic, and neither Megatron nor DeepSpeed."""

from .config import MoEConfig
from .layer import MoELayer, MoEOutput

__all__ = ["MoEConfig", "MoELayer", "MoEOutput"]
