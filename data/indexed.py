"""Megatron's indexed data sets: a ``.bin`` of tokens and an ``.idx`` of where each sequence starts.

megatron.core is imported when it is used, not with this module: its import takes seconds, and on a machine without
CUDA the entry points prepare for it first.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import UserError
from .tokenizer import Tokenizer


def open_indexed(name: str, prefix: str) -> Any:
    """Megatron's ``IndexedDataset`` over an existing pair, memory-mapped.

    Hold on to it while using any array it gives: it unmaps the files when it goes, under arrays that still show them.

    Raises:
        UserError: not such a pair, empty, or cut off.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    bad = f"data.domains.{name}.indexed ({prefix})"
    if not _is_index(Path(f"{prefix}.idx")):
        raise UserError(f"{bad}: {prefix}.idx is not a whole index of a Megatron indexed data set")
    found = Path(f"{prefix}.bin").stat().st_size
    if not found:
        raise UserError(f"{bad}: holds no tokens")
    sequences = IndexedDataset(prefix)
    index = sequences.index
    ends = index.sequence_pointers + index.sequence_lengths.astype(np.int64) * DType.size(index.dtype)
    if found < ends.max(initial=0):
        raise UserError(f"{bad}: {prefix}.bin has {found} bytes, its index needs {ends.max()}: it was cut off")
    return sequences


def _is_index(path: Path) -> bool:
    """Whether the file has the format's header (magic, version, token type, two counts) and the size it implies."""
    header = struct.Struct("<9sQBQQ")
    with path.open("rb") as file:
        start = file.read(header.size)
    if len(start) < header.size:
        return False
    magic, version, _, sequences, documents = header.unpack(start)
    needed = header.size + sequences * (4 + 8) + documents * 8  # a length and a pointer each; the documents' ends
    return magic == b"MMIDIDX\x00\x00" and version == 1 and path.stat().st_size >= needed


class SequenceWriter:
    """Writes documents as sequences of ``prefix.bin``/``.idx``; without any document it leaves no file.

    Args:
        prefix: path without ending.
        tokenizer: gives the width of a token on disk and the end-of-document token.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix = prefix
        self._eod = np.array([tokenizer.eod], dtype=np.int32)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document and its end."""
        self._builder.add_document(np.concatenate([tokens, self._eod]), [len(tokens) + 1])
        self.documents += 1
        self.tokens += len(tokens) + 1

    def finish(self) -> None:
        """Write the index."""
        self._builder.finalize(f"{self._prefix}.idx")
        if not self.documents:
            Path(f"{self._prefix}.bin").unlink()
            Path(f"{self._prefix}.idx").unlink()
