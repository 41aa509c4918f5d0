"""What qconv may overwrite and remove: only files that a listing proves to be its own.

A listing gives each file's path and the sha256 that it must have; a file in a work folder is known by its name alone.
Everything else in a folder is somebody's: it is named and stays. A finished build's listing is its SHA256SUMS, an
unfinished one's its journal, and everywhere else a *ledger*: a file of JSON lines beside the files that it names, each
line on disk before its file is.

Removal never destroys what a killed process would have needed. What is to go is moved into a trash folder that lists
it, then the new run begins, and only then the trash is given up and emptied. Found by the next process, a trash folder
that was not given up is put back, and one that was is emptied: nothing is ever lost in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TypeAlias

from qconv.boundary.reading import parse_json, read_json
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, output_errors, sha256_of, sync_folder, write_atomically
from qconv.errors import ArtifactError, OutputError

WORK_FOLDER = ".qconv"
"""Within an output folder, what a run needs only until it is finished."""
LEDGER_NAME = ".qconv-files"
TRASH_NAME = ".qconv-trash"
DISCARDED_NAME = ".qconv-discarded"

Owned: TypeAlias = Mapping[str, frozenset[str] | None]
"""By path relative to a folder, the sha256 (hexadecimal) that a file of qconv's may have there; None for any."""

_HEADER = b'{"qconv-files":1}\n'
_LISTING = "listing.json"
_CONTENTS = "files"
_appending = threading.Lock()
"""Of ledgers: a layer is published by one thread while another makes the next one's files."""


def own_folder(path: Path) -> Path:
    """Make a folder, and those above it, with a ledger; one that is there already stays as it is.

    Raises:
        OutputError: it cannot be made.
    """
    with output_errors(path), _appending:
        path.mkdir(parents=True, exist_ok=True)
        _append(path / LEDGER_NAME, b"")
    return path


def claim(path: Path, sha256: str | None = None) -> Path:
    """Say in the ledger beside a file, durably, that it is about to be written; the path again.

    Args:
        path: The file.
        sha256: What it will hold; None in a work folder, where the name alone is enough.

    Raises:
        OutputError: the ledger cannot be written.
    """
    line = json.dumps({"name": path.name, "sha256": sha256}, separators=(",", ":")).encode() + b"\n"
    with output_errors(path), _appending:
        known = ledger(path.parent) or {}
        digests = known.get(path.name, frozenset())
        if digests is not None and (sha256 is None or sha256 not in digests):
            _append(path.parent / LEDGER_NAME, line)
    return path


def ledger(folder: Path) -> dict[str, frozenset[str] | None] | None:
    """What the ledger of a folder lists, itself included; None if there is none that qconv wrote.

    Raises:
        OSError: it cannot be read.
    """
    path = folder / LEDGER_NAME
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if not data.startswith(_HEADER):
        return {LEDGER_NAME: None} if _HEADER.startswith(data) else None  # killed while it was begun
    found: dict[str, frozenset[str] | None] = {LEDGER_NAME: None}
    for line in data[len(_HEADER) :].split(b"\n")[:-1]:  # a line that a kill cut short has no end
        with contextlib.suppress(ArtifactError, KeyError, TypeError):
            record = parse_json(line, str(path), ArtifactError)
            name, sha256 = str(record["name"]), record["sha256"]
            digests = found.get(name, frozenset())
            if "/" not in name:
                found[name] = None if sha256 is None or digests is None else digests | {str(sha256)}
    return found


def claimed(folder: Path) -> dict[str, frozenset[str] | None]:
    """What the ledgers of a folder and of those within it list, by path relative to the folder."""
    found: dict[str, frozenset[str] | None] = {}
    for base, folders, _ in os.walk(folder) if not folder.is_symlink() else ():
        listed = ledger(Path(base))
        if listed is None:
            folders.clear()
            continue
        found |= {str((Path(base) / name).relative_to(folder)): digests for name, digests in listed.items()}
    return found


def within(folder: str, owned: Owned) -> dict[str, frozenset[str] | None]:
    """The same listing, seen from the folder above."""
    return {f"{folder}/{name}": digests for name, digests in owned.items()}


