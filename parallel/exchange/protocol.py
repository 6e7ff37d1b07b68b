"""What a token exchange is, between the ranks that share out a layer's experts.

An `Exchange` moves rows of tokens to the ranks of an expert-parallel group and back. Its `size` says over how many
ranks the experts are spread; on one rank nothing moves.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class Exchange(Protocol):
    """Ragged all-to-all over an expert-parallel group, differentiable in the rows."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""

    def counts(self, sent_PE: Tensor) -> Tensor:
        """Tell every rank how many rows come: ``[P, El]`` rows for each peer's experts -> rows from each peer."""

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send ``sent[p]`` consecutive rows to peer p; returns the rows received, by peer."""

    def close(self) -> None:
        """Give back what the exchange holds besides its group."""


@runtime_checkable
class GatheringExchange(Exchange, Protocol):
    """An exchange that takes rows from where they are, so that nobody has to lay them out by peer first."""

    def gathered(
        self, rows_RD: Tensor, visit_R: Tensor, active: int, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        """As ``rows``, but of the rows ``visit_R // active``, with zeros where visit_R is -1; without a gradient."""


class LocalExchange:
    """All experts on this rank."""

    size = 1
    rank = 0

    def counts(self, sent_PE: Tensor) -> Tensor:
        return sent_PE

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return rows_RD

    def close(self) -> None:
        pass
