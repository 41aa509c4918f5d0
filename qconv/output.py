"""The output folder: whose it is, what may be removed from it, and the small files that complete a build."""

from __future__ import annotations

import enum
import fnmatch
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.build import REPORT_NAME, SCALES_FOLDER
from qconv.checkpoint.reader import INDEX_NAME, read_json
from qconv.checkpoint.writer import output_errors, write_atomically
from qconv.errors import CheckpointError, OutputError, UsageError
from qconv.manifest import JOURNAL_NAME, WORK_FOLDER, Journal, require_same
from qconv.plan import BuildPlan
from qconv.report import Report
from qconv.rope import in_both_spellings
from qconv.source import COMPANION_PATTERNS, Source
from qconv.verification.checksums import CHECKSUMS_NAME

REMOVABLE = (
    "*.safetensors",
    "*.gguf",
    "*.partial",
    "*.json",
    "README.md",
    CHECKSUMS_NAME,
    SCALES_FOLDER,
    WORK_FOLDER,
    *COMPANION_PATTERNS,
)
"""What a checkpoint or build is made of: the only names that ``--restart`` removes."""


class FolderState(enum.Enum):
    """What an output folder holds."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        out: The build's folder.
        report: Its report's values.
        already_complete: Whether there was nothing left to do.
    """

    out: Path
    report: dict[str, Any]
    already_complete: bool


def enter(out: Path, restart: bool) -> FolderState:
    """What ``out`` holds at the start of a run, which ``restart`` discards first.

    Raises:
        OutputError: it is foreign, or cannot be read or emptied.
    """
    if restart:
        clear(out)
    state = folder_state(out)
    if state is FolderState.FOREIGN:
        raise OutputError(
            f"{out}: is not empty and not a build of qconv.",
            hint="Choose another folder, or --restart to discard a model that lies there.",
        )
    return state


def already_complete(out: Path, fingerprints: Mapping[str, str]) -> Outcome:
    """The outcome of asking for a build that is complete already.

    Raises:
        CheckpointError: its report cannot be read.
        StaleJournalError: it was made from other inputs.
    """
    report = finished_report(out)
    require_same(out, report["fingerprints"], fingerprints)
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    return Outcome(out, report, already_complete=True)


def open_journal(out: Path, fingerprints: Mapping[str, str]) -> tuple[Journal, bool]:
    """The journal of a run, and whether it goes on from an earlier one.

    Raises:
        OutputError: it cannot be written.
        ArtifactError: it is damaged.
        StaleJournalError: the earlier run had other inputs.
    """
    path = out / WORK_FOLDER / JOURNAL_NAME
    with output_errors(path):
        path.parent.mkdir(exist_ok=True)
    journal = Journal.load(path)
    if journal is None:
        return Journal.create(path, fingerprints), False
    journal.require(fingerprints)
    return journal, True


def require_published(path: Path, size: int) -> None:
    """Check that a committed file is still there, as large as it was.

    Raises:
        OutputError: it is not.
    """
    if not path.is_file() or path.stat().st_size != size:
        raise OutputError(
            f"{path}: was committed but is now missing or of another size.",
            hint="Put it back, or start over with --restart.",
        )


def folder_state(out: Path) -> FolderState:
    """What ``out`` holds.

    Raises:
        OutputError: it is not a folder, or cannot be read.
    """
    with output_errors(out):
        if not out.exists():
            return FolderState.EMPTY
        if not out.is_dir():
            raise OutputError(f"{out}: is a file.", hint="Give a folder.")
        if (out / CHECKSUMS_NAME).is_file() and (out / REPORT_NAME).is_file():
            return FolderState.COMPLETE
        if (out / WORK_FOLDER / JOURNAL_NAME).is_file():
            return FolderState.UNFINISHED
        # A run killed before its first journal line leaves the bare work folder: nothing is lost by starting anew.
        names = {entry.name for entry in out.iterdir()}
        return FolderState.EMPTY if names <= {WORK_FOLDER} else FolderState.FOREIGN


def finished_report(out: Path) -> dict[str, Any]:
    """The report of a finished build.

    Raises:
        CheckpointError: it cannot be read or names no fingerprints.
    """
    report = read_json(out / REPORT_NAME)
    if not isinstance(report.get("fingerprints"), dict):
        raise CheckpointError(f"{out / REPORT_NAME}: names no fingerprints.", hint="Start over with --restart.")
    return report


def require_apart(model: Path, out: Path) -> None:
    """Check that neither folder is or contains the other.

    Raises:
        UsageError: they overlap.
    """
    source, target = model.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(f"{out}: overlaps the model's folder {model}.", hint="Choose another output folder.")


def clear(out: Path) -> None:
    """Empty an output folder for a new start.

    Raises:
        OutputError: it holds something that is no part of a checkpoint or build; then nothing is removed.
    """
    with output_errors(out):
        entries = sorted(out.iterdir())
        strange = [entry.name for entry in entries if not _removable(entry)]
        if strange:
            raise OutputError(
                f"{out}: holds {', '.join(strange[:5])}, which is no part of a model; nothing was removed.",
                hint="Empty the folder by hand or choose another one.",
            )
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _removable(entry: Path) -> bool:
    if entry.is_dir() and entry.name not in (WORK_FOLDER, SCALES_FOLDER):
        return False
    return any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in REMOVABLE)


def require_disk(out: Path, needed: int) -> None:
    """Check free space.

    Raises:
        OutputError: less than ``needed`` bytes are free.
    """
    with output_errors(out):
        free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free: the disk would run full.",
            hint="Free some space or choose another disk; the same command continues where it stopped.",
        )


def write_companions(out: Path, source: Source, plan: BuildPlan, report: Report) -> None:
    """Write everything but the shards: index, config, tokenizer, chat template, model card, report.

    Raises:
        OutputError: a file cannot be written.
    """
    weight_map = {spec.name: shard for unit in plan.units for shard, specs in unit.shards for spec in specs}
    size = sum(unit.nbytes for unit in plan.units)
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config = with_both_spellings(source.checkpoint.config)
    config["quantization_config"] = plan.format.config(
        plan.grid, plan.skipped, [linear.name for linear in plan.quantized]
    )
    _write_json(out / "config.json", config)
    for file in source.companions():
        write_atomically(out / file.name, file.read_bytes())
    write_atomically(out / "README.md", report.model_card().encode())
    _write_json(out / REPORT_NAME, report.values)


def with_both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that readers before and after transformers 5 understand.

    transformers 5 renamed ``num_experts`` to ``num_local_experts`` (except for Mixtral, which always said so) and moved
    what rotary embeddings need (:mod:`qconv.rope`); AutoAWQ and other archived readers know the old names alone.

    Raises:
        CheckpointError, UsageError: rope parameters that are malformed or contradict each other.
    """
    both = dict(config)
    if "num_local_experts" in both and both.get("model_type") != "mixtral":
        both.setdefault("num_experts", both["num_local_experts"])
    return both | in_both_spellings(both)


def _write_json(path: Path, values: object) -> None:
    write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
