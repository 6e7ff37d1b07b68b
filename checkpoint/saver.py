"""Saving while training goes on.

The main thread copies what this rank stores into host buffers that stay for the next save, and goes on. A thread
writes the copy into this rank's shards, reads them back, and describes them in a small file beside them. The thread
of rank 0 waits for the descriptions of all ranks, puts the manifest together and renames the folder. Threads
speak through the file system alone: a collective from a thread would meet those of the main thread. They end when a
rank fails, since its main thread raises and the watch (parallel/watch.py) ends the others.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import Held
from .manifest import Manifest, merged
from .shards import Abandoned, Written
from .storage import beside, publish, sweep
from .writing import ShardWriter

POLL = 0.01  # seconds between looks for the other ranks' descriptions


class Saver:
    """Saves checkpoints of one attempt of a run; all ranks make it together and save the same steps.

    As a context it waits for the last save, or gives it up when an exception passes.

    Args:
        root: folder of the checkpoints, seen by all ranks.
        published: called by rank 0's thread when a checkpoint exists, with its step.
    """

    def __init__(self, root: Path, published: Callable[[int], None] = lambda step: None):
        self._root, self._published = root, published
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        token = [secrets.token_hex(4)]
        if self._rank == 0:
            sweep(root)
        if self._world > 1:
            dist.broadcast_object_list(token)
        self._token = token[0]
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._error: BaseException | None = None
        self._finished: list[int] = []

    def save(
        self,
        step: int,
        held: list[Held],
        extra: dict[str, Any],
        *,
        background: bool,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Save ``held``, what this rank stores of the state after ``step``. Waits for the save before it.

        Args:
            extra: the loop's own state, JSON.
            background: return when ``held`` is copied, and write while training goes on. Otherwise it is written from
                where it lies, without a copy, and this rank's part is done on return.
            before: called by rank 0's thread before the checkpoint gets its name.

        Raises:
            OSError: an earlier save failed, or this one did and is not in the background.
        """
        self.wait()
        if background:
            held = self._buffers.copy(held)
        self._thread = threading.Thread(
            target=self._run, args=(step, held, extra, before), name=f"checkpoint {step}", daemon=True
        )
        self._thread.start()
        if not background:
            self.wait()

    def check(self) -> list[int]:
        """Steps whose saving has ended on this rank since the last call.

        Raises:
            OSError: the disk refused a checkpoint; older ones are untouched.
            BadCheckpoint: what was written came back different.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Until this rank's part of the last save is done; raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self.check()

    def finish(self) -> None:
        """Until the last checkpoint exists, on all ranks together; raises as `check` does."""
        self.wait()
        if self._world > 1:
            dist.barrier()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int, held: list[Held], extra: dict[str, Any], before: Callable[[], None]) -> None:
        folder = beside(self._root, step, self._token)
        try:
            self._write(folder, step, held, extra, before)
            self._finished.append(step)
        except Abandoned:
            self._remove_own(folder)
        except OSError as error:
            self._remove_own(folder)  # a full disk has room again for what else must be written
            said = f"{error.strerror} (while the checkpoint of step {step} was saved; older ones are intact)"
            self._error = OSError(error.errno, said, error.filename or str(folder))
        except BaseException as error:
            self._error = error

    def _write(
        self, folder: Path, step: int, held: list[Held], extra: dict[str, Any], before: Callable[[], None]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(folder, f"rank-{self._rank:05d}", self._given_up)
        for one in held:
            writer.add_range(one)
        written = writer.close()
        if self._rank != 0:
            written.save(folder / _description(self._rank))
            return
        written = merged([written, *(self._written_by(rank, folder) for rank in range(1, self._world))])
        before()
        publish(self._root, Manifest(step, extra, written), folder)
        self._published(step)

    def _written_by(self, rank: int, folder: Path) -> Written:
        """What another rank has written, when it is done."""
        path = folder / _description(rank)
        while not path.exists():
            if self._given_up.is_set():
                raise Abandoned
            time.sleep(POLL)
        written = Written.from_json(json.loads(path.read_text()))
        path.unlink()
        return written

    def _remove_own(self, folder: Path) -> None:
        for path in folder.glob(f"rank-{self._rank:05d}*"):
            path.unlink(missing_ok=True)


def _description(rank: int) -> str:
    return f"rank-{rank:05d}.json"


class HostBuffers:
    """Room in host memory for a copy of what a rank stores, made at the first save and used again at every other."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def copy(self, held: list[Held]) -> list[Held]:
        """The same ranges with values in the buffer; the sources may change when this returns."""
        sources = [one.values.detach() for one in held]
        counts = [values.numel() for values in sources]
        if self._flat is None or self._flat.numel() < sum(counts):
            self._flat = torch.empty(sum(counts), dtype=torch.float32, pin_memory=torch.cuda.is_available())
        targets = self._flat[: sum(counts)]
        joined = joined_neighbours(sources)
        for source, target in zip(joined, targets.split([values.numel() for values in joined]), strict=True):
            target.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [replace(one, values=target) for one, target in zip(held, targets.split(counts), strict=True)]


def joined_neighbours(flat: list[Tensor]) -> list[Tensor]:
    """Views of the same elements in the same order, where one tensor goes on as the next one in memory: as one.

    Masters and moments lie in a few large tensors, and a few large copies are faster than many small ones.
    """
    found: list[Tensor] = []
    for values in flat:
        last = found[-1] if found else None
        if last is not None and values.data_ptr() == last.data_ptr() + last.nbytes and _same_memory(values, last):
            found[-1] = last.as_strided((last.numel() + values.numel(),), (1,))
        else:
            found.append(values)
    return found


def _same_memory(one: Tensor, other: Tensor) -> bool:
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.dtype == other.dtype
