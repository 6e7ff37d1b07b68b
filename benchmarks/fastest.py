"""Choices that are made by time, before anything is measured."""

import time
from collections.abc import Callable, Iterable

from .device import finish

MORE = 4  # attempts at each option that can still win after its first
HOPELESS = 4.0  # times the best first attempt; a first attempt may build kernels that the others find built


def fastest(options: Iterable[str], attempt: Callable[[str], None]) -> tuple[str, str]:
    """(the option whose attempt took least time, all options with their times for a note)."""
    seconds = {option: _seconds(attempt, option) for option in options}
    limit = HOPELESS * min(seconds.values())
    for option, found in seconds.items():
        if found <= limit:
            seconds[option] = min(found, *(_seconds(attempt, option) for _ in range(MORE)))
    best = min(seconds, key=lambda option: seconds[option])
    return best, ", ".join(f"{option} {value * 1e3:.1f} ms" for option, value in seconds.items())


def _seconds(attempt: Callable[[str], None], option: str) -> float:
    began = time.perf_counter()
    attempt(option)
    finish()
    return time.perf_counter() - began
