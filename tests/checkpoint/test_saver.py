"""Saving in the background: what is saved, when it exists, how it fails."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import held_as
from torch import Tensor

from moescale.checkpoint.boxes import Box, Held
from moescale.checkpoint.saver import HostBuffers, Saver
from moescale.checkpoint.storage import Checkpoint, beside, folder_of, prune, steps_in
from moescale.models.names import Piece

pytestmark = pytest.mark.usefixtures("one_rank")
SHAPE = (64, 32)


def state(value: float) -> Tensor:
    return torch.full(SHAPE, value)


def held(values: Tensor) -> list[Held]:
    return held_as([Box("master", Piece("q", SHAPE, (0, 0), SHAPE, lambda t: t), values)])


def stored(root: Path, step: int) -> float:
    values = Checkpoint(folder_of(root, step)).whole("master", "q")
    assert (values == values[0, 0]).all()
    return values[0, 0].item()


class Gate:
    """Holds the writing thread back just before a checkpoint gets its name, as a slow disk would."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self) -> None:
        assert self.opened.wait(30)


def test_what_is_saved_is_the_state_of_the_call(tmp_path: Path) -> None:
    """Training goes on in the same memory while the thread writes."""
    values, gate = state(1.0), Gate()
    with Saver(tmp_path) as saver:
        saver.save(1, held(values), {"a": 1}, background=True, before=gate)
        values.fill_(2.0)
        assert saver.check() == []
        assert steps_in(tmp_path) == []
        gate.opened.set()
        saver.save(2, held(values), {}, background=True)  # waits for the first
        assert saver.check()[0] == 1
        assert steps_in(tmp_path)[0] == 1
        values.fill_(3.0)
        saver.finish()
        assert saver.check() in ([2], [])
    assert (stored(tmp_path, 1), stored(tmp_path, 2)) == (1.0, 2.0)
    assert Checkpoint(folder_of(tmp_path, 1)).extra == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_end_waits(tmp_path: Path) -> None:
    gate = Gate()
    with Saver(tmp_path) as saver:
        saver.save(1, held(state(1.0)), {}, background=True, before=gate)
        threading.Timer(0.2, gate.opened.set).start()
        began = time.monotonic()
    assert time.monotonic() - began >= 0.15
    assert steps_in(tmp_path) == [1]


def test_in_the_foreground_it_exists_at_once(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.save(1, held(state(1.0)), {}, background=False)
        assert steps_in(tmp_path) == [1]
        assert saver.check() == [1]


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_told_in_words(tmp_path: Path, background: bool) -> None:
    """Once, at the next look; what was saved before stays, and so does the folder's order."""
    with Saver(tmp_path) as saver:
        saver.save(1, held(state(1.0)), {}, background=background)
        saver.wait()
        beside(tmp_path, 2, saver._token).write_text("something is in the way")
        said = r"File exists \(while the checkpoint of step 2 was saved; older ones are intact\): .*step-00000002"

        def save_and_look() -> None:
            saver.save(2, held(state(2.0)), {}, background=background)
            saver.wait()

        with pytest.raises(OSError, match=said):
            save_and_look()
        beside(tmp_path, 2, saver._token).unlink()
        assert saver.check() == [1]
        saver.save(3, held(state(3.0)), {}, background=background)
    assert steps_in(tmp_path) == [1, 3]
    assert stored(tmp_path, 3) == 3.0


def test_a_failure_while_pruning_is_told_too(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        raise OSError(5, "Input/output error")

    saver = Saver(tmp_path, published=fail)
    saver.save(1, held(state(1.0)), {}, background=True)
    with pytest.raises(OSError, match="Input/output error"):
        saver.wait()
    assert steps_in(tmp_path) == [1]


def test_an_exception_gives_the_save_up(tmp_path: Path) -> None:
    """The thread ends, and leaves what was there."""
    large = torch.zeros(4000, 4096)
    piece = Piece("q", tuple(large.shape), (0, 0), tuple(large.shape), lambda t: t)

    def fail_while_saving() -> None:
        with Saver(tmp_path) as saver:
            saver.save(1, held(state(1.0)), {}, background=True)
            saver.save(2, held_as([Box("master", piece, large)]), {}, background=True)
            raise MemoryError("no room for the activations")

    with pytest.raises(MemoryError):
        fail_while_saving()
    assert steps_in(tmp_path) in ([1], [1, 2])  # 2 if the disk was that fast
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    with Saver(tmp_path) as saver:  # the next start sweeps
        saver.save(3, held(state(3.0)), {}, background=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_superfluous_checkpoints_go_when_the_new_one_exists(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def published(step: int) -> None:
        seen.append(steps_in(tmp_path))
        prune(tmp_path, 2, always=(1,), every=4)

    with Saver(tmp_path, published=published) as saver:
        for step in range(1, 8):
            saver.save(step, held(state(step)), {}, background=True)
    assert seen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 3, 4, 5], [1, 4, 5, 6], [1, 4, 5, 6, 7]]
    assert steps_in(tmp_path) == [1, 4, 6, 7]


def test_host_buffers_are_used_again() -> None:
    buffers, values = HostBuffers(), state(1.0)
    first = buffers.copy(held(values))[0].values
    assert first.data_ptr() != values.data_ptr()
    values.fill_(2.0)
    assert first[0] == 1.0
    second = buffers.copy(held(values))[0].values
    assert second.data_ptr() == first.data_ptr()
    assert second[0] == 2.0


def test_a_model_in_training(train: Callable[..., Any], tmp_path: Path) -> None:
    """Two steps are saved while later ones change the state: each checkpoint is of its own step."""
    from moescale.checkpoint.state import LogicalState

    made = train()
    logical = LogicalState(made.engine, made.entries, made.buffers)
    wanted = {}
    with Saver(tmp_path) as saver:
        for step in (1, 2):
            made.backward(step)
            made.engine.reduce()
            made.engine.step(0.01)
            wanted[step] = [(box.part, box.piece, box.values.clone()) for box in logical.boxes()]
            saver.save(step, logical.held(), {}, background=True)
        made.backward(3)
        made.engine.reduce()
        made.engine.step(0.01)
    for step, boxes in wanted.items():
        checkpoint = Checkpoint(folder_of(tmp_path, step))
        assert {part for part, *_ in boxes} == {"master", "exp_avg", "exp_avg_sq"}
        for part, piece, values in boxes:
            assert torch.equal(checkpoint.box(part, piece), values)
