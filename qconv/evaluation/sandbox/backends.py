"""Which program makes the sandboxes here.

All of them need user namespaces. What the kernel gives without (Landlock, seccomp, limits) is not enough for one: a
candidate would still see which files exist, since stat(2) cannot be restricted, and its /tmp would be the machine's,
with no bound on bytes and files. Tried as a guest confined by these alone, 92 of 95 forgeries and escapes failed.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconv.errors import NoSandboxError
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.sandbox.forgery import CHECK
from qconv.evaluation.sandbox.judge import judge
from qconv.evaluation.sandbox.podman import Podman
from qconv.evaluation.sandbox.seccomp import denied_calls
from qconv.evaluation.sandbox.verdict import Status

_TRIAL = "def double(x): return x * 2"
INSTALL = "Install one: pip install 'qconv[evals]', or apt-get install bubblewrap."
ALLOW = "Allow unprivileged user namespaces (a container's seccomp and AppArmor profiles forbid them)."


def find_backend() -> Backend:
    """The first that starts a program here: bubblewrap, the system's own or the packaged one, else rootless podman.

    Whether it also confines is what ``proof.prove`` finds out.

    Raises:
        NoSandboxError: there is none. Model-written code is never run without.
    """
    denied_calls()
    reasons = []
    for backend in _installed():
        verdict = judge(backend, CHECK, _TRIAL)
        if verdict.status is not Status.INFRASTRUCTURE:
            return backend
        reasons.append(f"{backend.name} does not start ({verdict.reason.rstrip('.')})")
    if not reasons:
        raise NoSandboxError(
            "no sandbox for model-written code: neither bubblewrap nor, for an ordinary user, podman is installed.",
            hint=INSTALL,
        )
    raise NoSandboxError(f"no sandbox for model-written code: {'; '.join(reasons)}.", hint=ALLOW)


def _installed() -> Iterator[Backend]:
    yield from Bubblewrap.installed()
    if podman := Podman.find():
        yield podman
