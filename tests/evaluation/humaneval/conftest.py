"""The data set, and a sandbox of this machine."""

from __future__ import annotations

import pytest

from qconv.evaluation.humaneval.dataset import Problem, load_problems
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap


@pytest.fixture(scope="session")
def problems() -> tuple[Problem, ...]:
    """All 164."""
    return load_problems()


@pytest.fixture(scope="session")
def backend() -> Bubblewrap:
    """bubblewrap, as found."""
    found = Bubblewrap.find()
    if found is None:
        pytest.skip("bubblewrap is not installed (Debian: apt-get install bubblewrap): HumanEval is NOT tested")
    return found
