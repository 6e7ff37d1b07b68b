"""Numbers for people."""

import pytest

from moescale.base.progress import duration, memory, short


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (53_240, "53.2k"), (999_600, "1.00M"), (1.4e9, "1.40G")],
)
def test_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(17, "17 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (3 << 30, "3 GiB"), (5 << 50, "5.12e+03 TiB")],
)
def test_memory(size, text):
    assert memory(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.26, "0.3 s"),
        (41, "41 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (270_000, "3 d 3 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_unknown_duration():
    assert duration(float("inf")) == "?"
