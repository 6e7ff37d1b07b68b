"""Forward and backward passes through Megatron's schedules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..models.build import GPT, Stage
from ..moe.context import RoutingContext
from .batches import MicroBatch


class Passes:
    """Runs micro-batches through this rank's part of the model.

    Args:
        stage: chunks that take turns (interleaved 1F1B) where there are several.
        seq: tokens in a sequence.
        seed: of the run, for routing that is random.
    """

    def __init__(self, stage: Stage, seq: int, seed: int):
        self.stage = stage
        self.seq = seq
        self.seed = seed
        self._contexts = {gpt: [mixture.contexts for _, mixture in Stage([gpt]).mixtures()] for gpt in stage}
        self._schedule = get_forward_backward_func()
        self._position_1S = torch.arange(seq, device=next(stage.parameters()).device).unsqueeze(0)

    def train(self, micro_batches: Sequence[MicroBatch], denominator: float) -> Tensor:
        """Accumulate gradients of mean over micro-batches of (summed token loss / denominator).

        Returns:
            Summed token loss of this rank's micro-batches, float32 scalar; 0 except on the last pipeline stage.
        """
        if not self.stage.training:  # setting it walks over every module
            self.stage.train()
        sums = self._run(micro_batches, denominator, forward_only=False)
        return torch.stack(sums).sum() if sums else self._nothing()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Summed token loss without gradients, float64 scalar; 0 except on the last pipeline stage."""
        self.stage.eval()
        sums = self._run(micro_batches, 1.0, forward_only=True)
        return torch.stack(sums).double().sum() if sums else self._nothing().double()

    @torch.no_grad()
    def evaluate_sequences(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """Summed token loss of each sequence without gradients, float64 [micro-batches * mb]; None but on the last
        pipeline stage.
        """
        self.stage.eval()
        sums = self._run(micro_batches, 1.0, forward_only=True, told=lambda loss_BS: loss_BS.double().sum(dim=1))
        return torch.cat(sums) if sums else None

    def _nothing(self) -> Tensor:
        return torch.zeros((), device=self._position_1S.device)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        denominator: float,
        forward_only: bool,
        told: Callable[[Tensor], Tensor] = torch.sum,
    ) -> list[Tensor]:
        """What ``told`` makes of each micro-batch's token losses [mb, S]; nothing except on the last pipeline stage."""

        def forward_step(iterator: Any, model: GPT) -> tuple[Tensor, Any]:
            micro: MicroBatch = next(iterator)
            context = RoutingContext(micro.tokens, micro.samples, micro.step, self.seed)
            for contexts in self._contexts[model]:
                contexts.begin(context)
            position = self._position_1S.expand(micro.tokens.shape[0], -1)
            output = model(micro.tokens, position, None, labels=micro.labels)

            def loss_of(token_loss_BS: Tensor) -> tuple[Tensor, Tensor]:
                counted_BS = token_loss_BS.float() * micro.mask
                return counted_BS.sum() / denominator, told(counted_BS.detach())

            return output, loss_of

        sums = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.stage],
            model=list(self.stage),
            num_microbatches=len(micro_batches),
            seq_length=self.seq,
            micro_batch_size=micro_batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        for contexts in self._contexts.values():
            for queue in contexts:
                queue.end()
        return sums
