"""Distributed checkpoints as files: read box by box; damaged, foreign and hostile ones refused in words."""

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from moescale.base.errors import UserError
from moescale.checkpoint.convert.megatron_files import COMMON, CONFIG, DistCheckpoint
from moescale.checkpoint.convert.megatron_metadata import METADATA
from moescale.checkpoint.convert.megatron_writer import DistWriter

TENSORS = {
    "stacked": torch.randn(3, 4, 5),
    "vector": torch.randn(6).bfloat16(),
    "turned": torch.arange(6).view(2, 3).t(),
    "number": torch.tensor(2.5),
}


class Runs:
    """Pickles as a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What torch's own writer makes of some tensors."""
    path = tmp_path / "checkpoint"
    save(dict(TENSORS), storage_writer=FileSystemWriter(path), no_dist=True)
    (path / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return path


def whole(checkpoint: DistCheckpoint, name: str) -> Tensor:
    shape = checkpoint.tensors[name].shape
    return checkpoint.box(name, (0,) * len(shape), shape)


def metadata_of(folder: Path) -> Metadata:
    with (folder / METADATA).open("rb") as file:
        found: Metadata = pickle.load(file)  # of our own making
    return found


def test_tensors_of_torchs_own_writer_are_read_bit_by_bit(folder: Path) -> None:
    checkpoint = DistCheckpoint(folder)
    for name, tensor in TENSORS.items():
        assert torch.equal(whole(checkpoint, name), tensor), name
        assert checkpoint.checksum(name) == zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    assert torch.equal(checkpoint.box("stacked", (1, 1, 2), (2, 2, 3)), TENSORS["stacked"][1:3, 1:3, 2:5])


def test_what_we_write_torchs_own_reader_reads(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load

    writer = DistWriter(tmp_path, {})
    for layer in range(3):
        writer.add("stacked", (3, 4, 5), (layer, 0, 0), TENSORS["stacked"][layer : layer + 1])
    writer.add("vector", (6,), (0,), TENSORS["vector"])
    writer.close()
    found: dict[str, Any] = {"stacked": torch.zeros(3, 4, 5), "vector": torch.zeros(6, dtype=torch.bfloat16)}
    load(found, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    for name, tensor in found.items():
        assert torch.equal(tensor, TENSORS[name])
    assert writer.checksum("stacked") == DistCheckpoint(tmp_path).checksum("stacked")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_box_of_any_grid_is_put_together(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4), label="shape")
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    values = torch.randn(shape)
    writer = DistWriter(tmp_path_factory.mktemp("grid"), {})
    for corner in torch.cartesian_prod(*(torch.arange(len(c) - 1) for c in cuts)).view(-1, len(shape)).tolist():
        box = tuple(slice(c[n], c[n + 1]) for c, n in zip(cuts, corner, strict=True))
        writer.add("it", tuple(shape), tuple(s.start for s in box), values[box])
    writer.close()
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    extent = [data.draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True)]
    wanted = values[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))]
    assert torch.equal(DistCheckpoint(writer.folder).box("it", tuple(start), tuple(extent)), wanted)


def test_a_hostile_metadata_is_refused_by_name_and_not_run(folder: Path, tmp_path: Path) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = Runs(f"touch {tmp_path / 'ran'}")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata: names posix\.system, which such a file has no need of"):
        DistCheckpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_hostile_common_file_is_refused_by_name_and_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save({"args": Runs(f"touch {tmp_path / 'ran'}")}, folder / COMMON)
    with pytest.raises(UserError, match=r"common\.pt: names posix\.system, which"):
        DistCheckpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_hostile_tensor_is_refused_by_name_and_not_run(folder: Path, tmp_path: Path) -> None:
    """In the place of a box lies a file of torch.save's that holds something else."""
    torch.save(Runs(f"touch {tmp_path / 'ran'}"), folder / "hostile.distcp")
    metadata = metadata_of(folder)
    index = next(index for index in metadata.storage_data if index.fqn == "stacked")
    metadata.storage_data[index] = _StorageInfo("hostile.distcp", 0, (folder / "hostile.distcp").stat().st_size)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"hostile\.distcp \(stacked .*names posix\.system, which"):
        whole(DistCheckpoint(folder), "stacked")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["../secret", "/etc/hostname", ".metadata/../../secret", 5])
