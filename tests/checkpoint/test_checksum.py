"""Checksums are those of zlib, whatever the tensor's dtype and order in memory."""

import zlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from moescale.checkpoint.checksum import bytes_of, crc32, crc32_of


@given(st.binary(max_size=5000), st.binary(max_size=5000))
def test_bytes_in_parts(one: bytes, other: bytes) -> None:
    assert crc32(one) == zlib.crc32(one)
    assert crc32(memoryview(other), crc32(one)) == zlib.crc32(one + other)


def test_tensors_are_summed_in_row_major_order() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    for other in (tensor, tensor.t(), tensor[1:], tensor[:, ::2], tensor.view(torch.int32), torch.empty(0)):
        assert crc32_of(other) == zlib.crc32(other.contiguous().numpy().tobytes())
    assert crc32_of(tensor.bfloat16()) == zlib.crc32(tensor.bfloat16().view(torch.int16).numpy().tobytes())
    assert crc32_of(tensor[1:], crc32_of(tensor[:1])) == crc32_of(tensor)


def test_bytes_are_not_copied_where_they_lie_in_order() -> None:
    tensor = torch.zeros(4)
    data = bytes_of(tensor[1:])
    tensor.fill_(1)
    assert bytes(data) == b"\x00\x00\x80\x3f" * 3
