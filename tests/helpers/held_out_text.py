"""What is held out of prepared data, read without the loader."""

from moescale.data import PreparedData
from moescale.data.indexed import open_indexed


def stream_of(prepared: PreparedData, domain: str) -> list[int]:
    """All held-out tokens of a domain, one document after the other."""
    part = prepared.part(domain, "held_out")
    sequences = open_indexed(domain, part.prefix)
    return [token for row in part.order for token in sequences.get(row).tolist()]


def documents_of(prepared: PreparedData, domain: str) -> list[str]:
    """The texts of a domain's held-out documents."""
    texts: list[list[int]] = [[]]
    for token in stream_of(prepared, domain):
        if token == prepared.tokenizer.eod:
            texts.append([])
        else:
            texts[-1].append(token)
    return [prepared.tokenizer.decode(tokens) for tokens in texts]
