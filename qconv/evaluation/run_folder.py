"""A run's folder: entered once, continued only by the same request; and what is recorded of where a run took place."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

from qconv import __version__
from qconv.build import REPORT_NAME
from qconv.checkpoint.reader import read_json
from qconv.checkpoint.writer import output_errors, write_atomically
from qconv.errors import OutputError
from qconv.evaluation.engines.base import Engine
from qconv.evaluation.record import RUN_NAME, Artifact, FileRef, store_json
from qconv.evaluation.suites import Suite
from qconv.manifest import WORK_FOLDER, require_same

KEY_NAME = "key.json"
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "gguf")


def enter(out: Path, restart: bool) -> None:
    """Make the folder, or check that it holds a run.

    Raises:
        OutputError: it holds something else.
    """
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in out.iterdir()}
        if not found:
            return
        if RUN_NAME not in found and WORK_FOLDER not in found:
            raise OutputError(f"{out}: holds something else than a run.", hint="Choose another folder.")
        if restart:
            for name in found:
                shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        elif RUN_NAME in found:
            raise OutputError(f"{out}: holds a finished run.", hint="Choose another folder, or give --restart.")


def run_key(suite: Suite, build: Artifact, reference: Artifact | None, engine: Engine) -> dict[str, str]:
    """What an interrupted run must share with the one that continues it."""
    return {
        "build": build.sha256,
        "reference": "none" if reference is None else reference.sha256,
        "suite": suite.digest(),
        "engine": hashlib.sha256(json.dumps(dict(engine.identity), sort_keys=True).encode()).hexdigest(),
        "qconv": __version__,
    }


def require_key(work: Path, key: Mapping[str, str]) -> None:
    """Keep the key, or check that it is the one that was kept.

    Raises:
        StaleJournalError: the folder holds the beginning of another run.
        OutputError: it cannot be written.
    """
    with output_errors(work):
        work.mkdir(exist_ok=True)
    file = work / KEY_NAME
    if file.exists():
        require_same(work.parent, json.loads(file.read_text()), key)
    else:
        write_atomically(file, json.dumps(key).encode())


def kept_report(build: Path, out: Path) -> FileRef | None:
    """A copy of the build's own report, which outlives the build."""
    path = (build if build.is_dir() else build.parent) / REPORT_NAME
    return store_json(out, read_json(path)) if path.is_file() else None


def versions() -> dict[str, str]:
    """Of everything that computes."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"qconv": __version__, "python": platform.python_version(), **found}


def device_facts(device: str) -> dict[str, str]:
    """What computed, for the record."""
    from qconv.evaluation.engines.local import device_name

    return {"device": device_name(device), "machine": platform.machine(), "system": platform.system()}
