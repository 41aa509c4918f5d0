"""The data set."""

from __future__ import annotations

import pytest

from qconv.evaluation.humaneval.dataset import Problem, load_problems


@pytest.fixture(scope="session")
def problems() -> tuple[Problem, ...]:
    """All 164."""
    return load_problems()
