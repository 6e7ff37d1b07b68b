"""Matrix products: how long one takes, by its shape."""

import math

from .hardware import Hardware

BYTES = {"bf16": 2, "fp32": 4}


def product_seconds(
    rows: float, columns: float, inner: float, hardware: Hardware, dtype: str, parts: float = 1
) -> float:
    """Seconds of ``parts`` products [rows, inner] x [inner, columns] in one call (a grouped product).

    The slower of arithmetic and memory traffic (the roofline of Williams et al. 2009, 10.1145/1498765.1498785).
    Arithmetic comes in whole tiles, and tiles in whole waves over the device's units (NVIDIA, Matrix Multiplication
    Background User's Guide, "Tile Quantization" and "Wave Quantization"): that makes small experts slow.
    """
    if min(rows, columns, inner, parts) <= 0:
        return 0.0
    tile, size = hardware.tile, BYTES[dtype]
    tiles = parts * math.ceil(rows / tile) * math.ceil(columns / tile)
    computed = math.ceil(tiles / hardware.units) * hardware.units * tile * tile
    arithmetic = 2.0 * computed * inner / (hardware.flops(dtype) * hardware.product_share)
    moved = parts * size * (rows * inner + inner * columns + rows * columns) / hardware.memory
    return max(arithmetic, moved) + hardware.call


def matrix_seconds(
    rows: float, inner: float, outer: float, hardware: Hardware, dtype: str, parts: float = 1
) -> tuple[float, float]:
    """Forward and backward of ``parts`` weights [inner, outer], each over its own ``rows``.

    The backward pass has two products: the gradient of the rows, and that of the weight.
    """
    forward = product_seconds(rows, outer, inner, hardware, dtype, parts)
    backward = product_seconds(rows, inner, outer, hardware, dtype, parts)
    return forward, backward + product_seconds(inner, outer, rows, hardware, dtype, parts)


def attention_seconds(
    tokens: float, seq: int, heads: float, features: int, hardware: Hardware, dtype: str
) -> tuple[float, float]:
    """Forward and backward of causal attention as a fused kernel.

    Args:
        heads: on this rank.
        features: of a head's query and value together: a score and its weighted value take 2 x features FLOPs.

    Half of the square is computed. The backward pass has five products in place of two (FlashAttention-2, 2307.08691,
    section 3.1).
    """
    flops = tokens * seq * heads * features  # 2 FLOPs over half of the positions
    forward = flops / (hardware.flops(dtype) * hardware.attention_share)
    return forward + hardware.call, 2.5 * forward + hardware.call
