"""The folder of a run that makes several builds: each has a folder of its own in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qconv.building.output import enter
from qconv.checkpoint.writer import output_errors
from qconv.errors import OutputError
from qconv.folders.journal import JOURNAL_NAME
from qconv.folders.ownership import LEDGER_NAME, WORK_FOLDER, recover, strangers
from qconv.folders.state import FolderState, folder_state


def enter_all(out: Path, names: Sequence[str], *, restart: bool) -> FolderState:
    """What ``out`` holds at the start of a run, once what a killed ``--restart`` left is put in order.

    Args:
        out: The run's folder.
        names: Of its builds; an empty one, if it makes a single build in ``out`` itself.
        restart: Whether what it holds is to be discarded.

    Raises:
        OutputError: it is foreign, or cannot be read, or holds some of the builds, finished by other runs.
    """
    if not any(names):
        return enter(out)
    recover(out)
    states = {name: folder_state(out / name) for name in names}
    if all(state is FolderState.COMPLETE for state in states.values()):
        return FolderState.COMPLETE
    with output_errors(out):
        if (out / WORK_FOLDER / JOURNAL_NAME).is_file():
            return FolderState.UNFINISHED
        held = sorted(entry.name for entry in out.iterdir() if entry.name not in (*names, WORK_FOLDER))
        bare = not strangers(out, {f"{name}/{LEDGER_NAME}": None for name in (WORK_FOLDER, *names)})
    if held:
        more = "" if len(held) <= 5 else f" and {len(held) - 5} more"
        raise OutputError(
            f"{out}: is not empty and not a run of these builds: it holds {', '.join(held[:5])}{more}.",
            hint="Choose another folder, or empty this one by hand.",
        )
    if bare or restart:
        return FolderState.EMPTY
    there = [name for name, state in states.items() if state is not FolderState.EMPTY]
    raise OutputError(
        f"{out}: holds {', '.join(there) or WORK_FOLDER}, which no run began that made all of {', '.join(names)}.",
        hint="Choose another folder, or discard what is there with --restart.",
    )
