import pytest
import torch
from held_out_text import stream_of

from moescale.base.errors import UserError
from moescale.data import PreparedData
from moescale.data.loader import held_out_sequences

SEQ = 16


@pytest.mark.parametrize("domain", ["files", "rows", "apart"])
def test_every_byte_but_the_first_tokens_is_counted_once(prepared: PreparedData, domain: str) -> None:
    everything = held_out_sequences(prepared, domain, SEQ, 10**6)
    stream = stream_of(prepared, domain)
    first = len(prepared.tokenizer.pieces[stream[0]])
    assert first > 0
    assert everything.n_bytes == prepared.part(domain, "held_out").bytes - first
    assert everything.n_tokens == len(stream) - 1 == int(everything.mask_NS.sum())
    assert everything.labels_NS[everything.mask_NS.bool()].tolist() == stream[1:]
    assert everything.tokens_NS[everything.mask_NS.bool()].tolist() == stream[:-1]


def test_windows_follow_each_other_and_bytes_add_up(prepared: PreparedData) -> None:
    everything = held_out_sequences(prepared, "apart", SEQ, 10**6)
    pieces = prepared.tokenizer.pieces
    for limit in (1, 5, 20):
        some = held_out_sequences(prepared, "apart", SEQ, limit)
        assert some.tokens_NS.shape == some.labels_NS.shape == some.mask_NS.shape == (limit, SEQ)
        spread = torch.arange(limit) * len(everything.tokens_NS) // limit
        assert torch.equal(some.tokens_NS, everything.tokens_NS[spread])
        assert torch.equal(some.labels_NS, everything.labels_NS[spread])
        assert some.mask_NS.all()
        assert some.n_tokens == limit * SEQ
        assert some.n_bytes == sum(len(pieces[token]) for token in some.labels_NS.flatten())
    assert torch.equal(everything.tokens_NS[:-1, 0][1:], everything.labels_NS[:-2, -1])
    assert (everything.tokens_NS.dtype, everything.mask_NS.dtype) == (torch.int64, torch.float32)


def test_bits_per_byte_of_a_uniform_model(prepared: PreparedData) -> None:
    """A model that knows nothing spends log2(vocabulary) bits on each token."""
    found = held_out_sequences(prepared, "rows", SEQ, 10)
    logits = torch.zeros(found.labels_NS.numel(), prepared.vocab_size)
    loss_sum = torch.nn.functional.cross_entropy(logits, found.labels_NS.flatten(), reduction="sum")
    bits_per_byte = loss_sum / torch.log(torch.tensor(2.0)) / found.n_bytes
    expected = torch.log2(torch.tensor(float(prepared.vocab_size))) * found.n_tokens / found.n_bytes
    assert bits_per_byte.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_window_longer_than_everything_is_padded(prepared: PreparedData) -> None:
    found = held_out_sequences(prepared, "apart", 50_000, 3)
    assert found.tokens_NS.shape == (1, 50_000)
    assert found.n_tokens == prepared.part("apart", "held_out").tokens - 1 == int(found.mask_NS.sum())


def test_a_domain_without_held_out_documents_is_refused(prepared: PreparedData) -> None:
    with pytest.raises(UserError, match=r"eval\.domains \(elsewhere\): the prepared data holds nothing out"):
        held_out_sequences(prepared, "elsewhere", SEQ, 3)
