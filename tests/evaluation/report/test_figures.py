"""Numbers for people: digits that say something, and never a letter for an exponent."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.evaluation.report.figures import Form, interval, limit, nbytes, number


@pytest.mark.parametrize(
    ("value", "form", "told"),
    [
        (None, "plain", "-"),
        (0.0, "plain", "0"),
        (-0.0, "share", "0 %"),
        (44.11332, "plain", "44.1"),
        (0.00188943, "plain", "0.00189"),
        (28120.4, "plain", "28,120"),
        (2.812e-9, "plain", "2.8·10⁻⁹"),
        (9.96e-9, "plain", "1.0·10⁻⁸"),
        (1.257e-19, "plain", "below 10⁻¹²"),
        (3e20, "plain", "3.0·10²⁰"),
        (0.97928, "share", "97.9 %"),
        (1.0025, "factor", "+0.250 %"),
        (0.99, "factor", "-1.00 %"),
        (1.0, "factor", "0 %"),
        (math.nan, "plain", "not finite"),
        (math.inf, "share", "not finite"),
    ],
)
def test_numbers_are_told_as_people_write_them(value: float | None, form: Form, told: str) -> None:
    assert number(value, form) == told


def test_a_value_and_its_interval_have_the_same_decimals() -> None:
    assert interval(0.0006774, 0.0008848, 0.00075434) == ("0.000754", "0.000677 to 0.000885")
    assert interval(0.2, 0.9, 2 / 3, "share") == ("66.7 %", "20.0 % to 90.0 %")
    assert interval(1.00017, 1.00216, 1.00091, "factor") == ("+0.091 %", "+0.017 % to +0.216 %")
    assert interval(99.991, 100.011, 100.0) == ("100.000", "99.991 to 100.011"), "two digits of the width"
    assert interval(None, 1.0, 0.5) == ("0.500", "-")
    assert interval(0.0, 0.0, 0.0) == ("0", "0 to 0")


def test_what_somebody_chose_has_no_zeros_that_say_nothing() -> None:
    assert [limit(0.05), limit(1.03, "factor"), limit(0.12, "share"), limit(30000.0)] == [
        "0.05",
        "+3 %",
        "12 %",
        "30,000",
    ]


def test_sizes_are_decimal() -> None:
    assert [nbytes(9_425_744), nbytes(960e9), nbytes(999), nbytes(1.5e12)] == [
        "9.43 MB",
        "960 GB",
        "999 bytes",
        "1.50 TB",
    ]


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(["plain", "share", "factor"]))
def test_any_number_is_told_without_an_exponent(value: float, form: Form) -> None:
    told = number(value, form)
    assert not re.search(r"\de", told)
    assert len(told) < 40
    plain = re.fullmatch(r"([+-]?[\d,]+(?:\.\d+)?)", told)
    if form == "plain" and plain and value:
        assert float(plain[1].replace(",", "")) == pytest.approx(value, rel=6e-3)


@given(st.lists(st.floats(min_value=-1e300, max_value=1e300), min_size=3, max_size=3).map(sorted))
def test_any_interval_is_told_in_order(values: list[float]) -> None:
    low, value, high = values
    told = interval(low, high, value)
    assert " to " in told[1]
    assert "e" not in told[0].replace("below", "")
