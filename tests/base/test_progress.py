"""Numbers as people read them."""

import math

import pytest

from moescale.base.progress import duration, memory, short


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (532, "532"), (53_200, "53.2k"), (1_400_000, "1.40M"), (999_600, "1.00M"), (2.5e14, "250T")],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (1.5 * 2**30, "1.5 GiB"), (3 * 2**40, "3 TiB")]
)
def test_memory(size: float, text: str) -> None:
    assert memory(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.24, "1.2 s"),
        (41, "41 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (4 * 86_400 + 3 * 3600, "4 d 3 h"),
        (59.7, "1 min 0 s"),
        (math.inf, "?"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
