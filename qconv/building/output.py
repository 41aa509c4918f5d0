"""The output folder: whose it is, what may be removed from it, and the small files that complete a build."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.artifacts.build import SCALES_FOLDER, scales_path, with_both_spellings
from qconv.artifacts.source import COMPANION_PATTERNS, Source, is_companion
from qconv.boundary.content import FOLDED_SCALES
from qconv.boundary.printable import name_of
from qconv.building.report import Report
from qconv.building.share import Share
from qconv.chat.files import ADDITIONAL_FOLDER
from qconv.checkpoint.extended_rope import with_extended_rope
from qconv.checkpoint.reader import INDEX_NAME, read_json
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, ShardRecord, output_errors, sha256_of, write_atomically
from qconv.errors import ArtifactError, CheckpointError, OutputError, UsageError, VerificationError
from qconv.folders.journal import JOURNAL_NAME, Journal
from qconv.folders.ownership import WORK_FOLDER, claimed, recover, replaced, require_free, require_own, within
from qconv.folders.part import Part
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME, FolderState, folder_state
from qconv.formats import known_formats
from qconv.planning.plan import BuildPlan
from qconv.verification.checksums import parse_checksums, render_checksums

_LONGEST_NAME = 255
"""Bytes; of every common file system on Linux."""
_COLLECTED_NAMES = {"imatrix.gguf", "sensitivity.safetensors", FOLDED_SCALES}
_FIXED_NAMES = frozenset({INDEX_NAME, "config.json", "README.md", REPORT_NAME, CHECKSUMS_NAME, *_COLLECTED_NAMES})
_NUMBERED_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|" + SCALES_FOLDER + r"/layer-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        out: The build's folder.
        report: Its report's values.
        already_complete: Whether there was no weight left to make.
        renewed: Files of a complete build that were copied again from its source, or removed with it.
        share: What was made, if that is not all of the build; its report is empty then.
    """

    out: Path
    report: dict[str, Any]
    already_complete: bool
    renewed: tuple[str, ...] = ()
    share: Share | None = None


def enter(out: Path) -> FolderState:
    """What ``out`` holds at the start of a run, once what a killed ``--restart`` left is put in order.

    Raises:
        OutputError: it is foreign, or cannot be read.
    """
    recover(out)
    state = folder_state(out)
    if state is FolderState.FOREIGN:
        held = sorted(entry.name for entry in out.iterdir())
        more = "" if len(held) <= 5 else f" and {len(held) - 5} more"
        raise OutputError(
            f"{out}: is not empty and not a build of qconv: it holds {', '.join(held[:5])}{more}.",
            hint="Choose another folder, or empty this one by hand.",
        )
    return state


def begin(
    out: Path,
    fingerprints: Mapping[str, str],
    names: Iterable[str],
    needed: Callable[[Collection[str]], int],
    *,
    restart: bool,
    builds: Collection[str] = (),
) -> tuple[Journal, bool]:
    """The journal of a run, whose whole request is known to be good, and whether it goes on from an earlier one.

    Args:
        out: The output folder.
        fingerprints: What the run belongs to.
        names: Every file that it will give a name to, relative to ``out``.
        needed: Bytes of disk that it still needs, given the keys of what is committed.
        restart: Discard what ``out`` holds; until the new run has begun nothing of it is lost.
        builds: The folders within ``out`` that are builds of the run, where it makes several.

    Raises:
        UsageError: a file's name would be too long.
        OutputError: ``out`` holds something that qconv did not write, where the run would write or, if it is to be
            discarded, anywhere; or it cannot be written, or the disk is too small.
        ArtifactError: the earlier run's journal is damaged.
        StaleJournalError: the earlier run had other inputs.
    """
    wanted = [*names, CHECKSUMS_NAME]
    _require_storable(wanted)
    if restart:
        owned = owned_files(out)
        for name in builds:
            owned |= within(name, owned_files(out / name))
        require_own(out, owned)
        with output_errors(out):
            freed = sum((out / name).stat().st_size for name in owned if (out / name).is_file())
        require_disk(out, needed(()) - freed)
        with replaced(out, owned):
            return open_journal(out, fingerprints)
    journal, resumed = open_journal(out, fingerprints)
    kept = {file["name"] for record in journal.units.values() for file in record.get("files", ())} | {*journal.units}
    require_free(out, (name for name in wanted if name not in kept), journal.files)
    require_disk(out, needed(journal.units))
    return journal, resumed


def _require_storable(names: Iterable[str]) -> None:
    """Check that a file system takes the names, and those of the same files while they are written.

    Raises:
        UsageError: one is too long.
    """
    for name in names:
        if len(os.fsencode(f"{Path(name).name}{TEMPORARY_SUFFIX}")) > _LONGEST_NAME:
            raise UsageError(f"{name_of(name)}: is too long for a file's name.", hint="Rename the model's folder.")


def owned_files(out: Path) -> dict[str, frozenset[str] | None]:
    """What can be proven to be qconv's in the folder of a build, finished or not.

    A finished build's checksums list its files, if its report is among them and each is of a kind that builds have; an
    unfinished one's journal lists what was published, and the ledgers of the work folder what lies there.
    """
    owned = within(WORK_FOLDER, claimed(out / WORK_FOLDER))
    try:
        journal = Journal.load(out / WORK_FOLDER / JOURNAL_NAME)
    except ArtifactError:
        journal = None
    if journal is not None:
        owned |= {f"{WORK_FOLDER}/{JOURNAL_NAME}": None, **journal.files}
    try:
        sums = parse_checksums((out / CHECKSUMS_NAME).read_text())
        gguf_files = read_json(out / REPORT_NAME).get("files", [])
    except (OSError, ValueError, CheckpointError):
        return owned
    if REPORT_NAME in sums:
        known = {name for name in sums if _is_build_name(name) or name in gguf_files}
        owned |= {CHECKSUMS_NAME: None, **{name: frozenset({sums[name]}) for name in known}}
    return owned


