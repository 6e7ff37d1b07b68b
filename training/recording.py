"""What a run writes: the record's lines, status.json, trackers and the progress line. Rank 0 only.

On other ranks every method does nothing, so the loop reads the same everywhere.
"""

import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..models.counts import CONVENTIONS, count_parameters, flops_per_token, mixture_layers
from ..moe import ops
from ..scaling.record import RecordWriter
from ..version import __version__
from .board import Board
from .budget import flops_per_step, tokens_per_step
from .downstream import Answers
from .evaluate import Score
from .setup import Setup, peak_memory
from .status import State, write_status
from .step import StepResult
from .wandb_follower import Follower

STATUS_EVERY = 1.0  # seconds between rewrites of status.json while running


def environment() -> dict[str, Any]:
    """What a run ran on, for environment.json."""
    import deepspeed
    import megatron.core

    return {
        "moescale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "megatron_core": megatron.core.__version__,
        "operations": ops.unavailable or "native",
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
    }


class Recorder:
    """The outputs of one attempt of a run."""

    def __init__(self, setup: Setup, folder: Path, attempt: int, *, quiet: bool):
        self.setup, self.folder, self.attempt = setup, folder, attempt
        self.writes = setup.groups.rank == 0
        self._tokens = tokens_per_step(setup.config)
        self._flops = flops_per_step(setup.config, setup.data.vocab_size)
        self._spent = 0.0
        self._status_written = 0.0
        if not self.writes:
            return
        self._record = RecordWriter(folder)
        self._board: Board | None = None
        self._follower: Follower | None = None
        self._progress = None if quiet or not sys.stderr.isatty() else _progress_line(setup)

    def begin(self, resumed_from: int | None, seconds_before: float) -> None:
        """Header line; ``seconds_before`` is the wall time of the steps that the record holds already."""
        self._spent = seconds_before
        if not self.writes:
            return
        config, data = self.setup.config, self.setup.data
        counts = count_parameters(config.model, config.moe, data.vocab_size)
        flops = flops_per_token(config.model, config.moe, data.vocab_size, config.training.seq)
        mixture = None
        if config.moe is not None:
            mixture = {
                "experts": config.moe.experts,
                "active": config.moe.active,
                "granularity": 4 * config.model.width / config.moe.width_of_expert(config.model.width),
                "shared": config.moe.shared,
                "layers": len(mixture_layers(config.model, config.moe)),
                "future": config.moe.future,
            }
        self._record.header(
            {
                "run": config.name,
                "attempt": self.attempt,
                "resumed_from": resumed_from,
                "scientific_hash": config.scientific_hash,
                "config_hash": config.config_hash,
                "code_version": __version__,
                "data_hash": data.data_hash,
                "tokenizer_hash": data.tokenizer_hash,
                "seed": config.training.seed,
                "threads": torch.get_num_threads(),
                "topology": self.setup.groups.topology.describe(),
                "parameters": asdict(counts),
                "flops_per_token": {"exact": flops.total, "six_n": flops.six_n},
                "mixture": mixture,
                "parent": config.schedule.parent.model_dump() if config.schedule.parent else None,
                "conventions": CONVENTIONS,
            }
        )
        self.status("running", step=resumed_from or 0)
        if config.logging.tensorboard:
            self._board = Board(self.folder / "logs" / "tensorboard", resumed_from or 0)
        if config.logging.wandb is not None:
            self._follower = Follower(self.folder)

    def step(self, step: int, lr: float, result: StepResult, seconds: float) -> None:
        """Step line; ``step`` counts from 1."""
        self._spent += seconds
        if not self.writes:
            return
        squares = result.squares
        line = self._record.step(
            {
                "step": step,
                "tokens": step * self._tokens,
                "flops": float(step * self._flops),
                "seconds": seconds,
                "loss": result.loss,
                "aux_loss": result.aux_loss,
                "z_loss": result.z_loss,
                "lr": lr,
                "batch_tokens": self._tokens,
                "grad_norm": {
                    "total": squares.total**0.5,
                    "dense": squares.dense**0.5,
                    "expert": squares.expert**0.5 if result.router else None,
                },
                "noise": result.noise,
                "router": result.router,
                "tokens_per_second": self._tokens / seconds,
                "tflops": self._flops / seconds / 1e12,
                "mfu": None,
                "memory_bytes": peak_memory(),
            }
        )
        if self._board:
            self._board.add(line)
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, loss=result.loss)
        if time.monotonic() - self._status_written > STATUS_EVERY:
            self.status("running", step=step)

    def scores(self, step: int, scores: dict[str, Score]) -> None:
        """Eval lines of domains."""
        for domain, found in scores.items():
            self._evaluation(step, domain, found, None)

    def answers(self, step: int, answers: dict[str, Answers]) -> None:
        """Eval lines of downstream tasks."""
        for name, given in answers.items():
            asked = given.choices.questions
            questions = len(asked.content)
            task = {
                "hash": asked.hash,
                "questions": questions,
                "chance": asked.chance,
                "raw_score": given.right_raw / questions,
                "cut": given.choices.cut,
            }
            self._evaluation(step, name, given.of_right_choices, given.right / questions, task=task)

    def _evaluation(self, step: int, domain: str, found: Score, score: float | None, **more: Any) -> None:
        if not self.writes:
            return
        line = self._record.eval(
            {
                "step": step,
                "tokens": step * self._tokens,
                "flops": float(step * self._flops),
                "domain": domain,
                "loss": found.loss,
                "bits_per_byte": found.bits_per_byte,
                "score": score,
                "n_tokens": found.n_tokens,
                **more,
            }
        )
        if self._board:
            self._board.add(line)

    def event(self, what: str, step: int, why: str) -> None:
        if self.writes:
            self._record.event(what, step, why)

    def before_checkpoint(self) -> None:
        """A checkpoint may only exist when the lines up to it are on the disk."""
        if self.writes:
            self._record.sync()

    def end(self, state: State, step: int, why: str) -> None:
        """End line and final status."""
        if not self.writes:
            return
        totals = {
            "steps": step,
            "tokens": step * self._tokens,
            "flops": float(step * self._flops),
            "seconds": self._spent,
        }
        self._record.end({"state": state, "why": why, "totals": totals})
        from ..scaling.condensed import read_condensed  # with scipy, for which no other rank and no start need wait

        read_condensed(self.folder)  # here it takes milliseconds; a study of thousands of runs waits for all of them
        self.status(state, step=step, reason=why or None)

    def status(self, state: State, *, step: int, reason: str | None = None) -> None:
        if self.writes:
            write_status(
                self.folder, state, reason=reason, step=step, steps_total=self.setup.steps, attempt=self.attempt
            )
            self._status_written = time.monotonic()

    def close(self) -> None:
        if not self.writes:
            return
        self._record.close()
        if self._board:
            self._board.close()
        if self._follower:
            self._follower.close()
        if self._progress:
            self._progress.stop()


def _progress_line(setup: Setup) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
    progress.add_task(setup.config.name, total=setup.steps, loss=float("nan"))
    progress.start()
    return progress
