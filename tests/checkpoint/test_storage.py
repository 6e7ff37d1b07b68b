"""Checkpoints on disk: bit-exact, whole or refused, and never in the way of the next start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saving import held_as, latest_good, save
from torch import Tensor

from moescale.base.errors import UserError
from moescale.base.files import digest
from moescale.checkpoint.boxes import Box
from moescale.checkpoint.shards import BadCheckpoint
from moescale.checkpoint.storage import Checkpoint, Mismatch, folder_of, prune, steps_in
from moescale.models.names import Piece

SHARD = "rank-00000-000.safetensors"


def boxes(seed: int = 0) -> list[Box]:
    """Two logical tensors, one of them in two boxes, with the values that float32 has trouble with."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(6, 4, generator=generator)
    whole[0] = torch.tensor([float("inf"), -0.0, 1e-45, float("nan")])
    upper, lower = (Piece("q", (6, 4), (first, 0), (3, 4), lambda t: t) for first in (0, 3))
    gain = Piece("final_norm", (5,), (0,), (5,), lambda t: t)
    return [
        Box("master", upper, whole[:3]),
        Box("master", lower, whole[3:]),
        Box("master", gain, torch.randn(5, generator=generator)),
        Box("exp_avg", gain, torch.randn(5, generator=generator)),
    ]


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.fixture
def root(tmp_path: Path, one_rank: Any) -> Path:
    """A folder with the checkpoints of steps 10 and 20."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20):
        save(folder, step, held_as(boxes(step)), {"optimizer_steps": step})
    return folder


def test_every_bit_comes_back(root: Path) -> None:
    checkpoint = Checkpoint(folder_of(root, 20))
    assert checkpoint.step == 20
    assert checkpoint.extra == {"optimizer_steps": 20}
    for box in boxes(20):
        assert same(checkpoint.box(box.part, box.piece), box.values.contiguous())


@pytest.mark.parametrize("start", [(0, 0), (1, 2), (2, 0), (4, 1)])
@pytest.mark.parametrize("extent", [(1, 1), (2, 2), (2, 1)])
def test_any_box_is_put_together(root: Path, start: tuple[int, int], extent: tuple[int, int]) -> None:
    """Another layout asks for boxes that were never stored."""
    whole = torch.cat([box.values for box in boxes(20)[:2]])
    piece = Piece("q", (6, 4), start, extent, lambda t: t)
    assert same(Checkpoint(folder_of(root, 20)).box("master", piece), piece.of(whole).contiguous())


def test_what_it_does_not_hold(root: Path) -> None:
    checkpoint = Checkpoint(folder_of(root, 20))
    with pytest.raises(Mismatch, match="holds no exp_avg/q"):
        checkpoint.box("exp_avg", Piece("q", (6, 4), (0, 0), (6, 4), lambda t: t))
    with pytest.raises(Mismatch, match=r"master/q has shape \[6, 4\], the model needs \(6, 5\)"):
        checkpoint.box("master", Piece("q", (6, 5), (0, 0), (6, 5), lambda t: t))


def test_a_tensor_stored_in_part_is_no_checkpoint(root: Path) -> None:
    with pytest.raises(ValueError, match="master/q is stored in part only: 12 of 24 elements"):
        save(root, 30, held_as(boxes(30)[1:]), {})
    assert steps_in(root) == [10, 20]


def test_the_manifest_is_for_people_too(root: Path) -> None:
    """A line for each tensor says what it is and where it lies."""
    text = (folder_of(root, 20) / "manifest.json").read_text()
    line = next(line for line in text.splitlines() if '"master/q"' in line)
    found = json.loads("{" + line.rstrip(",") + "}")["master/q"]
    assert (found["shape"], found["dtype"]) == ([6, 4], "float32")
    assert [(box["start"], box["extent"]) for box in found["boxes"]] == [([0, 0], [3, 4]), ([3, 0], [3, 4])]
    assert {box["shard"] for box in found["boxes"]} == {SHARD}
    assert all(len(crc) == 8 for box in found["boxes"] for crc in box["crc32"])


def test_other_programs_can_read_the_files(root: Path) -> None:
    found = load_file(folder_of(root, 20) / SHARD)
    assert sorted(found) == ["exp_avg/final_norm", "master/final_norm", "master/q@0,0", "master/q@3,0"]
    assert same(found["master/q@0,0"], boxes(20)[0].values)
    assert same(found["exp_avg/final_norm"], boxes(20)[3].values)


def flip_a_bit(folder: Path) -> None:
    path = folder / SHARD
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-8])


def tear_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def flip_a_bit_of_the_header(folder: Path) -> None:
    path = folder / SHARD
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def lengthen(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")


def edit_manifest(folder: Path, **more: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def edit_box(folder: Path, **more: Any) -> None:
    """A manifest that somebody made, with a checksum that is right."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["tensors"]["master/final_norm"]["boxes"][0].update(more)
    del content["checksum"]
    path.write_text(json.dumps({**content, "checksum": digest(content)}))


