"""The little language of --hold-out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.launch.condition import parse_condition


def test_comparisons_and_conjunction():
    condition = parse_condition("c>=1e12 and n_active > 3e5")
    assert condition.columns == {"c", "n_active"}
    assert condition.holds({"c": 1e12, "n_active": 4e5})
    assert not condition.holds({"c": 9e11, "n_active": 4e5})
    assert not condition.holds({"c": 1e12, "n_active": 3e5})
    assert parse_condition("d != 3").holds({"d": 2})
    assert parse_condition("d<=3").holds({"d": 3})
    assert not parse_condition("d == 3").holds({"d": 2})


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_agrees_with_python(left, right):
    for sign, result in ((">", left > right), ("<", left < right), (">=", left >= right), ("==", left == right)):
        assert parse_condition(f"x{sign}{right!r}").holds({"x": left}) is result


@pytest.mark.parametrize(
    "text", ["", "c", "c>", ">1", "c>x", "c=1", "c>1 or c<2", "c>1 and", "__import__('os')", "c>nan"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match="is not a comparison"):
        parse_condition(text)
