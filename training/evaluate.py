"""Loss and bits per byte on held-out text, the same in every layout: sums over sequences, dealt out to data ranks."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..data.loader import HeldOut
from ..data.windows import Windows
from ..parallel.groups import Groups
from .batches import MicroBatch
from .passes import Passes

TOKENS_AT_ONCE = 4096  # of a rank; evaluation keeps no activations, so it can take larger micro-batches


@dataclass(frozen=True)
class Score:
    """Evaluation of some held-out text: sums, from which the means follow."""

    loss_sum: float
    n_tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the text that was predicted: comparable between tokenizers and domains."""
        return self.loss_sum / math.log(2) / self.n_bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(self.loss_sum + other.loss_sum, self.n_tokens + other.n_tokens, self.n_bytes + other.n_bytes)


def evaluate(passes: Passes, groups: Groups, held_out: HeldOut, seq: int) -> Score:
    """Score ``held_out``; every rank of the world must call it."""
    batches = dealt(held_out, groups, seq)
    total = passes.evaluate(batches)
    topology = groups.topology
    if topology.tensor_rank(groups.rank) != 0:
        total = torch.zeros_like(total)  # tensor ranks compute the same loss: count it once
    if topology.world > 1:
        dist.all_reduce(total)
    return Score(total.item(), held_out.n_tokens, held_out.n_bytes)


def dealt(windows: Windows, groups: Groups, seq: int) -> list[MicroBatch]:
    """This data rank's windows in micro-batches of one size, as many on every rank, padded with masked ones.

    Their ``samples`` are the numbers of the windows, from their number on for padding.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    data, rank = groups.topology.data, groups.topology.data_rank(groups.rank)
    count = windows.tokens_NS.shape[0]
    at_once = min(max(TOKENS_AT_ONCE // seq, 1), -(-count // data))
    together = at_once * data * groups.topology.rounds
    rounds = -(-count // together) * groups.topology.rounds
    batches = []
    for number in range(rounds):
        first = (number * data + rank) * at_once
        wanted = torch.arange(first, first + at_once)
        inside = (wanted < count).float().unsqueeze(-1)
        index = wanted.clamp(max=count - 1)
        batches.append(
            MicroBatch(
                windows.tokens_NS[index].to(device),
                windows.labels_NS[index].to(device),
                (windows.mask_NS[index] * inside).to(device),
                wanted.to(device),
                step=0,
            )
        )
    return batches
