"""What ``study run`` shows: a live table on a terminal, a line for each finished run elsewhere."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..base.errors import EXIT_DONE, EXIT_STOPPED
from ..base.progress import duration
from ..training.status import read_status
from .ends import latest_line
from .pool import Child, Outcome

_REFRESH = 1.0  # seconds


class Progress:
    """Counts and the time that is left, by cost done: what both displays show."""

    def __init__(self, total: int, cost: float) -> None:
        self.total, self.done, self.failed, self.stopped = total, 0, 0, 0
        self._cost, self._cost_done, self._started = cost, 0.0, time.monotonic()

    def count(self, outcome: Outcome) -> None:
        if outcome.code == EXIT_DONE:
            self.done += 1
        elif outcome.code == EXIT_STOPPED:
            self.stopped += 1
        else:
            self.failed += 1
        self._cost_done += outcome.job.cost

    @property
    def ended(self) -> int:
        return self.done + self.failed + self.stopped

    def left(self, running: Sequence[tuple[Child, float]]) -> float:
        """Seconds to go, given what share of each running job is done."""
        cost = self._cost_done + sum(child.job.cost * share for child, share in running)
        elapsed = time.monotonic() - self._started
        return elapsed * (self._cost - cost) / cost if cost else float("inf")


class Lines:
    """One plain line for each run that ends."""

    def __init__(self, total: int, cost: float) -> None:
        self._progress = Progress(total, cost)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def began(self, child: Child) -> None:
        return None

    def tick(self, running: Sequence[Child]) -> None:
        return None

    def ended(self, outcome: Outcome) -> None:
        self._progress.count(outcome)
        print(_line(outcome, self._progress), file=sys.stderr, flush=True)


class LiveTable:
    """Running runs with step, loss and time left; finished ones scroll by above."""

    def __init__(self, total: int, cost: float) -> None:
        self._progress = Progress(total, cost)
        self._console = Console(stderr=True)
        # Refreshed by us: rich's own refresher is a thread, and this process forks.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown = 0.0

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def began(self, child: Child) -> None:
        self._shown = 0.0

    def ended(self, outcome: Outcome) -> None:
        self._progress.count(outcome)
        self._console.print(_line(outcome, self._progress), highlight=False, markup=False)

    def tick(self, running: Sequence[Child]) -> None:
        if time.monotonic() - self._shown < _REFRESH:
            return
        self._shown = time.monotonic()
        self._live.update(self._table(running), refresh=True)

    def _table(self, running: Sequence[Child]) -> Table:
        table = Table()
        table.add_column("run", no_wrap=True)
        for heading in ("step", "loss", "left"):
            table.add_column(heading, justify="right")
        shares = []
        for child in running:
            status, line = read_status(child.job.folder), latest_line(child.job.folder, "step")
            total = status.steps_total if status else 0
            step = line["step"] if line else 0
            shares.append((child, step / total if total else 0.0))
            loss = line.get("loss") if line else None
            table.add_row(
                child.job.name,
                f"{step} / {total}" if total else "starting",
                f"{loss:.3f}" if loss is not None else "",
                duration(_left(child, step, total)) if total and step > child.first_step else "",
            )
        progress = self._progress
        waiting = progress.total - progress.ended - len(running)
        counts = [f"{progress.done} of {progress.total} done", f"{waiting} waiting"]
        if progress.failed:
            counts.append(f"{progress.failed} failed")
        table.caption = ", ".join([*counts, f"{duration(progress.left(shares))} left"])
        return table


def _left(child: Child, step: int, total: int) -> float:
    return (time.monotonic() - child.started) * (total - step) / (step - child.first_step)


def _line(outcome: Outcome, progress: Progress) -> str:
    count = f"[{progress.ended:>{len(str(progress.total))}}/{progress.total}] {outcome.job.name}"
    if outcome.code == EXIT_STOPPED:
        return f"{count}  stopped; the next study run goes on with it"
    if outcome.code != EXIT_DONE:
        return f"{count}  FAILED after {duration(outcome.seconds)}: {outcome.reason}"
    # The held-out loss stands in the last eval line; the loss of the last batch alone says little.
    line = latest_line(outcome.job.folder, "eval")
    loss = line.get("loss") if line else None
    return f"{count}  done" + (f"  loss {loss:.3f}" if loss is not None else "") + f"  {duration(outcome.seconds)}"
