"""Safetensors files written as a stream, and how much memory a conversion takes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

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


_PROBE = """
import re, sys, threading, time
from pathlib import Path
from moescale.compat.cuda_standin import install
install()
from moescale.checkpoint.convert.convert import convert

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.0005)

for source, target, to in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    done, peak, before = False, 0, held()
    thread = threading.Thread(target=watch)
    thread.start()
    convert(Path(source), Path(target), to, check=False)
    done = True
    thread.join()
    print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_that_of_the_largest_tensor(make_ours: Callable[..., Any], tmp_path: Path) -> None:
    """88 MB in 128 experts a layer, the largest tensor 0.5 MB: both ways take a few of those, and not the model."""
    from moescale.models.config import ModelConfig
    from moescale.moe import MoEConfig

    model = ModelConfig(layers=3, width=128, heads=2, tied=False)
    moe = MoEConfig(experts=128, active=2, expert_width=152, score="softmax_normalized")
    tensors = make_ours(tmp_path / "ours", model, moe, vocab=1024)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert whole > 160 * largest
    del tensors
    pairs = [("ours", "there", "hf-mixtral"), ("there", "back", "moescale")]
    arguments = [str(word) for one, other, to in pairs for word in (tmp_path / one, tmp_path / other, to)]
    done = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Names, shapes and checksums of 1167 tensors on both sides take some megabytes too.
    for taken in map(int, done.stdout.split()):
        assert taken < 12 * largest + (6 << 20), f"{taken} bytes for a model of {whole}, largest tensor {largest}"
