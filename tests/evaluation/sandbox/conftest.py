"""A sandbox of this machine; without bubblewrap its tests are skipped, and say so."""

from __future__ import annotations

import pytest

from qconv.evaluation.sandbox.bubblewrap import Bubblewrap


@pytest.fixture(scope="session")
def backend() -> Bubblewrap:
    """bubblewrap, as found."""
    found = Bubblewrap.find()
    if found is None:
        pytest.skip("bubblewrap is not installed (Debian: apt-get install bubblewrap): the sandbox is NOT tested")
    return found