def strangers(folder: Path, owned: Owned) -> list[str]:
    """Everything in a folder that a listing does not prove to be qconv's, relative, sorted; a folder ends in a slash.

    Raises:
        OSError: something cannot be read.
    """
    ours = {str(parent) for name in owned for parent in PurePath(name).parents}
    found = []
    for base, folders, files in os.walk(folder, onerror=_raise):
        for name in list(folders):
            path = Path(base) / name
            relative = str(path.relative_to(folder))
            if path.is_symlink() or relative not in ours:
                folders.remove(name)
                found.append(f"{relative}/")
        for name in files:
            path = Path(base) / name
            relative = str(path.relative_to(folder))
            if relative not in owned or not _is_own(path, owned[relative]):
                found.append(relative)
    return sorted(found)


def require_own(folder: Path, owned: Owned) -> None:
    """Check that a folder holds nothing but what a listing proves.

    Raises:
        OutputError: it does; names it.
    """
    with output_errors(folder):
        found = strangers(folder, owned)
    if found:
        raise OutputError(
            f"{folder}: holds {_named(found)}, which qconv did not write or which was changed since; nothing was "
            "removed.",
            hint="Move it away, or choose another folder.",
        )


def require_free(folder: Path, names: Iterable[str], owned: Owned) -> None:
    """Check that what is about to be written replaces nothing but files of qconv's.

    Raises:
        OutputError: it would; names the files.
    """
    with output_errors(folder):
        taken = [
            name
            for name in names
            if os.path.lexists(folder / name) and not (name in owned and _is_own(folder / name, owned[name]))
        ]
    if taken:
        raise OutputError(
            f"{folder}: holds {_named(taken)}, which qconv did not write or which was changed since; it was left as "
            "it is.",
            hint="Move it away, or choose another folder.",
        )


def write_own(path: Path, data: bytes) -> None:
    """Write a file that its folder's ledger proves, in place of one that it proves too.

    Raises:
        OutputError: there is a file that qconv did not write, or the folder cannot be written.
    """
    folder = own_folder(path.parent)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    require_free(folder, [path.name, temporary.name], ledger(folder) or {})
    claim(path, hashlib.sha256(data).hexdigest())
    write_atomically(path, data, claim(temporary))


def remove_claimed(folder: Path, suffixes: tuple[str, ...] = ("",)) -> None:
    """Remove what the ledgers in a folder list, and the folder unless something else lies there.

    What was listed last goes first, so that a marker, which is listed first, outlives the rest.

    Args:
        folder: The folder; there need be none.
        suffixes: Only files whose names end so.

    Raises:
        OutputError: something cannot be removed.
    """
    with output_errors(folder):
        if folder.is_symlink() or not folder.is_dir():
            return
        listed = ledger(folder)
        if listed is None:
            _remove_if_empty(folder)
            return
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                remove_claimed(path, suffixes)
        for name in reversed(listed):
            if name.endswith(suffixes) and _is_own(folder / name, listed[name]):
                (folder / name).unlink()
        _remove_if_empty(folder)


@contextlib.contextmanager
def replaced(folder: Path, owned: Owned) -> Iterator[None]:
    """Move all that a folder holds aside, let the body begin something new, and only then remove the old for good.

    If the body fails, or the process is killed before it is through and :func:`recover` is called, all is as it was.

    Args:
        folder: The folder, which :func:`require_own` found to hold nothing else than ``owned``.
        owned: Its listing.

    Raises:
        OutputError: something cannot be moved or removed.
    """
    with output_errors(folder):
        _set_aside(folder, owned)
    try:
        yield
    except BaseException:
        recover(folder)
        raise
    with output_errors(folder):
        (folder / TRASH_NAME).rename(folder / DISCARDED_NAME)
        sync_folder(folder)
        _empty(folder / DISCARDED_NAME)


def recover(folder: Path) -> None:
    """Finish or undo what a killed process had begun to replace.

    Raises:
        OutputError: something cannot be moved or removed, or lies in the way.
    """
    with output_errors(folder):
        if _entries(folder / DISCARDED_NAME) is not None:
            _empty(folder / DISCARDED_NAME)
        _remove_if_empty(folder / DISCARDED_NAME)
        _put_back(folder)


