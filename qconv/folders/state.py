"""What a folder holds: nothing, a build, finished or not, or what somebody else put there."""

from __future__ import annotations

import enum
from pathlib import Path

from qconv.checkpoint.writer import output_errors
from qconv.errors import CheckpointError, OutputError
from qconv.folders.journal import JOURNAL_NAME
from qconv.folders.ownership import LEDGER_NAME, WORK_FOLDER, strangers, within

CHECKSUMS_NAME = "SHA256SUMS"
REPORT_NAME = "qconv-report.json"
"""A folder that holds both is a finished build's, or another finished run's."""


class FolderState(enum.Enum):
    """What an output folder holds."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"
    FOREIGN = "foreign"


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
        bare = names <= {WORK_FOLDER} and not strangers(out, within(WORK_FOLDER, {LEDGER_NAME: None}))
        return FolderState.EMPTY if bare else FolderState.FOREIGN


def require_finished(path: Path) -> None:
    """Check that the folder holds no unfinished build, alone or as one of several in the folder above.

    Raises:
        CheckpointError: it does.
    """
    state = folder_state(path)
    of_several = state is not FolderState.COMPLETE and folder_state(path.absolute().parent) is FolderState.UNFINISHED
    if state is FolderState.UNFINISHED or of_several:
        raise CheckpointError(
            f"{path}: an unfinished build.", hint="Run the `qconv quantize` command that began it again to finish it."
        )
