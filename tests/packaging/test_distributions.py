"""What people install: the wheel that is built from the sdist, on 3.11 whole, on later Pythons what needs no torch.

With QCONV_PACKAGE_PYTHONS=all the whole is done with every Python that there is.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.docs.console import CHECKOUT

pytestmark = pytest.mark.package
WITHOUT_TORCH = ("click", "pydantic", "PyYAML", "rich", "numpy")
"""What command line and recipes import."""
MODEL = CHECKOUT / "evals" / "models" / "tiny-coder-moe"


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that sees nothing of the checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@functools.cache
def interpreter(version: str) -> str | None:
    """A Python of that version which can make environments: this one, one on the path, or pyenv's."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for found in filter(None, (shutil.which(f"python{version}"), *map(str, kept))):
        tried = subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True)
        if tried.returncode == 0:
            return found
    return None


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist and the wheel that is built from it; the checkout is copied, so that what git ignores is not in it."""
    where = tmp_path_factory.mktemp("distributions")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=CHECKOUT).split("\0")
    for name in filter(None, tracked):
        if (CHECKOUT / name).is_file():
            target = where / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, target)
    run(sys.executable, "-m", "build", "--outdir", where / "dist", where / "source", cwd=where)
    (sdist,), (wheel,) = (where / "dist").glob("*.tar.gz"), (where / "dist").glob("*.whl")
    return sdist, wheel


def environment(python: str, where: Path, *packages: str | Path) -> Path:
    """The folder of programs of a new environment."""
    run(python, "-m", "venv", where, cwd=where.parent)
    programs = where / "bin"
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    for package in packages:
        run(*pip, "-c", CHECKOUT / "constraints.txt", package, cwd=where)
    return programs


def test_both_hold_recipes_suites_and_kernels_and_no_model(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    for folder in ("qconv/recipes/w4a16.yaml", "qconv/evals/suites/smoke.yaml", "qconv/evals/gates/default.yaml"):
        assert folder in names
    assert any(name.startswith("qconv/kernels/") and name.endswith(".cu") for name in names)
    with tarfile.open(sdist) as opened_tar:
        inside = opened_tar.getnames()
    assert any(name.endswith("/tests/conftest.py") for name in inside)
    for name in (*names, *inside):
        assert not name.endswith((".safetensors", ".gguf")), name
    assert wheel.stat().st_size < 4 * 2**20
    assert sdist.stat().st_size < 8 * 2**20


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_wheel_quantizes_and_measures_outside_the_checkout(
    version: str, distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} with venv")
    everything = os.environ.get("QCONV_PACKAGE_PYTHONS") == "all"
    if version != "3.11" and not everything:
        pytest.skip("whole runs with later Pythons: make package-all")
    torch = next(line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    programs = environment(python, tmp_path / "env", torch, distributions[1])
    qconv = programs / "qconv"
    assert run(qconv, "--version", cwd=tmp_path).startswith("qconv, version ")
    shutil.copytree(MODEL, tmp_path / "model")
    run(qconv, "quantize", "model", "--fmt", "w4a16", "--tokens", "1024", "-o", "build", cwd=tmp_path)
    run(qconv, "verify", "build", "--against", "model", cwd=tmp_path)
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{kind: text, name: stdlib, corpus: python-stdlib, tokens: 1024, context: 512}]\n")
    out = run(qconv, "eval", "run", "build", "--reference", "model", "--suite", suite, "-o", "measured", cwd=tmp_path)
    assert "kld.mean" in out or "KL divergence" in out
    run(qconv, "eval", "report", "measured", cwd=tmp_path)
    assert (tmp_path / "measured" / "report.html").is_file()


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_command_line_and_recipes_need_no_torch(version: str, distributions: tuple[Path, Path], tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} with venv")
    programs = environment(python, tmp_path / "env", *WITHOUT_TORCH)
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    run(*pip, distributions[1], cwd=tmp_path)
    assert run(programs / "qconv", "--version", cwd=tmp_path).startswith("qconv, version ")
    assert "quantize" in run(programs / "qconv", "--help", cwd=tmp_path)
    code = (
        "from qconv.planning.recipe import load_recipe, packaged_recipes\n"
        "names = packaged_recipes()\n"
        "print(len([load_recipe(name) for name in names if 'gguf' not in name]))\n"
    )
    assert int(run(programs / "python", "-c", code, cwd=tmp_path)) > 10
