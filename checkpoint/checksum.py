"""CRC-32 of bytes and of tensors: the checksum of zip files and of zlib.

Python's own ``zlib.crc32`` takes as long as a disk takes to write; ISA-L's gives the same numbers about ten times as
fast, so that checksums cost next to nothing beside the copies they guard.
"""

import torch
from isal import isal_zlib
from torch import Tensor


def crc32(data: memoryview | bytes, before: int = 0) -> int:
    """Of ``data``, following on what came before."""
    return int(isal_zlib.crc32(data, before))


def crc32_of(tensor: Tensor, before: int = 0) -> int:
    """Of a tensor's bytes, row-major, following on what came before."""
    return crc32(bytes_of(tensor), before)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major: its own memory where it lies so in the host's, else a copy."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