# Found when the checkpoint is opened.
STRUCTURE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (truncate, SHARD + r": damaged \(\d+ bytes long instead of \d+\)"),
    "longer shard": (lengthen, SHARD + r": damaged \(\d+ bytes long instead of \d+\)"),
    "missing shard": (lambda f: (f / SHARD).unlink(), SHARD + r": No such file"),
    "torn manifest": (tear_manifest, r"manifest\.json cannot be read"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json cannot be read"),
    "foreign manifest": (lambda f: (f / "manifest.json").write_text('{"weights": []}'), r"manifest\.json"),
    "manifest of another kind": (lambda f: (f / "manifest.json").write_text("[1, 2]"), r"manifest\.json"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), r"manifest\.json"),
    "changed manifest": (lambda f: edit_manifest(f, step=21), "it was changed after it was written"),
    "manifest without tensors": (lambda f: edit_manifest(f, tensors=None), r"manifest\.json"),
    "box of another folder": (lambda f: edit_box(f, shard="../../../etc/passwd"), r"manifest\.json"),
    "box beyond its tensor": (lambda f: edit_box(f, start=[3]), "a box lies outside"),
    "box beyond its file": (lambda f: edit_box(f, offset=10**9), "a box lies outside"),
    "box before its tensor": (lambda f: edit_box(f, start=[-1]), "negative"),
    "box without checksum": (lambda f: edit_box(f, crc32=[]), "lacks checksums"),
    "box too large for memory": (lambda f: edit_box(f, extent=[10**15]), "stored more than once"),
}
# Found when what is damaged is read.
CONTENT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed bit": (flip_a_bit, SHARD + r": damaged \(bytes \d+ and on are not those that were written\)"),
    "changed header": (flip_a_bit_of_the_header, SHARD + r": damaged \(its header is not the one"),
    "another checksum": (lambda f: edit_box(f, crc32=["00000000"]), "are not those that were written"),
}
DAMAGE = STRUCTURE | CONTENT


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_serves(root: Path, kind: str) -> None:
    damage, said = DAMAGE[kind]
    damage(folder_of(root, 20))
    if kind in STRUCTURE:
        with pytest.raises(BadCheckpoint, match=said):
            Checkpoint(folder_of(root, 20))
    else:
        with pytest.raises(BadCheckpoint, match=said):
            Checkpoint(folder_of(root, 20)).verify()
    found, complaints = latest_good(root)
    assert found is not None
    assert found.step == 10
    assert len(complaints) == 1
    assert "step-00000020" in complaints[0]


def test_no_good_checkpoint_at_all(root: Path) -> None:
    for step in (10, 20):
        flip_a_bit(folder_of(root, step))
    found, complaints = latest_good(root)
    assert found is None
    assert len(complaints) == 2
    assert latest_good(root / "nowhere") == (None, [])


def test_a_newer_schema_is_the_users_to_mend(root: Path) -> None:
    """It is not damage: an older checkpoint must not silently serve."""
    edit_manifest(folder_of(root, 20), schema=99)
    with pytest.raises(UserError, match="checkpoint schema 99 is newer than this version's 2"):
        latest_good(root)
    edit_manifest(folder_of(root, 20), schema=1)
    with pytest.raises(UserError, match="checkpoint schema 1 is older than this version's 2"):
        latest_good(root)


def test_leftovers_of_a_kill_are_ignored_and_swept_away(root: Path) -> None:
    """Killed while writing, and while deleting."""
    shutil.copytree(folder_of(root, 20), root / ".step-00000030.0123abcd.tmp")
    (root / ".step-00000030.0123abcd.tmp" / "manifest.json").unlink()
    shutil.copytree(folder_of(root, 10), root / ".step-00000005.old")
    assert steps_in(root) == [10, 20]
    assert latest_good(root)[0].step == 20  # type: ignore[union-attr]
    save(root, 30, held_as(boxes(30)), {})
    assert latest_good(root)[0].step == 30  # type: ignore[union-attr]
    assert sorted(entry.name for entry in root.iterdir()) == ["step-00000010", "step-00000020", "step-00000030"]


def test_a_step_can_be_saved_again(root: Path) -> None:
    save(root, 20, held_as(boxes(99)), {"optimizer_steps": 21})
    checkpoint = Checkpoint(folder_of(root, 20))
    assert checkpoint.extra == {"optimizer_steps": 21}
    assert same(checkpoint.box("exp_avg", boxes()[3].piece), boxes(99)[3].values)


def test_prune(root: Path) -> None:
    for step in (30, 40, 50):
        save(root, step, held_as(boxes(step)), {})
    prune(root, 2, always=(20, 35))
    assert steps_in(root) == [20, 40, 50]
    assert not [entry for entry in root.iterdir() if entry.name.startswith(".")]
    prune(root, 1, always=(), every=20)
    assert steps_in(root) == [20, 40, 50]
    prune(root, 1, always=())
    assert steps_in(root) == [50]


def test_other_things_in_the_folder_are_not_checkpoints(root: Path) -> None:
    (root / "step-7").mkdir()
    (root / "notes.txt").write_text("hello")
    assert steps_in(root) == [10, 20]
