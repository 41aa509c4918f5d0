"""An importance matrix by itself, for llama.cpp's programs or for several GGUF builds of one model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.artifacts.source import Source
from qconv.building.completion import already_complete
from qconv.building.gguf_report import Coverage
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import Outcome, begin, enter, publish, require_apart
from qconv.calibration.corpus import build_tokens
from qconv.calibration.imatrix import IMATRIX_NAME, Progress, collect_imatrix, layer_readings, scratch_bytes
from qconv.checkpoint.writer import output_errors, sha256_of
from qconv.core.settings import TextSettings
from qconv.executors.threads import Workers
from qconv.folders.journal import WORK_FOLDER, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.readings import SourceRecord
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME, FolderState
from qconv.formats.gguf.imatrix import read_imatrix
from qconv.formats.gguf.metadata import require_expressible
from qconv.formats.gguf.names import gguf_tensors
from qconv.planning.gguf_recipe import ImatrixSettings
from qconv.verification.checksums import render_checksums

Log = Callable[[str], None]


def write_model_imatrix(
    model: Path,
    out: Path,
    text: TextSettings,
    *,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Collect a model's importance matrix, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder that gets ``imatrix.gguf``, a report and checksums; made if absent.
        text: What the model reads.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts worked on at once; the bytes do not depend on it.
        progress: Told the layer at work, the weights passed and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError: llama.cpp cannot express the model, or the text is too short.
        CheckpointError: the source is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
    """
    require_apart(model, out)
    source = Source.open(model)
    name = source.name
    for notice in source.notices():
        log(f"source: {notice}")
    described = source.architecture
    require_expressible(source.checkpoint.config, described)
    tensors = gguf_tensors(described)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), Workers(threads) as workers:
        state = enter(out)
        tokens = build_tokens(text, source.checkpoint.path)
        log(f"imatrix: {tokens.ids.numel():,} tokens of {tokens.source}")
        belongs = fingerprints(source, "imatrix", tokens, adds_up=True, companions="left out")
        if state is FolderState.COMPLETE and not restart:
            return already_complete(out, belongs, [IMATRIX_NAME], workers, progress)
        work = out / WORK_FOLDER

        def needed(committed: Collection[str]) -> int:
            return 0 if IMATRIX_NAME in committed else scratch_bytes(described, tokens, work)

        journal, resumed = begin(out, belongs, [IMATRIX_NAME, REPORT_NAME], needed, restart=restart)
        if resumed:
            log(f"resuming: {len(journal.units)} of {len(described.layers)} layers are collected")
        record = SourceRecord(source.checkpoint, journal, layer_readings(source, workers))
        record.require_unchanged(progress)
        path = collect_imatrix(source, tokens, out, work, journal, record, workers, progress)
        record.require_unchanged(progress)
        coverage = Coverage.of(read_imatrix(path), tensors, ImatrixSettings().shrinkage_tokens)
        report: dict[str, Any] = {
            "qconv": __version__,
            "source": name,
            "format": "imatrix",
            "fingerprints": lasting(journal.fingerprints),
            "calibration": text.model_dump(mode="json"),
            "datasets": [tokens.source],
            "coverage": coverage.values(),
        }
        publish(out, journal, {REPORT_NAME: (json.dumps(report, indent=2) + "\n").encode()})
        sums = {name: sha256_of(out / name) for name in (IMATRIX_NAME, REPORT_NAME)}
        publish(out, journal, {CHECKSUMS_NAME: render_checksums(sums).encode()})
        remove_claimed(work)
        return Outcome(out, report, already_complete=False)
