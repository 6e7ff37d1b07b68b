"""The choice by time."""

import time

from moescale.benchmarks.fastest import MORE, fastest


def test_the_fastest_is_taken_and_the_hopeless_are_not_tried_again() -> None:
    tried: list[str] = []

    def attempt(option: str) -> None:
        tried.append(option)
        time.sleep({"quick": 0.002, "slow": 0.2}[option])

    best, note = fastest(("slow", "quick"), attempt)
    assert best == "quick"
    assert tried.count("slow") == 1
    assert tried.count("quick") == 1 + MORE
    assert note.startswith("slow 2")
    assert ", quick " in note
