"""A run's folder: entered once, continued only by the same request; and what is recorded of where a run took place."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from qconv import __version__
from qconv.boundary.reading import read_json
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, output_errors, write_atomically
from qconv.errors import ArtifactError, OutputError
from qconv.evaluation.engines.base import Engine
from qconv.evaluation.kept_files import FILES_FOLDER, store_json
from qconv.evaluation.record import RUN_NAME, Artifact, FileRef, Run, read_run
from qconv.evaluation.suites import Suite
from qconv.folders.journal import locked, require_fingerprints, require_same
from qconv.folders.ownership import (
    LEDGER_NAME,
    WORK_FOLDER,
    claim,
    claimed,
    ledger,
    own_folder,
    recover,
    remove_claimed,
    replaced,
    require_own,
    strangers,
    within,
)
from qconv.folders.state import REPORT_NAME

KEY_NAME = "key.json"
_KEYS = frozenset({"build", "reference", "suite", "engine", "qconv"})
_BARE = frozenset({LEDGER_NAME, f"{KEY_NAME}{TEMPORARY_SUFFIX}"})
"""What a run that was killed before it kept its key leaves in its work folder."""
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "gguf")


def enter(out: Path, restart: bool) -> None:
    """Check that a folder is empty, or holds the beginning of a run, or a finished one that is to be discarded.

    What a killed ``--restart`` left is put in order first. Beside a finished run that was killed before its work folder
    was gone, only :func:`begin` can tell whether it is the one that is asked for again.

    Raises:
        OutputError: it holds something else, or a finished run that is to be kept.
    """
    recover(out)
    owned = owned_files(out)
    with output_errors(out):
        found = {path.name for path in out.iterdir()}
        work = {path.name for path in (out / WORK_FOLDER).glob("*")}
    finished = RUN_NAME in found & owned.keys()
    bare = found == {WORK_FOLDER} and work <= _BARE and not strangers(out, owned)
    if found and not finished and not bare and KEY_NAME not in work:
        named = ", ".join(sorted(found)[:5])
        raise OutputError(f"{out}: holds something else than a run: {named}.", hint="Choose another folder.")
    if restart:
        require_own(out, owned)
    elif finished and WORK_FOLDER not in found:
        raise _finished(out)


def begin(out: Path, key: Mapping[str, str], restart: bool) -> None:
    """Begin a run whose whole request is known to be good, or check that the one that was begun is the same.

    Args:
        out: The run's folder, which :func:`enter` found fit.
        key: What the run belongs to.
        restart: Discard what ``out`` holds; until the new run has begun nothing of it is lost.

    Raises:
        StaleJournalError: the folder holds the beginning of another run.
        OutputError: it cannot be written, or holds something that no run is known to have written.
    """
    if restart:
        owned = owned_files(out)
        require_own(out, owned)
        with replaced(out, owned):
            require_key(out / WORK_FOLDER, key)
    else:
        if (out / RUN_NAME).exists() and _key_of(read_run(out)) != key:
            raise _finished(out)
        require_key(out / WORK_FOLDER, key)


def remove_left(out: Path) -> None:
    """Remove what is left of the work folder beside a finished run, after a kill right behind its record.

    Raises:
        OutputError: another process works there, or something cannot be removed.
    """
    if (out / WORK_FOLDER).is_dir():
        with locked(out):
            remove_claimed(out / WORK_FOLDER)


def _finished(out: Path) -> OutputError:
    return OutputError(f"{out}: holds a finished run.", hint="Choose another folder, or give --restart.")


def owned_files(out: Path) -> dict[str, frozenset[str] | None]:
    """What can be proven to be qconv's in the folder of a run, finished or not."""
    owned = within(WORK_FOLDER, claimed(out / WORK_FOLDER))
    listed = ledger(out)
    if listed is not None:
        owned |= listed
    else:  # versions before this one kept no ledgers
        with contextlib.suppress(ArtifactError):
            read_run(out)
            owned[RUN_NAME] = None
        with contextlib.suppress(ArtifactError):
            key = read_json(out / WORK_FOLDER / KEY_NAME, ArtifactError)
            if isinstance(key, dict) and key.keys() >= _KEYS:
                owned[f"{WORK_FOLDER}/{KEY_NAME}"] = None
    for file in (out / FILES_FOLDER).glob("*"):
        owned[f"{FILES_FOLDER}/{file.name}"] = frozenset({file.name.partition(".")[0]})
    return owned


def run_key(suite: Suite, build: Artifact, reference: Artifact | None, engine: Engine) -> dict[str, str]:
    """What an interrupted run must share with the one that continues it."""
    return _key(build, reference, suite.digest(), engine.identity, __version__)


def _key_of(run: Run) -> dict[str, str]:
    """The key of a finished run."""
    return _key(run.build, run.reference, run.suite_sha256, run.engine, run.qconv)


def _key(
    build: Artifact, reference: Artifact | None, suite: str, engine: Mapping[str, str], version: str
) -> dict[str, str]:
    return {
        "build": build.sha256,
        "reference": "none" if reference is None else reference.sha256,
        "suite": suite,
        "engine": hashlib.sha256(json.dumps(dict(engine), sort_keys=True).encode()).hexdigest(),
        "qconv": version,
    }


def require_key(work: Path, key: Mapping[str, str]) -> None:
    """Keep the key, or check that it is the one that was kept.

    Raises:
        StaleJournalError: the folder holds the beginning of another run.
        ArtifactError: the key that was kept is damaged.
        OutputError: it cannot be written.
    """
    file = own_folder(work) / KEY_NAME
    if os.path.lexists(file):
        hint = f"Start over with --restart, or remove {work}."
        kept = read_json(file, ArtifactError, hint=hint)
        require_same(work.parent, require_fingerprints(kept, str(file), hint), key)
    else:
        claim(file)
        write_atomically(file, json.dumps(key).encode(), claim(work / f"{KEY_NAME}{TEMPORARY_SUFFIX}"))


def kept_report(build: Path, out: Path) -> FileRef | None:
    """A copy of the build's own report, which outlives the build."""
    path = (build if build.is_dir() else build.parent) / REPORT_NAME
    hint = "Restore it, or make the build again."
    return store_json(out, read_json(path, ArtifactError, hint=hint)) if path.is_file() else None


def versions() -> dict[str, str]:
    """Of everything that computes."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"qconv": __version__, "python": platform.python_version(), **found}


def device_facts(device: str) -> dict[str, str]:
    """What computed, for the record."""
    from qconv.evaluation.engines.local import device_name

    return {"device": device_name(device), "machine": platform.machine(), "system": platform.system()}
