"""Which program makes the sandboxes here."""

from __future__ import annotations

from qconv.errors import SandboxError
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.sandbox.podman import Podman
from qconv.evaluation.sandbox.seccomp import denied_calls


def find_backend() -> Backend:
    """bubblewrap, else rootless podman. Whether it works here is what ``proof.prove`` finds out.

    Raises:
        SandboxError: there is none. Model-written code is never run without.
    """
    denied_calls()
    backend = Bubblewrap.find() or Podman.find()
    if backend is None:
        raise SandboxError(
            "no sandbox for model-written code: neither bubblewrap nor, for an ordinary user, podman is installed.",
            hint="Install it (Debian, Ubuntu: apt-get install bubblewrap), or choose a suite without HumanEval.",
        )
    return backend