def _set_aside(folder: Path, owned: Owned) -> None:
    trash = folder / TRASH_NAME
    # The work folder goes first and comes back last: beside a moved one lies that of a run that never began.
    entries = sorted((path.name for path in folder.iterdir()), key=lambda name: (name != WORK_FOLDER, name))
    (trash / _CONTENTS).mkdir(parents=True)
    listing = {"entries": entries, "files": sorted(owned)}
    write_atomically(trash / _LISTING, json.dumps(listing).encode())
    for name in entries:
        (folder / name).rename(trash / _CONTENTS / name)
    sync_folder(trash / _CONTENTS)


def _put_back(folder: Path) -> None:
    trash = folder / TRASH_NAME
    entries = _entries(trash)
    if entries is None:
        if trash.is_dir() and not trash.is_symlink():  # killed before anything was moved
            (trash / f"{_LISTING}{TEMPORARY_SUFFIX}").unlink(missing_ok=True)
            _remove_if_empty(trash / _CONTENTS)
            _remove_if_empty(trash)
        return
    contents = trash / _CONTENTS
    if WORK_FOLDER not in entries or (contents / WORK_FOLDER).is_dir():
        remove_claimed(folder / WORK_FOLDER)
    for name in reversed(entries):
        if not os.path.lexists(contents / name):
            continue
        if os.path.lexists(folder / name):
            raise OutputError(
                f"{folder / name}: lies where what {contents} holds belongs.", hint="Move it away; nothing is lost."
            )
        (contents / name).rename(folder / name)
    sync_folder(folder)
    (trash / _LISTING).unlink()
    _remove_if_empty(contents)
    _remove_if_empty(trash)


def _empty(trash: Path) -> None:
    """Remove the listed files of a trash folder that was given up, and it unless something else lies there."""
    contents = trash / _CONTENTS
    listing = read_json(trash / _LISTING, ArtifactError)
    for name in listing["files"]:
        path = contents / str(name)
        inside = path.parent.resolve().is_relative_to(contents.resolve())  # no link leads out of it
        if inside and _is_own(path, None):
            path.unlink()
    for parent in sorted({parent for name in listing["files"] for parent in PurePath(name).parents}, reverse=True):
        _remove_if_empty(contents / parent)
    for name in listing["entries"]:  # a folder that nothing had been written to
        _remove_if_empty(contents / str(name))
    _remove_if_empty(contents)
    if not contents.exists():
        (trash / _LISTING).unlink()
        _remove_if_empty(trash)


def _entries(trash: Path) -> list[str] | None:
    """What a trash folder was made to hold; None if it is none of ours, or nothing was moved yet."""
    path = trash / _LISTING
    try:
        if trash.is_symlink() or not stat.S_ISREG(path.lstat().st_mode):
            return None
        listing = read_json(path, ArtifactError)
        names = [*listing["entries"], *listing["files"]]
        good = all(isinstance(name, str) and ".." not in PurePath(name).parts for name in names)
        return list(listing["entries"]) if good and not any(map(os.path.isabs, names)) else None
    except (FileNotFoundError, NotADirectoryError, ArtifactError, KeyError, TypeError):
        return None


def _is_own(path: Path, digests: frozenset[str] | None) -> bool:
    """Whether a path is a plain file, no link, that holds what it may."""
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return regular and (digests is None or sha256_of(path) in digests)


def _append(path: Path, line: bytes) -> None:
    """Append a line to a ledger, after its header and whole lines; begin it if need be."""
    if os.path.lexists(path) and ledger(path.parent) is None:
        raise OutputError(f"{path}: was not written by qconv.", hint="Move it away, or choose another folder.")
    with path.open("ab+") as file:
        file.seek(0)
        data = file.read()
        begun = data.startswith(_HEADER)
        if begun and not line:
            return
        file.truncate(data.rfind(b"\n") + 1 if begun else 0)
        file.write(line if begun else _HEADER + line)
        file.flush()
        os.fsync(file.fileno())


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def _raise(error: OSError) -> None:
    raise error
