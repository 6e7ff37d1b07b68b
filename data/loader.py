"""Training samples in an order that is fixed before anything runs, and held-out windows with their bytes.

Sample i is the same for every budget, batch size and layout, on every rank, because it follows from (data, weights,
seq, seed) alone. Megatron's GPTDataset shuffles one epoch of a domain's documents and samples; the next epoch is
another GPTDataset with another seed. (Asking GPTDataset for several epochs at once would shuffle them together, so
that a short run meets some documents twice and others never.) With several domains Megatron's blending says which
domain gives sample i. So an order is never cut differently by asking for more of it.

Each rank builds the order of an epoch in its memory when it first reads from it, without a collective: Megatron's
own builder has rank 0 build and the others wait at a barrier.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..base.errors import UserError
from .config import DataConfig
from .prepare import Part, PreparedData
from .tokenizer import Tokenizer
from .windows import Windows

_EPOCHS_KEPT = 2  # a batch may reach from one epoch into the next


class TrainStream:
    """The first ``config.samples`` training samples of a fixed order.

    Args:
        prepared: the tokens.
        config: its ``weights`` (default: by tokens) and ``samples``.
        seq: tokens in a sample.
        seed: another seed is another order.

    Raises:
        UserError: a domain has fewer than seq + 1 training tokens.
    """

    def __init__(self, prepared: PreparedData, config: DataConfig, seq: int, seed: int) -> None:
        self.seq = seq
        self._samples = config.samples
        parts = {name: prepared.part(name, "train") for name in sorted(config.domains)}
        weights = {name: config.weights.get(name, part.tokens) for name, part in parts.items() if part is not None}
        self._domains = [
            _Domain(name, part, prepared.tokenizer, seq, seed)
            for name, part in parts.items()
            if part is not None and weights[name] > 0
        ]
        chosen = np.array([weights[domain.name] for domain in self._domains], dtype=np.float64)
        self._domain_of, self._sample_of = _blend(chosen / chosen.sum(), config.samples)

    def __len__(self) -> int:
        return self._samples

    def samples(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples by their place in the order.

        Ends of documents are predicted like other tokens, and attention crosses them, as in Megatron's default.

        Returns:
            tokens_BS and labels_BS (int64; labels are tokens moved by one) and mask_BS (float32, all ones).

        Raises:
            UserError: an index is beyond ``data.samples``.
        """
        text = np.empty((len(indices), self.seq + 1), dtype=np.int64)
        for row, index in zip(text, indices, strict=True):
            if not 0 <= index < self._samples:
                raise UserError(
                    f"data.samples ({self._samples}): training reads sample {index}; raise data.samples above it, "
                    "which leaves the order of the samples before it as it is"
                )
            self._domains[self._domain_of[index]].read(int(self._sample_of[index]), row)
        text_BS1 = torch.from_numpy(text)
        return text_BS1[:, :-1].contiguous(), text_BS1[:, 1:].contiguous(), torch.ones(len(indices), self.seq)


