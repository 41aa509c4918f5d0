"""A finished build that is asked for again: whole, the one that was asked for, and with its source's small files.

Every file is read and held against SHA256SUMS. That takes as long as reading the build, a small part of what making it
took, and nothing less finds a damaged shard.

Tokenizer, chat template and generation config only travel with a build. Where the source has others now, they are
copied again. The new checksums lie in the work folder before the first file changes, so that a run killed in between
leaves nothing but files that the old or the new ones list, and the same command goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from qconv.artifacts.reported import read_report
from qconv.artifacts.source import is_companion
from qconv.building.inputs import ARITHMETIC
from qconv.building.output import Outcome
from qconv.checkpoint.writer import output_errors, sha256_of, sync_folder, write_atomically
from qconv.core.workers import Workers
from qconv.errors import VerificationError
from qconv.folders.journal import COMPANIONS, require_same
from qconv.folders.ownership import WORK_FOLDER, claim, own_folder, remove_claimed, require_free
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME
from qconv.verification.checksums import parse_checksums, render_checksums

Progress = Callable[[str, int, int], None]
Renew = Callable[[dict[str, Any]], dict[str, bytes]]

_PENDING = f"{CHECKSUMS_NAME}.new"
_CARD = "README.md"
_HINT = "Put back what is missing or changed; or move a changed file away and build anew with --restart."


def already_complete(
    out: Path,
    fingerprints: Mapping[str, str],
    needed: Collection[str],
    workers: Workers,
    progress: Progress,
    renew: Renew | None = None,
) -> Outcome:
    """The outcome of asking for a build that is complete already.

    Args:
        out: Its folder.
        fingerprints: What was asked for belongs to.
        needed: Files that the build must have.
        workers: Threads for reading.
        progress: Told the file at hand, the files read and the files in all.
        renew: Given a report's values, what lies beside the weights today; None where nothing is copied again.

    Raises:
        ArtifactError: its report or its checksums cannot be read.
        StaleJournalError: it was made from other inputs.
        VerificationError: a file is missing or not what it was.
        OutputError: a file cannot be written, or one that qconv did not write lies in its place.
    """
    sums = _Sums.read(out)
    if not sums.good(REPORT_NAME, _digest(out / REPORT_NAME)):
        raise VerificationError(f"{out / REPORT_NAME}: its sha256 is not the one in {CHECKSUMS_NAME}.", hint=_HINT)
    report = read_report(out)
    # A whole build was made with one arithmetic, whichever that was.
    require_same(out, report["fingerprints"], fingerprints, ignored=[ARITHMETIC])
    found = _require_whole(out, sums, needed, workers, progress, renewable=renew is not None)
    renewed: tuple[str, ...] = ()
    if renew is not None:
        if COMPANIONS in fingerprints:
            belongs = report["fingerprints"] | {COMPANIONS: fingerprints[COMPANIONS]}
            report = report | {"fingerprints": belongs}
        renewed = _renew(out, sums, found, renew(report))
    remove_claimed(out / WORK_FOLDER)
    return Outcome(out, report, already_complete=True, renewed=renewed)


@dataclass(frozen=True, slots=True)
class _Sums:
    """A build's checksums by file name, and those that a killed renewal was about to put in their place."""

    old: dict[str, str]
    new: dict[str, str]

    @classmethod
    def read(cls, out: Path) -> _Sums:
        """Of a build's folder.

        Raises:
            VerificationError: they cannot be read.
        """
        pending = out / WORK_FOLDER / _PENDING
        return cls(_parsed(out / CHECKSUMS_NAME), _parsed(pending) if pending.is_file() else {})

    @property
    def names(self) -> list[str]:
        """Every file that either lists, sorted."""
        return sorted({*self.old, *self.new})

    def good(self, name: str, digest: str | None) -> bool:
        """Whether a file may hold what it holds."""
        return digest is not None and digest in (self.old.get(name), self.new.get(name))

    def owned(self) -> dict[str, frozenset[str] | None]:
        """What each file may hold."""
        return {
            name: frozenset({*self.old.get(name, "").split(), *self.new.get(name, "").split()}) for name in self.names
        }


def _parsed(path: Path) -> dict[str, str]:
    try:
        return parse_checksums(path.read_text())
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}.", hint=_HINT) from error
    except ValueError as error:
        raise VerificationError(f"{path}: {error}.", hint=_HINT) from error


def _digest(path: Path) -> str | None:
    """A file's sha256, None if there is no file or it cannot be read."""
    try:
        return sha256_of(path) if path.is_file() else None
    except OSError:
        return None


def _require_whole(
    out: Path, sums: _Sums, needed: Collection[str], workers: Workers, progress: Progress, *, renewable: bool
) -> dict[str, str | None]:
    """Every listed file's sha256, None for a missing one.

    Raises:
        VerificationError: one is missing, if it cannot be written again, or is not what it was.
    """
    problems = [f"{name} is not listed in {CHECKSUMS_NAME}" for name in sorted(needed) if name not in sums.old]
    problems += [f"{CHECKSUMS_NAME} lists {name}, which lies outside" for name in sums.names if not _is_inside(name)]
    listed = [name for name in sums.names if _is_inside(name)]
    found: dict[str, str | None] = {}
    for name, digest in zip(listed, workers.map(lambda name: _digest(out / name), listed), strict=True):
        progress(f"checking {name}", len(found), len(listed))
        found[name] = digest
        if digest is None:
            if name in needed or not (renewable and _is_small(name)):
                problems.append(f"{name} is missing")
        elif not sums.good(name, digest):
            problems.append(f"{name} does not have its sha256 of {CHECKSUMS_NAME}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise VerificationError(f"{out}: was complete, but is not now: {'; '.join(problems[:3])}{more}.", hint=_HINT)
    return found


def _is_inside(name: str) -> bool:
    return not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def _is_small(name: str) -> bool:
    """Whether a file is made of the source and the report alone."""
    return is_companion(name) or name in (_CARD, "config.json", "model.safetensors.index.json")


def _renew(out: Path, sums: _Sums, found: Mapping[str, str | None], wanted: Mapping[str, bytes]) -> tuple[str, ...]:
    """Write what the source has otherwise now, and what is missing; the names of what changed, sorted."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()}
    changed = {name for name in wanted if is_companion(name) and found.get(name) != digests[name]}
    changed |= {name for name in wanted if name in found and found[name] is None}
    gone = {name for name in found if is_companion(name) and name not in wanted}
    if not (changed or gone or sums.new):
        return ()
    changed |= {name for name in (_CARD, REPORT_NAME) if found.get(name) != digests[name]}
    kept = {name: digest for name, digest in found.items() if digest is not None and name not in gone}
    work = own_folder(out / WORK_FOLDER)

    def staged(name: str) -> Path:
        return claim(work / f"{name}.partial")

    require_free(out, changed, sums.owned())
    pending = claim(work / _PENDING)
    write_atomically(
        pending, render_checksums(kept | {name: digests[name] for name in changed}).encode(), staged(_PENDING)
    )
    for name in sorted(changed):
        write_atomically(out / name, wanted[name], staged(name))
    with output_errors(out):
        for name in gone:
            (out / name).unlink(missing_ok=True)
        pending.replace(out / CHECKSUMS_NAME)
        sync_folder(out)
    return tuple(sorted(changed | gone))
