"""The folders of nights: each begun with a mark, and the old ones removed if they hold nothing but what nights make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from qconv.building.output import owned_files
from qconv.checkpoint.writer import output_errors
from qconv.errors import OutputError, QconvError
from qconv.evaluation import run_folder
from qconv.folders.journal import locked
from qconv.folders.ownership import DISCARDED_NAME, TRASH_NAME, ledger, own_folder, recover, replaced, strangers, within


def begin_night(work: Path, date: str) -> Path:
    """The folder of a night, made and marked as one; that of a night that was begun before stays as it is.

    Raises:
        OutputError: something else lies there, or it cannot be written.
    """
    folder = work / date
    if folder.is_dir():
        recover(folder)  # its removal may have been begun
    with output_errors(folder):
        foreign = folder.exists() and ledger(folder) is None and any(folder.iterdir())
    if foreign:
        raise OutputError(
            f"{folder}: holds something else than a night of qconv.",
            hint="Move it away, or give another work folder or --date.",
        )
    return own_folder(folder)


def remove_old(work: Path, keep: int, tonight: str, log: Callable[[str], None]) -> None:
    """Remove the oldest nights but ``keep``, tonight's among them; whatever no night is known to have made stays.

    Raises:
        OutputError: a folder cannot be removed.
    """
    with output_errors(work):
        folders = sorted(path for path in work.iterdir() if path.is_dir() and not path.is_symlink())
        nights = [path for path in folders if _is_date(path.name) and path.name != tonight and _is_night(path)]
    for night in nights[: max(0, len(nights) - keep + 1)]:
        try:
            kept = _remove(night)
        except QconvError as error:
            kept = error.message
        log(f"{night.name}: {'removed; the history keeps its runs' if kept is None else f'kept: {kept}'}")


def _remove(night: Path) -> str | None:
    """Remove a night, or say why it stays."""
    with contextlib.ExitStack() as held:
        held.enter_context(locked(night))
        recover(night)
        owned = dict(ledger(night) or {})  # none where a removal was given up in its middle, and is finished now
        for made in _made(night):
            held.enter_context(locked(made))
            recover(made)
            files = owned_files(made) | run_folder.owned_files(made)
            owned |= within(str(made.relative_to(night)), files)
        with output_errors(night):
            found = strangers(night, owned)
            if found:
                return f"it holds {found[0]}, which no night is known to have made"
            if any(night.iterdir()):
                with replaced(night, owned):
                    pass
            night.rmdir()
    return None


def _is_night(folder: Path) -> bool:
    """Whether a night was begun there, or its removal."""
    return ledger(folder) is not None or any((folder / name).is_dir() for name in (TRASH_NAME, DISCARDED_NAME))


def _made(night: Path) -> Iterator[Path]:
    """The folders of a night's builds and runs."""
    for path in sorted(night.glob("*/*")):
        if path.is_dir() and not path.is_symlink() and not path.parent.is_symlink():
            yield path


def _is_date(name: str) -> bool:
    parts = name.split("-")
    return [len(part) for part in parts] == [4, 2, 2] and all(part.isdigit() for part in parts)