def test_no_file_outside_is_read(folder: Path, file: Any) -> None:
    (folder.parent / "secret").write_bytes(b"x" * 10_000)
    metadata = metadata_of(folder)
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = _StorageInfo(file, 0, 10)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="there is no such file beside"):
        DistCheckpoint(folder)


def test_a_shard_that_was_cut_is_seen_at_once(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(UserError, match=r"distcp is \d+ bytes long and .* ends at \d+: cut\?"):
        DistCheckpoint(folder)


def test_every_flipped_bit_of_a_tensor_is_seen(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    place = content.find(TENSORS["stacked"].numpy().tobytes())
    assert place > 0
    content[place + 17] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"stacked at .*damaged"):
        whole(DistCheckpoint(folder), "stacked")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7), metadata=st.booleans())
def test_a_flipped_bit_anywhere_gives_the_values_or_an_error_in_words(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, metadata: bool
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    writer = DistWriter(folder, {})
    writer.add("stacked", (3, 4, 5), (0, 0, 0), TENSORS["stacked"])
    writer.close()
    path = folder / METADATA if metadata else next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        checkpoint = DistCheckpoint(folder)
        if "stacked" in checkpoint.tensors and checkpoint.tensors["stacked"].shape == (3, 4, 5):
            assert torch.equal(whole(checkpoint, "stacked"), TENSORS["stacked"])
    except UserError:
        pass


def test_boxes_that_leave_a_hole_or_meet_are_refused(folder: Path) -> None:
    metadata = metadata_of(folder)
    stored: Any = metadata.state_dict_metadata["stacked"]
    stored.size = torch.Size((4, 4, 5))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="stacked has 80 elements, its boxes hold 60"):
        DistCheckpoint(folder)


def test_boxes_that_meet_are_refused(tmp_path: Path) -> None:
    writer = DistWriter(tmp_path, {})
    for start in (0, 1):
        writer.add("it", (4, 2), (start, 0), torch.zeros(2, 2))
    writer.close()
    with pytest.raises(UserError, match="two boxes of it hold the same elements"):
        whole(DistCheckpoint(tmp_path), "it")


def test_shapes_that_no_file_could_hold_make_no_room(folder: Path) -> None:
    metadata = metadata_of(folder)
    stored: Any = metadata.state_dict_metadata["stacked"]
    stored.size = torch.Size((1 << 40, 4, 5))
    stored.chunks[0].sizes = torch.Size((1 << 40, 4, 5))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"stacked: a box of \[1099511627776, 4, 5\] in \d+ bytes"):
        DistCheckpoint(folder)


def test_a_dtype_or_shape_that_the_shard_contradicts_is_refused(folder: Path) -> None:
    metadata = metadata_of(folder)
    stored: Any = metadata.state_dict_metadata["stacked"]
    stored.properties.dtype = torch.int32
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"holds \[3, 4, 5\] Float, \.metadata says \[3, 4, 5\] Int"):
        whole(DistCheckpoint(folder), "stacked")


def test_another_backend_and_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    with pytest.raises(UserError, match=r"sharded_backend \(zarr\) is not supported"):
        DistCheckpoint(folder)
    (folder / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 2}))
    with pytest.raises(UserError, match=r"sharded_backend_version \(2\) is not known"):
        DistCheckpoint(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(UserError, match="not a Megatron-core distributed checkpoint"):
        DistCheckpoint(folder)
    with pytest.raises(UserError, match="cannot be read"):
        DistCheckpoint(tmp_path)


def test_metadata_that_is_something_else_is_refused(folder: Path) -> None:
    for value in ([1, 2], {"state_dict_metadata": {}}, Metadata({"a": 1}), Metadata(None)):  # type: ignore[dict-item,arg-type]
        (folder / METADATA).write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match="not a distributed checkpoint's metadata"):
            DistCheckpoint(folder)
