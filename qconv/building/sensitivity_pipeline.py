"""How much a model's output cares about each of its linears, measured and kept in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.artifacts.source import Source
from qconv.building.completion import already_complete
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import Outcome, begin, enter, publish, require_apart
from qconv.calibration.corpus import build_tokens
from qconv.calibration.imatrix import layer_readings
from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.writer import ShardWriter, output_errors, sha256_of
from qconv.core.settings import TextSettings
from qconv.executors import DEFAULT, get_executor
from qconv.folders.journal import WORK_FOLDER, Journal, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.readings import SourceRecord
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME, FolderState
from qconv.sensitivity.sweep import Progress, Sweep, forward_key, scratch_bytes
from qconv.verification.checksums import render_checksums

SENSITIVITY_NAME = "sensitivity.safetensors"
Log = Callable[[str], None]


def measure_sensitivity(
    model: Path,
    out: Path,
    text: TextSettings,
    *,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Measure a model's sensitivity, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder that gets :data:`SENSITIVITY_NAME`, a report and checksums; made if absent.
        text: What the model reads; its seed is that of the labels, too.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts worked on at once; the bytes do not depend on it.
        executor: Where the work runs: the name of a module of :mod:`qconv.executors`.
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
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), get_executor(executor)(threads, math.inf) as workers:
        state = enter(out)
        tokens = build_tokens(text, source.checkpoint.path)
        log(f"sensitivity: {tokens.ids.numel():,} tokens of {tokens.source}")
        recipe = hashlib.sha256(f"sensitivity {text.model_dump_json()}".encode()).hexdigest()
        belongs = fingerprints(source, recipe, tokens, adds_up=True, companions="left out")
        if state is FolderState.COMPLETE and not restart:
            return already_complete(out, belongs, [SENSITIVITY_NAME], workers, progress)
        work = out / WORK_FOLDER

        def needed(committed: Collection[str]) -> int:
            present = sum(file.stat().st_size for file in work.glob("*.bin"))
            return max(0, scratch_bytes(source.architecture, tokens.ids.numel()) - present)

        journal, resumed = begin(out, belongs, [SENSITIVITY_NAME, REPORT_NAME], needed, restart=restart)
        if resumed:
            log(f"resuming: {len(journal.units)} of {2 * len(source.architecture.layers) + 1} steps are done")
        record = SourceRecord(source.checkpoint, journal, layer_readings(source, workers, forward_key))
        record.require_unchanged(progress)
        sweep = Sweep(source, tokens, text.seed, work, record, workers, progress)
        _write(out, sweep, journal)
        record.require_unchanged(progress)
        report: dict[str, Any] = {
            "qconv": __version__,
            "source": source.name,
            "format": "sensitivity",
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


def _write(out: Path, sweep: Sweep, journal: Journal) -> None:
    """The statistics of all layers as one file, unless it is there."""
    if SENSITIVITY_NAME in journal.units:
        return
    found = sweep.run()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]
    with ShardWriter(out / SENSITIVITY_NAME, specs, journal.staged(SENSITIVITY_NAME)) as writer:
        for name, tensor in found.items():
            writer.write(name, tensor)
        written = writer.finish()
        journal.announce([written])
        writer.publish()
    journal.commit(SENSITIVITY_NAME, {"size": written.size, "sha256": written.sha256})
