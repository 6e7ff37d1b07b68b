"""Initial parameters that do not depend on the layout.

Every logical tensor is drawn in blocks of rows, each from its own generator keyed by (seed, name, block): a rank
draws just the blocks that its boxes touch and gets the same numbers as any other layout would.
"""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch

from .config import ModelConfig
from .names import Entry, Piece

BLOCK_ROWS = 128


def draw_box(seed: int, piece: Piece, std: float) -> torch.Tensor:
    """The box ``piece`` of its logical matrix, entries N(0, std^2), float32."""
    rows, columns = piece.shape
    first, count = piece.start[0], piece.extent[0]
    blocks = []
    for block in range(first // BLOCK_ROWS, (first + count - 1) // BLOCK_ROWS + 1):
        height = min(BLOCK_ROWS, rows - block * BLOCK_ROWS)
        key = hashlib.blake2b(f"{seed}/{piece.name}/{block}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        blocks.append(generator.standard_normal((height, columns), dtype=np.float32))
    skip = first - first // BLOCK_ROWS * BLOCK_ROWS
    drawn = np.concatenate(blocks)[skip : skip + count, piece.start[1] : piece.start[1] + piece.extent[1]]
    return torch.from_numpy(np.ascontiguousarray(drawn)) * std


def initialise(entries: Iterable[Entry], model: ModelConfig, seed: int) -> None:
    """Fill every parameter: norm gains with 1, biases with 0, matrices with N(0, std^2).

    std is ``model.init_std`` or 1 / sqrt(fan-in); products that write to the residual stream (o, down) are scaled
    by 1 / sqrt(2 layers) as in GPT-2 (Radford et al. 2019, section 2.3).
    """
    with torch.no_grad():
        for entry in entries:
            for piece in entry.pieces:
                if not entry.role.decay:
                    value = 0.0 if piece.name.endswith("_bias") else 1.0
                    piece.write(entry.parameter, torch.full(piece.extent, value))
                else:
                    piece.write(entry.parameter, draw_box(seed, piece, _std(piece, model)))


def _std(piece: Piece, model: ModelConfig) -> float:
    std = model.init_std if model.init_std is not None else 1 / math.sqrt(piece.shape[1])
    writes_residual = piece.name.endswith((".o", ".down"))
    return std / math.sqrt(2 * model.layers) if writes_residual else std