def _is_build_name(name: str) -> bool:
    return (
        name in _FIXED_NAMES
        or any(name in one.beside_names for one in known_formats())
        or _NUMBERED_NAME.fullmatch(name) is not None
        or fnmatch.fnmatchcase(name, f"{ADDITIONAL_FOLDER}/*.jinja")
        or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS))
    )


def open_journal(out: Path, fingerprints: Mapping[str, str]) -> tuple[Journal, bool]:
    """The journal of a run, and whether it goes on from an earlier one.

    Raises:
        OutputError: it cannot be written.
        ArtifactError: it is damaged.
        StaleJournalError: the earlier run had other inputs.
    """
    path = out / WORK_FOLDER / JOURNAL_NAME
    journal = Journal.load(path)
    if journal is None:
        return Journal.create(path, fingerprints), False
    journal.require(fingerprints)
    return journal, True


def require_published(path: Path, size: int) -> None:
    """Check that a committed file is still there, as large as it was.

    Raises:
        VerificationError: it is not.
    """
    if not path.is_file() or path.stat().st_size != size:
        raise VerificationError(
            f"{path}: was committed but is now missing or of another size.",
            hint="Put it back, or start over with --restart.",
        )


def require_apart(model: Path, out: Path) -> None:
    """Check that neither folder is or contains the other.

    Raises:
        UsageError: they overlap.
    """
    source, target = model.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(f"{out}: overlaps the model's folder {model}.", hint="Choose another output folder.")


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


def planned_files(plan: BuildPlan) -> list[str]:
    """The shards of a build, and the files of scales that its layers may get."""
    layers = [unit.layer.index for unit in plan.units if unit.layer is not None]
    scales = [str(scales_path(Path(), index)) for index in layers]
    return [*(shard for unit in plan.units for shard, _ in unit.shards), *scales]


def companion_names(source: Source, plan: BuildPlan) -> list[str]:
    """The names of :func:`companion_files`."""
    fixed = [INDEX_NAME, "config.json", *plan.format.beside_names, "README.md", REPORT_NAME]
    return [*fixed, *source.named_companions()]


def companion_files(source: Source, plan: BuildPlan, report: Report) -> dict[str, bytes]:
    """Everything but the shards, by name: index, config, tokenizer, chat template, model card, report."""
    weight_map = {spec.name: shard for unit in plan.units for shard, specs in unit.shards for spec in specs}
    size = sum(unit.nbytes for unit in plan.units)
    config = with_both_spellings(with_extended_rope(source.checkpoint.config, plan.recipe.rope))
    section = plan.format.config(plan.grids(), plan.skipped)
    if plan.recipe.kv_cache is not None and plan.format.cache is not None:
        section |= plan.format.cache.section
    if section:
        config |= plan.format.keys(section)
    return {
        INDEX_NAME: _json({"metadata": {"total_size": size}, "weight_map": weight_map}),
        "config.json": _json(config),
        **{name: _json(values) for name, values in plan.format.beside(section).items()},
        **{name: file.read_bytes() for name, file in source.named_companions().items()},
        "README.md": report.model_card().encode(),
        REPORT_NAME: _json(report.values),
    }


def complete_files(
    out: Path,
    part: Part,
    small: Mapping[str, bytes],
    files: list[str],
    digest: Callable[[list[str]], Iterable[str]],
) -> None:
    """Write the small files and the checksums of a folder whose files, each committed by its name, are still that.

    Args:
        out: The folder.
        part: The build's part of the journal, which knows each file's sha256.
        small: Report and model card.
        files: The committed files.
        digest: sha256 of files by their names.

    Raises:
        VerificationError: a file changed since.
        OutputError: a file cannot be written.
    """
    publish(out, part, small)
    names = sorted({*small, *files})
    sums = dict(zip(names, digest(names), strict=True))
    for name in files:
        if sums[name] != part.units[name]["sha256"]:
            raise VerificationError(f"{out / name}: changed since it was committed.", hint="Start over with --restart.")
    publish(out, part, {CHECKSUMS_NAME: render_checksums(sums).encode()})


def remove_vanished(out: Path, part: Part, kept: Collection[str]) -> None:
    """Remove companions that the run wrote before it was interrupted and that its source has no longer.

    Raises:
        OutputError: one cannot be removed.
    """
    with output_errors(out):
        for name, digests in part.files.items():
            path = out / name
            if is_companion(name) and name not in kept and path.is_file() and sha256_of(path) in digests:
                path.unlink()


def publish(out: Path, part: Part | Journal, files: Mapping[str, bytes]) -> None:
    """Write small files, announced in the journal before they get their names.

    Raises:
        OutputError: a file cannot be written.
    """
    part.announce(ShardRecord(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items())
    for name, data in files.items():
        with output_errors(out / name):
            (out / name).parent.mkdir(exist_ok=True)
        write_atomically(out / name, data, part.staged(name))


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
