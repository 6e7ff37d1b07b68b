"""Whole tensors in shards: block checksums, several files, streaming, dtypes."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moescale.checkpoint import reading, writing
from moescale.checkpoint.shards import BLOCK, BadCheckpoint
from moescale.checkpoint.storage import Checkpoint, Mismatch, write_whole
from moescale.models.names import Piece


def rows_of(name: str, shape: tuple[int, ...], first: int, last: int) -> Piece:
    start, extent = (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    return Piece(name, shape, start, extent, lambda t: t)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_whole_tensors_come_back(tmp_path: Path) -> None:
    """In any of three dtypes, always as float32, which holds each of them exactly."""
    tensors = [
        ("master", "a", draw(7, 5)),
        ("master", "b", draw(6, dtype=torch.bfloat16)),
        ("buffer", "a", draw(3, 4, dtype=torch.float16)),
    ]
    folder = write_whole(tmp_path, 12, iter(tensors), {"from": "elsewhere"})
    assert folder == tmp_path / "step-00000012"
    checkpoint = Checkpoint(folder)
    assert (checkpoint.step, checkpoint.extra) == (12, {"from": "elsewhere"})
    assert checkpoint.tensors("master") == {"a": (7, 5), "b": (6,)}
    assert checkpoint.tensors("buffer") == {"a": (3, 4)}
    assert checkpoint.tensors("exp_avg") == {}
    for part, name, values in tensors:
        found = checkpoint.whole(part, name)
        assert found.dtype == torch.float32
        assert torch.equal(found, values.float())
    with pytest.raises(Mismatch, match="holds no master/c"):
        checkpoint.whole("master", "c")


def test_a_slice_that_does_not_begin_its_storage(tmp_path: Path) -> None:
    whole = draw(6, 4)
    folder = write_whole(tmp_path, 0, [("master", "t", whole.t()), ("master", "part", whole[2:, 1:3])], {})
    assert torch.equal(Checkpoint(folder).whole("master", "t"), whole.t())
    assert torch.equal(Checkpoint(folder).whole("master", "part"), whole[2:, 1:3])


def test_a_tensor_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="master/a is stored more than once: 24 of 12 elements"):
        write_whole(tmp_path, 0, [("master", "a", draw(3, 4)), ("master", "a", draw(3, 4))], {})
    assert not list(tmp_path.iterdir())


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def torn() -> Iterator[tuple[str, str, Tensor]]:
        yield "master", "a", draw(3, 4)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path, 0, torn(), {})
    assert not list(tmp_path.iterdir())


def test_a_damaged_block_spoils_what_lies_in_it(tmp_path: Path) -> None:
    """Rows of other blocks are read; those of this one are refused with the place."""
    row = 1024
    whole = draw(3 * BLOCK // (4 * row) - 100, row)
    folder = write_whole(tmp_path, 0, [("master", "a", whole)], {})
    path = folder / "whole-000.safetensors"
    place = path.stat().st_size - whole.numel() * 4 + BLOCK + 17
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 64]))
    checkpoint = Checkpoint(folder)
    in_a_block = BLOCK // (4 * row)
    for first, last in [(0, in_a_block), (2 * in_a_block, len(whole)), (2 * in_a_block + 5, 2 * in_a_block + 6)]:
        found = checkpoint.box("master", rows_of("a", tuple(whole.shape), first, last))
        assert torch.equal(found, whole[first:last])
    for first, last in [(0, in_a_block + 1), (in_a_block + 3, in_a_block + 4), (2 * in_a_block - 1, len(whole))]:
        with pytest.raises(BadCheckpoint, match=f"bytes {path.stat().st_size - whole.numel() * 4 + BLOCK} and on"):
            checkpoint.box("master", rows_of("a", tuple(whole.shape), first, last))
    with pytest.raises(BadCheckpoint, match="damaged"):
        checkpoint.verify()


@pytest.mark.parametrize("reason", ["size", "header"])
def test_several_files(tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file, or one whose table of contents is full, is followed by another."""
    if reason == "size":
        monkeypatch.setattr(writing, "LARGEST", 1000)
    else:
        monkeypatch.setattr(writing, "HEADER", 600)
        monkeypatch.setattr(reading, "HEADER", 600)
    tensors = {f"layers.{i}": draw(10 + i, 4) for i in range(20)}
    folder = write_whole(tmp_path, 0, (("master", name, values) for name, values in tensors.items()), {})
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert 2 < len(files) < 20
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    for name, values in tensors.items():
        assert torch.equal(checkpoint.whole("master", name), values)
    names = []
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            names += list(opened.keys())
    assert sorted(names) == sorted(f"master/{name}" for name in tensors)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """64 tensors of a megabyte: writing, checking and reading them holds a few blocks."""
    count, rows = 64, 256

    def stream() -> Iterator[tuple[str, str, Tensor]]:
        for number in range(count):
            yield "master", str(number), torch.full((rows, 1024), float(number))

    before = _allocated()
    most = 0

    def watched() -> Iterator[tuple[str, str, Tensor]]:
        nonlocal most
        for one in stream():
            most = max(most, _allocated() - before)
            yield one

    tracemalloc.start()
    folder = write_whole(tmp_path, 0, watched(), {})
    checkpoint = Checkpoint(folder)
    for number in range(count):
        assert checkpoint.whole("master", str(number))[0, 0] == number
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # Python's own buffers
    assert most < 10 * BLOCK  # and torch's


def _allocated() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
