"""How much a model's output cares about each of its linears, measured and kept in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qconv import __version__
from qconv.artifacts.source import Source
from qconv.building.completion import already_complete
from qconv.building.inputs import fingerprints, lasting, on_devices
from qconv.building.output import Outcome, begin, enter, publish, require_apart
from qconv.calibration.corpus import TokenSet, build_tokens
from qconv.calibration.imatrix import layer_readings
from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.writer import ShardWriter, output_errors, sha256_of
from qconv.core.devices import Lending, devices_of, make_deterministic
from qconv.core.settings import TextSettings
from qconv.core.workers import Workers
from qconv.executors import DEFAULT, get_executor
from qconv.folders.journal import WORK_FOLDER, Journal, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.readings import SourceRecord
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME, FolderState
from qconv.sensitivity.allocating import SENSITIVITY_NAME
from qconv.sensitivity.sweep import Progress, Sweep, forward_key, scratch_bytes
from qconv.verification.checksums import render_checksums

Log = Callable[[str], None]


def measure_sensitivity(
    model: Path,
    out: Path,
    text: TextSettings,
    *,
    gradients: bool = True,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    progress: Progress,
    log: Log,
) -> Outcome:
    """Measure a model's sensitivity, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder that gets :data:`SENSITIVITY_NAME`, a report and checksums; made if absent.
        text: What the model reads; its seed is that of the labels, too.
        gradients: Whether to go back through the layers; without, linears' inputs are all that is measured.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts worked on at once; the bytes do not depend on it.
        executor: Where the work runs: the name of a module of :mod:`qconv.executors`.
        devices: On what layers are computed; see :func:`qconv.core.devices.devices_of`.
        progress: Told the step at work, the layers done and twice the layers in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError: the text is too short.
        CheckpointError: the source is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what an earlier run kept is gone or damaged.
    """
    require_apart(model, out)
    source = Source.open(model)
    for notice in source.notices():
        log(f"source: {notice}")
    places = devices_of(devices)
    make_deterministic(places)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), get_executor(executor)(threads, math.inf, Lending(places)) as workers:
        state = enter(out)
        tokens = build_tokens(text, source.checkpoint.path)
        log(f"sensitivity: {tokens.ids.numel():,} tokens of {tokens.source}")
        belongs = on_devices(sweep_fingerprints(source, text, tokens, gradients), places)
        if state is FolderState.COMPLETE and not restart:
            return already_complete(out, belongs, [SENSITIVITY_NAME], workers, progress)
        work = out / WORK_FOLDER

        def needed(committed: Collection[str]) -> int:
            present = sum(file.stat().st_size for file in work.glob("*.bin"))
            return max(0, scratch_bytes(source.architecture, tokens.ids.numel(), gradients) - present)

        journal, resumed = begin(out, belongs, [SENSITIVITY_NAME, REPORT_NAME], needed, restart=restart)
        if resumed:
            log(f"resuming: {_standing(source, journal, gradients)}")
        if SENSITIVITY_NAME not in journal.units:
            _write(out, sweep(source, text, tokens, journal, workers, progress, gradients), journal)
        report: dict[str, Any] = {
            "qconv": __version__,
            "source": source.name,
            "format": "sensitivity",
            "gradients": gradients,
            "fingerprints": lasting(journal.fingerprints),
            "calibration": text.model_dump(mode="json"),
            "tokens": tokens.ids.numel(),
            "text": tokens.source,
        }
        publish(out, journal, {REPORT_NAME: (json.dumps(report, indent=2) + "\n").encode()})
        sums = {name: sha256_of(out / name) for name in (SENSITIVITY_NAME, REPORT_NAME)}
        publish(out, journal, {CHECKSUMS_NAME: render_checksums(sums).encode()})
        remove_claimed(work)
        return Outcome(out, report, already_complete=False)


def sweep(
    source: Source,
    text: TextSettings,
    tokens: TokenSet,
    journal: Journal,
    workers: Workers,
    progress: Progress,
    gradients: bool,
) -> dict[str, Tensor]:
    """The statistics of a model, from files beside the journal, which holds what is done.

    Raises:
        StaleJournalError: the source holds other numbers than what is done was made of.
        CheckpointError: a weight cannot be read or is not finite.
        OutputError: the disk is full.
        VerificationError: what an earlier run kept is gone or damaged.
    """
    record = SourceRecord(source.checkpoint, journal, layer_readings(source, workers, forward_key))
    record.require_unchanged(progress)
    passes = Sweep(source, tokens, text.seed, journal.path.parent, record, workers, progress)
    found = passes.run() if gradients else passes.run_forward()
    record.require_unchanged(progress)
    return found


def sweep_fingerprints(source: Source, text: TextSettings, tokens: TokenSet, gradients: bool) -> dict[str, str]:
    """What a sweep belongs to."""
    said = f"sensitivity {text.model_dump_json()}{'' if gradients else ' without gradients'}"
    recipe = hashlib.sha256(said.encode()).hexdigest()
    return fingerprints(source, recipe, tokens, adds_up=True, companions="left out")


def _standing(source: Source, journal: Journal, gradients: bool) -> str:
    steps = (2 if gradients else 1) * len(source.architecture.layers) + 1
    return f"{len(journal.units)} of {steps} steps are done"


def _write(out: Path, found: Mapping[str, Tensor], journal: Journal) -> None:
    """The statistics of all layers as one file."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]
    with ShardWriter(out / SENSITIVITY_NAME, specs, journal.staged(SENSITIVITY_NAME)) as writer:
        for name, tensor in found.items():
            writer.write(name, tensor)
        written = writer.finish()
        journal.announce([written])
        writer.publish()
    journal.commit(SENSITIVITY_NAME, {"size": written.size, "sha256": written.sha256})
