"""A sandbox of this machine. The extra ``dev`` brings one, so only a machine that forbids user namespaces has none."""

from __future__ import annotations

import pytest

from qconv.errors import NoSandboxError
from qconv.evaluation.sandbox.backends import find_backend
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap


@pytest.fixture(scope="session")
def backend() -> Bubblewrap:
    """bubblewrap, the system's own or the packaged one, as found."""
    try:
        found = find_backend()
    except NoSandboxError as error:
        pytest.skip(f"the sandbox is NOT tested: {error}")
    assert isinstance(found, Bubblewrap)
    return found