class _Domain:
    """One domain's samples, epoch after epoch."""

    def __init__(self, name: str, part: Part, tokenizer: Tokenizer, seq: int, seed: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.name = name
        self._part, self._tokenizer, self._seq, self._seed = part, tokenizer, seq, seed
        self._sequences = IndexedDataset(part.prefix)
        self._per_epoch = (part.tokens - 1) // seq
        if self._per_epoch < 1:
            raise UserError(
                f"data.domains.{name}: its {part.tokens} training tokens are fewer than training.seq ({seq}) + 1"
            )
        self._epochs: dict[int, Any] = {}

    def read(self, sample: int, row: np.ndarray) -> None:
        """Write the ``sample``-th sample into ``row`` [seq + 1].

        GPTDataset's own ``__getitem__`` would build masks and positions for it: three times the work.
        """
        epoch, within = divmod(sample, self._per_epoch)
        row[:] = self._epoch(epoch)._query_document_sample_shuffle_indices(within)[0]

    def _epoch(self, number: int) -> Any:
        if number not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[number] = gpt_dataset(
                self._sequences, self._part, self._tokenizer, self._seq, _epoch_seed(self._seed, number)
            )
        return self._epochs[number]


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def gpt_dataset(sequences: Any, part: Part, tokenizer: Tokenizer, seq: int, seed: int) -> Any:
    """One epoch of a part as Megatron's ``GPTDataset``, its order held in memory.

    A configuration without a blend is one that GPTDataset does not write index files for.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    with _without_notices("megatron.core.datasets"):
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return GPTDataset(sequences, part.prefix, part.order, None, Split.train, config)


@contextlib.contextmanager
def _without_notices(name: str) -> Iterator[None]:
    """Megatron warns of indices that are not saved; here that is meant."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _blend(weights: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """[samples] which domain gives each sample, and [samples] which of that domain's samples it is.

    Megatron's greedy rule: always the domain that lags most behind its weight, so a longer blend starts with the
    shorter one.
    """
    domain_of = np.zeros(samples, dtype=np.int16)
    if len(weights) == 1:
        return domain_of, np.arange(samples)
    from megatron.core.datasets.helpers_cpp import build_blending_indices

    sample_of = np.zeros(samples, dtype=np.int64)
    build_blending_indices(domain_of, sample_of, weights, len(weights), samples, False)
    return domain_of, sample_of


@dataclass(frozen=True)
class HeldOut(Windows):
    """Windows over held-out documents.

    ``n_bytes`` is the UTF-8 bytes that the counted labels stand for, so ``loss_sum / ln 2 / n_bytes`` is bits per byte.
    ``n_tokens`` counts them; ends of documents are among them and stand for no byte: a model pays for telling where a
    document ends.
    """

    n_bytes: int
    n_tokens: int


def held_out_sequences(prepared: PreparedData, domain: str, seq: int, limit: int) -> HeldOut:
    """At most ``limit`` windows of ``seq`` tokens, spread evenly over a domain's held-out documents.

    The documents stand one after the other in the order of their hash; windows lie next to each other without
    overlap and may cross documents; of more than ``limit`` every n-th is taken, so that a few large documents do not
    stand for all. Each token but the very first is a label of one window; the last is padded with masked ends of
    documents.

    Raises:
        UserError: the domain has no held-out documents.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    part = prepared.held_out(domain)
    if part is None or part.tokens < 2:
        raise UserError(
            f"eval.domains ({domain}): the prepared data holds nothing out for it; set data.held_out above 0"
        )
    sequences = IndexedDataset(part.prefix)
    ends = np.cumsum(sequences.sequence_lengths[part.order].astype(np.int64))
    windows = -(-(int(ends[-1]) - 1) // seq)
    chosen = np.arange(min(windows, limit)) * windows // min(windows, limit)
    text_NS = np.full((len(chosen), seq + 1), prepared.tokenizer.eod, dtype=np.int64)
    counted_NS = np.zeros((len(chosen), seq), dtype=bool)
    for row, window in enumerate(chosen):
        tokens = _span(sequences, part.order, ends, int(window) * seq, seq + 1)
        text_NS[row, : len(tokens)] = tokens
        counted_NS[row, : len(tokens) - 1] = True
    labels_NS = text_NS[:, 1:]
    return HeldOut(
        tokens_NS=torch.from_numpy(text_NS[:, :-1].copy()),
        labels_NS=torch.from_numpy(labels_NS.copy()),
        mask_NS=torch.from_numpy(counted_NS).float(),
        n_bytes=int(prepared.tokenizer.piece_sizes[labels_NS[counted_NS]].sum()),
        n_tokens=int(counted_NS.sum()),
    )


def _span(sequences: Any, order: np.ndarray, ends: np.ndarray, first: int, count: int) -> np.ndarray:
    """Up to ``count`` tokens from place ``first`` of the documents ``order`` laid end to end; ``ends`` [documents]."""
    found: list[np.ndarray] = []
    document = int(np.searchsorted(ends, first, side="right"))
    while count > 0 and document < len(order):
        begin = first - (int(ends[document - 1]) if document else 0)
        tokens = sequences.get(order[document])[begin : begin + count]
        found.append(tokens)
        first, count, document = first + len(tokens), count - len(tokens), document + 1
    return np.concatenate(found)
