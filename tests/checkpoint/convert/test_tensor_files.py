"""Safetensors files written as a stream, and how much memory a conversion takes."""

import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moescale.checkpoint.shards import BLOCK
from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def _stand_in(one_rank: object) -> None:
    """The package under test imports Megatron."""


@settings(deadline=None, max_examples=50)
@given(shapes=SHAPES, dtype=st.sampled_from(["F32", "BF16", "F16"]), seed=st.integers(0, 99))
def test_any_tensors_are_read_back(
    shapes: list[tuple[int, ...]], dtype: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By safetensors itself and by our reader, with the checksums that were promised."""
    from moescale.checkpoint.convert.formats import Stored
    from moescale.checkpoint.convert.tensor_files import DTYPES, SINGLE, StreamedFile, TensorFiles

    folder = tmp_path_factory.mktemp("stream")
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t.{n}": torch.randn(shape, generator=generator).to(DTYPES[dtype]) for n, shape in enumerate(shapes)}
    planned = {name: Stored(tuple(tensor.shape), dtype) for name, tensor in tensors.items()}
    with StreamedFile(folder / SINGLE, planned) as stream:
        sums = {name: stream.write(name, tensor) for name, tensor in tensors.items()}
    found = load_file(folder / SINGLE)
    reader = TensorFiles(folder)
    assert dict(reader.stored) == planned
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(reader.read(name), tensor)
        assert reader.checksum(name) == sums[name]


def test_what_was_planned_must_come(tmp_path: Path) -> None:
    from moescale.checkpoint.convert.formats import Stored
    from moescale.checkpoint.convert.tensor_files import StreamedFile

    planned = {"a": Stored((2,), "F32"), "b": Stored((3,), "F32")}
    with pytest.raises(RuntimeError, match="b was planned and not written"), StreamedFile(tmp_path / "x", planned) as s:
        s.write("a", torch.zeros(2))
    for name, tensor in (("b", torch.zeros(3)), ("a", torch.zeros(3)), ("a", torch.zeros(2, dtype=torch.bfloat16))):
        with (
            pytest.raises(RuntimeError, match="is not what was planned"),
            StreamedFile(tmp_path / "x", planned) as stream,
        ):
            stream.write(name, tensor)


def test_shards() -> None:
    from moescale.checkpoint.convert.formats import Stored
    from moescale.checkpoint.convert.tensor_files import index_of, shards_of

    planned = {name: Stored((size,), "F32") for name, size in {"a": 10, "b": 10, "c": 50, "d": 5, "e": 5}.items()}
    assert [list(group) for group in shards_of(planned, 80).values()] == [["a", "b"], ["c"], ["d", "e"]]
    assert list(shards_of(planned, 80)) == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert list(shards_of(planned, 320)) == ["model.safetensors"]
    assert '"total_size": 320' in index_of(shards_of(planned, 80))


def test_reading_ahead_keeps_the_order_and_the_errors() -> None:
    """One item ahead, never more: memory holds what is used and what comes next."""
    from moescale.checkpoint.convert.tensor_files import ahead

    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 7:
            raise ValueError("seven")
        return 10 * number

    assert list(ahead(work, range(4))) == [0, 10, 20, 30]
    assert list(ahead(work, [])) == []
    begun.clear()
    for found in ahead(work, range(5)):
        assert len(begun) <= found // 10 + 2
    results = ahead(work, [6, 7, 8])
    assert next(results) == 60
    with pytest.raises(ValueError, match="seven"):
        next(results)


def held() -> int:
    """Bytes of memory that hold no file."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def peak_of(work: Callable[[], object]) -> int:
    """The most that ``work`` adds to what this process holds, seen every millisecond, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not hide what this one takes
    before, seen, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_that_of_the_largest_tensor(
    make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    """88 MB in 128 experts a layer, the largest tensor 0.5 MB: both ways take a few blocks, and not the model."""
    model = ModelConfig(layers=3, width=128, heads=2, tied=False)
    moe = MoEConfig(experts=128, active=2, expert_width=152, score="softmax_normalized")
    tensors = make_ours(tmp_path / "ours", model, moe, vocab=1024)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert whole > 160 * largest
    assert peak_of(lambda: [tensor.clone() for tensor in tensors.values()]) > 0.9 * whole  # it would be seen
    tensors.clear()
    for source, target, to in (("ours", "there", "hf-mixtral"), ("there", "back", "moescale")):
        taken = peak_of(lambda s=source, t=target, f=to: convert(tmp_path / s, tmp_path / t, f, check=False))  # type: ignore[misc]
        # Blocks that are written, read back and summed; names and checksums of 1167 tensors on both sides.
        assert taken < 9 * BLOCK, f"{taken} bytes for a model of {whole}, largest tensor {largest}"
