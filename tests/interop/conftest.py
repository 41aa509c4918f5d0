"""Builds made through the command line, and calls into the environments of other people's code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from tests.interop import environments

MODEL = environments.CHECKOUT / "evals" / "models" / "tiny-coder-moe"
# Enough that every expert of the tiny model is calibrated; what is tested here is the files, not their quality.
CALIBRATION_TOKENS = 8192


class Client(Protocol):
    """Runs ``tests/interop/clients/SCRIPT.py`` in an environment (None: qconv's own)."""

    def __call__(self, environment: str | None, script: str, *arguments: object) -> None: ...


@pytest.fixture(scope="session")
def client() -> Client:
    def run(environment: str | None, script: str, *arguments: object) -> None:
        interpreter = Path(sys.executable) if environment is None else environments.interpreter(environment)
        # The model is so small that threads wait for each other longer than they compute.
        settings = {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        _run([interpreter, "-m", f"tests.interop.clients.{script}", *arguments], **settings)

    return run


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A build of the bundled model by format and method, made once a session."""

    @functools.cache
    def make(fmt: str, method: str) -> Path:
        out = tmp_path_factory.mktemp(f"{fmt}-{method}") / "build"
        command: list[object] = [sys.executable, "-m", "qconv", "quantize", MODEL, "--fmt", fmt, "-o", out]
        command += ["--method", method]
        if method != "rtn":
            command += ["--tokens", CALIBRATION_TOKENS]
        _run(command)
        return out

    return make


@pytest.fixture
def build_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A build of the bundled model by a recipe's values; calibration is short."""

    def make(values: dict[str, Any]) -> Path:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**values, "calibration": {"tokens": CALIBRATION_TOKENS}}))
        _run([sys.executable, "-m", "qconv", "quantize", MODEL, "--recipe", recipe, "-o", tmp_path / "build"])
        return tmp_path / "build"

    return make


@pytest.fixture
def build_to_bits(tmp_path: Path) -> Callable[..., Path]:
    """A w4a16 build of the bundled model whose grids are chosen for bits per weight, without gradients."""

    def make(bits: float, *rules: dict[str, str]) -> Path:
        given = [value for rule in rules for value in ("--rule", f"{rule['match']}={rule['grid']}")]
        command = [sys.executable, "-m", "qconv", "quantize", MODEL, "--fmt", "w4a16", *given]
        wanted = ["--target-bits", bits, "--no-gradients", "--tokens", CALIBRATION_TOKENS]
        _run([*command, *wanted, "-o", tmp_path / "build"])
        return tmp_path / "build"

    return make


def _run(command: list[object], **variables: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=environments.CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
