"""Which rank computes which samples of a step, and the micro-batches themselves.

Samples have global numbers; step s (from 0) uses ``[s B, (s + 1) B)``. Micro-batch m of data rank r holds the
samples ``s B + (m DP + r) mb + [0, mb)``, so any prefix of micro-batches over all ranks is a prefix of the batch: the
small batches of the noise scale are the same samples in every layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.loader import TrainStream
from ..parallel.groups import Groups


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that a rank computes at once, on the device.

    Attributes:
        tokens, labels: int64 ``[mb, S]``.
        mask: float32 ``[mb, S]``, one where the label counts.
        samples: global number of each sequence, int64 ``[mb]``.
        step: optimizer steps done; 0 in evaluation.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    samples: Tensor
    step: int


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of a step.

    ``denominator`` is the global number of real tokens over (DP x micro-batches): dividing each micro-batch's summed
    loss by it makes the schedule's mean over micro-batches and the engine's mean over ranks the mean over tokens.
    """

    micro_batches: list[MicroBatch]
    real_tokens: float
    denominator: float


class Batches:
    """Cuts the fixed order of samples into this rank's micro-batches."""

    def __init__(self, stream: TrainStream, groups: Groups, batch: int):
        self.stream, self.groups, self.batch = stream, groups, batch
        self.data = groups.topology.data
        self.device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")

    def samples_of(self, step: int, number: int, micro_batch: int) -> range:
        """Global sample numbers of this rank's ``number``-th micro-batch."""
        rank = self.groups.topology.data_rank(self.groups.rank)
        first = step * self.batch + (number * self.data + rank) * micro_batch
        return range(first, first + micro_batch)

    def step(self, step: int, micro_batch: int) -> StepBatch:
        """Everything that this rank computes in step ``step`` (from 0), ``micro_batch`` sequences at a time."""
        micro_batches = []
        count = self.batch // (micro_batch * self.data)
        for number in range(count):
            samples = self.samples_of(step, number, micro_batch)
            tokens, labels, mask = (tensor.to(self.device) for tensor in self.stream.samples(samples))
            numbers = torch.arange(samples.start, samples.stop, device=self.device)
            micro_batches.append(MicroBatch(tokens, labels, mask, numbers, step))
        real = torch.stack([m.mask.sum() for m in micro_batches]).sum().double()
        if self.data > 1:
            dist.all_reduce(real, group=self.groups.data)
        total = real.item()
        return StepBatch(micro_batches, total, max(total, 1.0) / (self.data * count))


def small_batches(batch: StepBatch, parts: int) -> Iterator[list[MicroBatch]]:
    """The step's micro-batches in ``parts`` equal runs."""
    length = len(batch.micro_batches) // parts
    for first in range(0, len(batch.micro_batches), length):
        yield batch.micro_batches[first : first + length]
