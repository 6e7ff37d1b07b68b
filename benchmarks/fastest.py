"""Choices that are made by time, before anything is measured."""

import time
from collections.abc import Callable, Iterable

TRIES = 5


def fastest(options: Iterable[str], attempt: Callable[[str], None]) -> tuple[str, str]:
    """(the option whose attempt took least time, all options with their times for a note)."""
    seconds = {option: min(_seconds(attempt, option) for _ in range(TRIES)) for option in options}
    best = min(seconds, key=lambda option: seconds[option])
    return best, ", ".join(f"{option} {value * 1e3:.1f} ms" for option, value in seconds.items())


def _seconds(attempt: Callable[[str], None], option: str) -> float:
    began = time.perf_counter()
    attempt(option)
    return time.perf_counter() - began
