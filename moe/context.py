"""What routing may depend on besides hidden states, and how it reaches the layers of a model.

Megatron's layers pass hidden states alone, so the context of a micro-batch is put beside the mixture layers before
its forward pass. With recomputation a layer runs twice for each micro-batch, the second time in the backward pass,
when other micro-batches may have gone forward in between (1F1B): `ContextQueue` gives both passes the same context.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingContext:
    """A micro-batch as hashed, jittered and forced routing see it.

    Attributes:
        token_ids_BS: tokens of the whole sequences, int64, also where sequence parallelism spreads them over ranks.
        sample_B: number of each sequence in the order of the data, int64: the same in every layout.
        step: optimizer steps done.
        seed: of the run.
    """

    token_ids_BS: Tensor | None = None
    sample_B: Tensor | None = None
    step: int = 0
    seed: int = 0


class ContextQueue:
    """The contexts of one layer.

    Of the two passes of a recomputation the first has no gradients; its context waits for the second. Micro-batches go
    backward in the order in which they went forward. Other passes, such as evaluation's, leave nothing behind.
    """

    def __init__(self) -> None:
        self._now: RoutingContext | None = None
        self._waiting: deque[RoutingContext | None] = deque()

    def begin(self, context: RoutingContext) -> None:
        """The forward passes that follow are of this micro-batch."""
        self._now = context

    def take(self, recomputed: bool) -> RoutingContext | None:
        """The context of the pass that is running; None where nobody gives contexts.

        Args:
            recomputed: whether it is one of a recomputation's two passes.
        """
        if recomputed and torch.is_grad_enabled():
            return self._waiting.popleft()
        if recomputed:
            self._waiting.append(self._now)
        return self._now

    def end(self) -> None:
        """All micro-batches have gone forward and backward.

        Raises:
            RuntimeError: a pass was not recomputed, so contexts and micro-batches no longer match.
        """
        self._now = None
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} forward passes were announced as recomputed later and were not")
