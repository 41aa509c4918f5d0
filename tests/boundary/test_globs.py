"""Shell patterns of modules' names: what fits, and that no pattern takes long."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qconv.boundary.globs import names_module

GATE = "model.layers.3.mlp.experts.17.gate_proj"
FITTING = ["gate_proj", "*.gate_proj", "experts.*.gate_proj", "experts.*", "mlp.*", "layers.3.*", "model.*", "*", GATE]
OTHERS = ["proj", "ate_proj", "experts", "layers.3", "experts.[!1]*", "gate_proj.*", "GATE_PROJ", "", "gate-proj"]
TEXTS = st.text(alphabet="ab.*?[]!-^", max_size=12)


@pytest.mark.parametrize("pattern", FITTING)
def test_a_pattern_fits_from_any_dot_on(pattern: str) -> None:
    assert names_module(pattern, GATE)


@pytest.mark.parametrize("pattern", OTHERS)
def test_whole_parts_of_the_name_are_compared(pattern: str) -> None:
    assert not names_module(pattern, GATE)


def fits(pattern: str, text: str) -> bool:
    """A star, a question mark and letters, by the definition."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(fits(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and fits(pattern[1:], text[1:])


@given(st.text(alphabet="ab.*?", max_size=6), st.text(alphabet="ab.", max_size=8))
def test_it_is_the_definition_of_a_shell_pattern(pattern: str, name: str) -> None:
    starts = [0, *(place + 1 for place, one in enumerate(name) if one == ".")]
    assert names_module(pattern, name) == any(fits(pattern, name[start:]) for start in starts)


@given(TEXTS, st.text(alphabet="ab.-", max_size=12))
@example("[[a]", "[")
@example("[a--]", "-")
@example("[!", "[!")
def test_sets_are_the_standard_librarys(pattern: str, name: str) -> None:
    assert names_module(pattern, name) == (
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    )


@given(st.lists(st.sampled_from(["*a", "*", "*?", "a*", "*[ab]", "*.", "*a*b"]), min_size=40, max_size=160))
@example(["*a"] * 200)
@example(["*a*"] * 100)
def test_no_pattern_can_make_matching_explode(parts: list[str]) -> None:
    # An engine that goes back over 40 stars and 400 letters would not end in this life; the test ends or hangs.
    pattern = "".join(parts) + "c"
    assert not names_module(pattern, "a" * 200 + "." + "a" * 200)
