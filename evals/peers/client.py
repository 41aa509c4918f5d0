"""Scripts of ``clients/`` run as child processes, each in the environment of the code that it calls."""

# Only light imports here: a child's maximum resident set starts at that of the process that spawned it.
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qconv.errors import QconvError
from tests.interop import environments

REPOSITORY = Path(__file__).resolve().parents[2]
_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",  # it crashes on less than 3 cores without
}


def run(environment: str | None, script: str, *arguments: object, threads: int) -> None:
    """Run ``clients/SCRIPT.py`` in an environment that is made if need be (None: qconv's own).

    Args:
        environment: Its name; versions are pinned in ``tests/interop/requirements-NAME.txt``.
        script: The client's name.
        arguments: What the client is given.
        threads: OpenMP threads of the child.

    Raises:
        QconvError: the client failed; with the end of what it printed.
    """
    python = Path(sys.executable) if environment is None else environments.make(environment)
    command = [str(python), "-m", f"evals.peers.clients.{script}", *map(str, arguments)]
    variables = os.environ | _VARIABLES | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    # Some write logs into their working directory.
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise QconvError(
            f"{script} ended with {finished.returncode}:\n{finished.stdout[-1000:]}{finished.stderr[-4000:]}"
        )
