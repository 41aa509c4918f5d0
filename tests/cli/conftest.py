"""What the tests of the command line share: the command in this process and as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from click.testing import CliRunner, Result

from qconv.building.bench import SliceShape, write_slice
from qconv.cli.main import qconv

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = SliceShape(hidden_size=64, expert_width=64, heads=2, kv_heads=1, head_dim=32, vocab_size=512, top_k=2)
"""As small as a group size of 32 allows: what is tested is the command line."""

Invoke = Callable[..., Result]


class Start(Protocol):
    """Starts ``python -m qconv`` as a process."""

    def __call__(self, *arguments: object, **popen: Any) -> subprocess.Popen[str]: ...


@pytest.fixture
def invoke() -> Invoke:
    """Runs the command in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(qconv, [str(argument) for argument in arguments], catch_exceptions=False)

    return run


@pytest.fixture
def start() -> Start:
    """Starts the command as a process, without what the environment says about terminals."""

    def run(*arguments: object, **popen: Any) -> subprocess.Popen[str]:
        telling = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        environment = {key: value for key, value in os.environ.items() if key not in telling}
        environment |= popen.pop("env", {})
        popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
        command = [sys.executable, "-m", "qconv", *map(str, arguments)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **popen)

    return run


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled model."""
    return REPOSITORY / "evals/models/tiny-coder-moe"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of eight layers that is quantized in a moment; do not write to it."""
    out = tmp_path_factory.mktemp("small") / "model"
    write_slice(out, layers=8, experts=4, shape=SMALL)
    return out


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The bundled model rounded to w4a16; do not write to it."""
    out = tmp_path_factory.mktemp("build") / "w4a16"
    arguments = ["quantize", str(tiny), "-o", str(out), "--fmt", "w4a16", "--method", "rtn", "--json"]
    result = CliRunner().invoke(qconv, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["already_complete"] is False
    return out
