"""The floor: the matrix products of a training step and nothing else, into buffers that exist already."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Product:
    """``count`` times ``batch`` independent products ``[m, k] @ [k, n]`` of the forward pass."""

    batch: int
    m: int
    k: int
    n: int
    count: int

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return 3 * 2 * self.batch * self.m * self.k * self.n * self.count


def products(case: Case) -> list[Product]:
    """Every product of a step, as models/counts.py counts them; experts have equally many rows."""
    tokens, width, layers = case.tokens, case.width, case.layers
    sequences, head = case.batch * case.heads, width // case.heads
    found = [
        Product(1, tokens, width, 3 * width, layers),
        Product(sequences, case.seq, head, case.seq, layers),
        Product(sequences, case.seq, case.seq, head, layers),
        Product(1, tokens, width, width, layers),
        Product(1, tokens, width, case.vocab, 1),
    ]
    if not case.experts:
        return [*found, Product(1, tokens, width, 2 * case.ffn, layers), Product(1, tokens, case.ffn, width, layers)]
    rows = tokens * case.active // case.experts
    return [
        *found,
        Product(1, tokens, width, case.experts, layers),
        Product(case.experts, rows, width, 2 * case.expert_width, layers),
        Product(case.experts, rows, case.expert_width, width, layers),
    ]


class _Operands:
    """One product with its gradients: ``y = x w^T``, ``dx = y w``, ``dw = y^T x``, weights stored outputs first."""

    def __init__(self, product: Product, dtype: torch.dtype, device: torch.device):
        def filled(rows: int, columns: int) -> Tensor:
            whole = torch.randn(product.batch, rows, columns, device=device).div_(columns**0.5).to(dtype)
            return whole.squeeze(0)

        self.x, self.dx = filled(product.m, product.k), filled(product.m, product.k)
        self.w, self.dw = filled(product.n, product.k), filled(product.n, product.k)
        self.y = filled(product.m, product.n)
        self._product = torch.mm if product.batch == 1 else torch.bmm

    def multiply(self) -> None:
        self._product(self.x, self.w.mT, out=self.y)
        self._product(self.y, self.w, out=self.dx)
        self._product(self.y.mT, self.x, out=self.dw)


class Floor:
    """A `Stepper` over the products of a case."""

    def __init__(self, case: Mapping[str, Any], data: Mapping[str, Any]):
        shape = Case(**case)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self._operands = [
            _Operands(product, DTYPES[shape.dtype], device) for product in products(shape) for _ in range(product.count)
        ]

    def warm_up(self) -> str:
        for _ in range(3):
            self.step()
        return "matrix products alone"

    def step(self) -> None:
        for operands in self._operands:
            operands.multiply()

    def close(self) -> None:
        pass
