"""What ``make sanitize`` plants is still there to be planted."""

from __future__ import annotations

import pytest

from evals.sanitize import CHECKOUT, FIRST_USE, PLANTED, TESTS, Planted
from qconv import native


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.what)
def test_a_planted_bug_changes_a_source_or_patches_a_caller(bug: Planted) -> None:
    assert (bug.edit is None) != (not bug.patch)
    if bug.edit is not None:
        file, before, after = bug.edit
        text = (native.kernels_folder() / "cpu" / file).read_text()
        assert text.count(before) >= 1
        assert before != after


def test_the_tests_are_there() -> None:
    assert FIRST_USE in TESTS
    assert all((CHECKOUT / name).is_file() for name in TESTS)
