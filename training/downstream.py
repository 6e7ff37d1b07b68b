"""Downstream tasks: the log-likelihood of every choice, by the passes of evaluation and so the same in every layout."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ..data.choices import Choices
from ..parallel.groups import Groups
from .evaluate import Score, dealt
from .passes import Passes


@dataclass(frozen=True)
class Answers:
    """How a model answers a task.

    Attributes:
        choices: what was asked.
        loss_N: summed loss of each choice given its context, nats: minus its log-likelihood.
    """

    choices: Choices
    loss_N: np.ndarray

    @property
    def right(self) -> int:
        """Questions whose answer has the largest log-likelihood a character (``acc_norm`` of lm-evaluation-harness)."""
        return self._right(self.loss_N / self.choices.lengths_N)

    @property
    def right_raw(self) -> int:
        """Questions whose answer has the largest log-likelihood (``acc`` of lm-evaluation-harness)."""
        return self._right(self.loss_N)

    @property
    def of_right_choices(self) -> Score:
        """Loss of the right choices alone, given their contexts."""
        choices = self.choices
        return Score(float(self.loss_N[choices.right_Q].sum()), choices.n_tokens, choices.n_bytes)

    def _right(self, loss_N: np.ndarray) -> int:
        """Among equals the first choice counts as chosen."""
        best_N = np.lexsort((np.arange(len(loss_N)), loss_N, self.choices.question_N))
        firsts_Q = np.flatnonzero(np.diff(self.choices.question_N, prepend=-1))
        return int((best_N[firsts_Q] == self.choices.right_Q).sum())


def answer(passes: Passes, groups: Groups, choices: Choices, seq: int) -> Answers:
    """Ask ``choices``; every rank of the world must call it."""
    batches = dealt(choices, groups, seq)
    losses = passes.evaluate_sequences(batches)
    count = choices.tokens_NS.shape[0]
    loss_N = torch.zeros(count, dtype=torch.float64, device=batches[0].tokens.device)
    if losses is not None and groups.topology.tensor_rank(groups.rank) == 0:  # tensor ranks compute the same losses
        rows = torch.cat([batch.samples for batch in batches])
        asked = rows < count  # the others are padding
        loss_N[rows[asked]] = losses[asked]
    if groups.topology.world > 1:
        dist.all_reduce(loss_N)
    return Answers(choices, loss_N.cpu().numpy())
