"""Numbers for people carry the digits that their uncertainty leaves them."""

import pytest

from moescale.scaling import formats
from moescale.scaling.fitted import Estimate


@pytest.mark.parametrize(
    ("error", "decimals"), [(0.018, 3), (0.085, 3), (0.4, 2), (1.7, 1), (30.0, 0), (None, 3), (0, 3)]
)
def test_two_digits_of_an_error_are_shown(error: float | None, decimals: int) -> None:
    assert formats.decimals(error) == decimals


def test_a_value_is_as_long_as_its_error() -> None:
    assert formats.with_error(0.03812, 0.0181) == "+0.038 ± 0.018"
    assert formats.with_error(-0.1, 0.35) == "-0.10 ± 0.35"
    assert formats.with_error(0.03812, None) == "+0.038"


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.08684, 0.0849, 0.0890), "0.0868 (0.0849 to 0.089)"),
        (Estimate(212.3, 13.0, 1.9e17), "200 (13 to 1.9e17)"),
        (Estimate(0.4567, None, None), "0.457"),
        (Estimate(None, None, None), "not determined"),
    ],
)
def test_estimates(estimate: Estimate, text: str) -> None:
    assert formats.estimate(estimate) == text


def test_large_numbers_are_readable() -> None:
    assert formats.count(1.234e6) == "1.23M"
    assert formats.significant_count(634_217) == "630k"
    assert formats.significant(1.9e17, 2) == "1.9e17"
    assert formats.percents(-1.234, 0.5) == "-123 to 50 %"
    assert formats.percents(None, 0.5) == ""
    assert (formats.plural(1, "run"), formats.plural(2, "run")) == ("1 run", "2 runs")
