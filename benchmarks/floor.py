"""The floor: the matrix products of a step and nothing else, into buffers that exist already where that is faster."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import Case
from .device import DEVICE
from .fastest import fastest
from .layer_cases import LayerCase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Product:
    """``count`` times ``batch`` independent products ``[m, k] @ [k, n]`` of the forward pass.

    ``experts``: of which each is an expert's. ``router``: the router's, in fp32 whatever the model's dtype.
    """

    batch: int
    m: int
    k: int
    n: int
    count: int
    experts: bool = False
    router: bool = False

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return 3 * 2 * self.batch * self.m * self.k * self.n * self.count


def mixture_products(
    tokens: int, width: int, experts: int, active: int, expert_width: int, layers: int
) -> list[Product]:
    """Router and experts of ``layers`` mixtures; experts have equally many rows."""
    rows = tokens * active // experts
    return [
        Product(1, tokens, width, experts, layers, router=True),
        Product(experts, rows, width, 2 * expert_width, layers, experts=True),
        Product(experts, rows, expert_width, width, layers, experts=True),
    ]


def products(case: Case) -> list[Product]:
    """Every product of a training step, as models/counts.py counts them."""
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
    return [*found, *mixture_products(tokens, width, case.experts, case.active, case.expert_width, layers)]


class _Operands:
    """One product with its gradients: ``y = x w^T``, ``dx = y w``, ``dw = y^T x``, weights stored outputs first."""

    def __init__(self, product: Product, dtype: torch.dtype):
        def filled(rows: int, columns: int) -> Tensor:
            return torch.randn(product.batch, rows, columns, device=DEVICE).div_(columns**0.5).to(dtype)

        self.x, self.dx = filled(product.m, product.k), filled(product.m, product.k)
        self.w, self.dw = filled(product.n, product.k), filled(product.n, product.k)
        self.y = filled(product.m, product.n)
        self.ends = torch.arange(product.m, product.batch * product.m + 1, product.m, dtype=torch.int32, device=DEVICE)
        self.way = "bmm" if product.batch > 1 else "mm"
        # Not bmm for experts: it needs as many rows for each, and no router gives them that.
        self.ways = ("mm", "grouped_mm") if product.experts else (self.way,)

    def multiply(self, way: str | None = None) -> None:
        """Forward and backward by one of ``ways``, by default the one chosen."""
        {"mm": self._one_by_one, "bmm": self._batched, "grouped_mm": self._grouped}[way or self.way]()

    def _one_by_one(self) -> None:
        for x, w, y, dx, dw in zip(self.x, self.w, self.y, self.dx, self.dw, strict=True):
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=dx)
            torch.mm(y.t(), x, out=dw)

    def _batched(self) -> None:
        torch.bmm(self.x, self.w.mT, out=self.y)
        torch.bmm(self.y, self.w, out=self.dx)
        torch.bmm(self.y.mT, self.x, out=self.dw)

    def _grouped(self) -> None:
        """torch has none that writes into a given buffer."""
        x = self.x.flatten(0, 1)
        y = F.grouped_mm(x, self.w.mT, offs=self.ends)
        self.y, self.dx = y.view_as(self.y), F.grouped_mm(y, self.w, offs=self.ends).view_as(self.dx)
        self.dw = F.grouped_mm(y.t(), x, offs=self.ends)


class _Products:
    """A `Stepper` over products."""

    bytes_moved = None

    def __init__(self, found: Iterable[Product], dtype: str):
        self.operands = [
            [_Operands(each, torch.float32 if each.router else DTYPES[dtype]) for _ in range(each.count)]
            for each in found
        ]

    def warm_up(self) -> str:
        notes = ["matrix products alone"]
        for alike in self.operands:
            if len(alike[0].ways) > 1:
                way, tried = fastest(alike[0].ways, alike[0].multiply)
                notes.append(f"experts {alike[0].x.shape[-1]} to {alike[0].y.shape[-1]} by {way} ({tried})")
                for operands in alike:
                    operands.way = way
        self.step()
        return "; ".join(notes)

    def step(self) -> None:
        for alike in self.operands:
            for operands in alike:
                operands.multiply()

    def close(self) -> None:
        pass


class Floor(_Products):
    """The products of a training step."""

    def __init__(self, case: Mapping[str, Any], data: Mapping[str, Any]):
        shape = Case(**case)
        super().__init__(products(shape), shape.dtype)


class LayerFloor(_Products):
    """The products of a mixture layer."""

    def __init__(self, case: Mapping[str, Any]):
        shape = LayerCase(**case)
        super().__init__(
            mixture_products(shape.tokens, shape.width, shape.experts, shape.active, shape.expert_width, layers=1),
            shape.dtype,
        )
