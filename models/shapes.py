"""The ladder of model shapes, from 8 thousand to 200 billion non-embedding parameters.

Small rungs follow what two CPU cores can train in minutes; from 125M on they follow the shapes that GPT-3
(Brown et al. 2020, table 2.1) made common, with grouped-query attention from 7B on. Their names are
GPT-3's; a SwiGLU layer four times as wide as the model has a third matrix, so that they hold up to a quarter more.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Depth, width and heads; everything else of a model has defaults that follow from these."""

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None

    def as_keys(self) -> dict[str, Any]:
        """Keys of the ``model`` section."""
        return {key: value for key, value in asdict(self).items() if value is not None}


SHAPES: dict[str, Shape] = {
    "d16": Shape(2, 16, 1),
    "d32": Shape(2, 32, 2),
    "d48": Shape(2, 48, 2),
    "d64": Shape(3, 64, 2),
    "d96": Shape(3, 96, 3),
    "d128": Shape(4, 128, 4),
    "d192": Shape(5, 192, 6),
    "d256": Shape(6, 256, 4),
    "d384": Shape(8, 384, 6),
    "d512": Shape(8, 512, 8),
    "d640": Shape(10, 640, 10),
    "125M": Shape(12, 768, 12),
    "350M": Shape(24, 1024, 16),
    "760M": Shape(24, 1536, 16),
    "1.4B": Shape(24, 2048, 16),
    "2.7B": Shape(32, 2560, 32),
    "7B": Shape(32, 4096, 32, 8),
    "13B": Shape(40, 5120, 40, 8),
    "30B": Shape(48, 7168, 56, 8),
    "70B": Shape(80, 8192, 64, 8),
    "175B": Shape(96, 12288, 96, 8),
}
