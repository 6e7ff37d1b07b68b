"""The training loop: steps, evaluation, checkpoints, stopping."""

import time

from ..base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from ..checkpoint.saver import Saver
from ..checkpoint.storage import prune
from ..scaling.record_schema import HELD_OUT
from .downstream import Answers, answer
from .evaluate import Score, evaluate
from .nonfinite import explain_nonfinite
from .recording import Recorder
from .schedule import branch_steps, learning_rate
from .setup import Setup
from .step import take_step
from .stop import ANOTHER_RANK, StopRequest


class Loop:
    """Takes a set-up run from a step to its end or to a stop.

    Every rank runs the same loop; decisions that could differ (stopping, failing) come out of sums over all ranks.
    """

    def __init__(self, setup: Setup, recorder: Recorder, stop: StopRequest):
        self.setup, self.recorder, self.stop = setup, recorder, stop
        self.config = setup.config
        self.root = recorder.folder / "checkpoints"
        self.branches = branch_steps(self.config)
        self.saver = Saver(self.root, published=self._prune)

    def run(self, first: int) -> int:
        """From ``first`` steps done to the end; returns the exit code."""
        with self.saver:
            return self._run(first)

    def _run(self, first: int) -> int:
        steps, step = self.setup.steps, first
        while step < steps:
            self._note_saved()
            lr = learning_rate(self.config, step + 1, steps)
            began = time.perf_counter()
            result = take_step(
                self.setup, step, lr, measure_noise=self._noise_is_due(step + 1), stop_asked=self.stop.asked()
            )
            step += 1
            self.recorder.step(step, lr, result, time.perf_counter() - began)
            if not result.finite:
                where = explain_nonfinite(self.setup)
                self.recorder.end(
                    "failed", step, f"loss or gradient is not finite at step {step}: the run diverged; {where}"
                )
                return EXIT_FAILED
            last = step == steps
            if last or self._is_due(self.config.eval.every, step):
                self.recorder.answers(step, self._answer())
                self.recorder.scores(step, self._evaluate())
            stopping = result.stop and not last
            if last or stopping or step in self.branches or self._is_due(self.config.checkpoint.every, step):
                self._save(step, background=self.config.checkpoint.async_ and not (last or stopping))
            if stopping:
                return self._stop(step)
        self._finish_saving()
        self.recorder.end("done", step, "")
        return EXIT_DONE

    def _is_due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _noise_is_due(self, step: int) -> bool:
        return self._is_due(self.config.noise.every, step)

    def _evaluate(self) -> dict[str, Score]:
        """Scores by domain, and ``held_out``: held-out documents of all domains that are trained on."""
        seq = self.config.training.seq
        scores = {
            name: evaluate(self.setup.passes, self.setup.groups, sequences, seq)
            for name, sequences in self.setup.held_out.items()
        }
        trained = [score for name, score in scores.items() if not self.config.data.domains[name].evaluate_only]
        if trained:
            scores[HELD_OUT] = sum(trained[1:], trained[0])
        return scores

    def _answer(self) -> dict[str, Answers]:
        """How each downstream task is answered."""
        passes, groups, seq = self.setup.passes, self.setup.groups, self.config.training.seq
        return {choices.questions.name: answer(passes, groups, choices, seq) for choices in self.setup.tasks}

    def _save(self, step: int, *, background: bool) -> None:
        extra = {
            "scientific_hash": self.config.scientific_hash,
            "optimizer_steps": self.setup.engine.steps_taken,
            "topology": self.setup.groups.topology.describe(),
        }
        held = self.setup.state.held()
        self.saver.save(step, held, extra, background=background, before=self.recorder.before_checkpoint)

    def _prune(self, step: int) -> None:
        """The checkpoint of ``step`` exists: delete those that it makes superfluous."""
        checkpoint = self.config.checkpoint
        prune(self.root, checkpoint.keep, always=self.branches, every=checkpoint.keep_every)

    def _note_saved(self) -> None:
        """Events of checkpoints that exist by now."""
        for step in self.saver.check():
            self.recorder.event("saved", step, "checkpoint")

    def _finish_saving(self) -> None:
        self.saver.finish()
        self._note_saved()

    def _stop(self, step: int) -> int:
        self._finish_saving()
        self.stop.asked()  # another rank may have been the first to see a file that says why
        reason = self.stop.reason or ANOTHER_RANK
        self.recorder.event("preempted", step, reason)
        self.recorder.end("preempted", step, reason)
        if self.setup.groups.rank == 0:
            self.stop.forget_file()
        return EXIT_STOPPED
