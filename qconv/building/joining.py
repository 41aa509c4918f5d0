"""A build whose shares were made by several machines: each in a folder beside the build's, then collected into it.

A share's folder has a journal of its own, so that each is resumed as any run is. Collecting moves files that are
committed and copies what the journals say of them, and then finishes the build as a run does that has nothing left to
do: what was made in shares has the bytes of what was made at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qconv.building.gguf_target import GgufTarget
from qconv.building.output import enter, open_journal
from qconv.building.safetensors_target import SafetensorsTarget
from qconv.building.share import PART, REQUEST_NAME, Share, keys_of_share, request_of, share_name, shares_folder
from qconv.checkpoint.reader import read_json
from qconv.checkpoint.writer import ShardRecord, output_errors, sync_folder
from qconv.errors import OutputError, UsageError
from qconv.folders.journal import JOURNAL_NAME, WORK_FOLDER, Journal, locked, require_same
from qconv.folders.ownership import remove_claimed
from qconv.folders.state import FolderState
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import Recipe

Shared = TypeVar("Shared", SafetensorsTarget, GgufTarget)
_FOLDER = re.compile(r"([1-9]\d*)-of-([1-9]\d*)")


def shared(target: Shared, recipe: Recipe | GgufRecipe, part: tuple[int, int]) -> Shared:
    """One share of a target, in its own folder.

    Args:
        target: Of the whole build.
        recipe: Of it.
        part: Number, counted from 1, and count.

    Raises:
        UsageError: layers are calibrated or looked at, one after the other; or there are fewer units than shares.
    """
    if target.calibration is not None:
        raise UsageError(
            f"--part {part[0]}/{part[1]}: this build looks at layers one after the other: a part needs all before it.",
            hint="Choose --method rtn; for GGUF also a finished importance matrix: --imatrix.",
        )
    share = Share(*part, keys_of_share(sizes_of(target), *part), request_of(target.source, recipe))
    return dataclasses.replace(target, folder=shares_folder(target.folder) / share.name, share=share)


def sizes_of(target: SafetensorsTarget | GgufTarget) -> dict[str, int]:
    """The bytes of each unit of a target by its key."""
    if isinstance(target, GgufTarget):
        return {file.name: file.size for file in target.plan.files}
    return {unit.key: unit.nbytes for unit in target.plan.units}


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """The folders of all shares of a build.

    Attributes:
        out: The build's folder.
        folders: Theirs, in their order.
        request: What they were asked for.
    """

    out: Path
    folders: tuple[Path, ...]
    request: Mapping[str, Any]

    @classmethod
    def find(cls, out: Path) -> Shares | None:
        """Those of a build; None where its folder is finished and they are gone.

        Raises:
            UsageError: one is missing, or there are those of another count.
            OutputError: a folder cannot be read.
        """
        above = shares_folder(out)
        with output_errors(above):
            names = sorted(entry.name for entry in above.iterdir()) if above.is_dir() else []
        numbered = [match for match in map(_FOLDER.fullmatch, names) if match]
        if not numbered:
            if enter(out) is FolderState.COMPLETE:
                return None
            raise UsageError(f"{above}: holds no part of a build.", hint="Make them with quantize --part K/N -o OUT.")
        counts = sorted({int(match[2]) for match in numbered})
        if len(counts) > 1:
            raise UsageError(
                f"{above}: holds parts of {' and of '.join(map(str, counts))}.",
                hint="Remove those that do not belong to the build.",
            )
        wanted = [share_name(number, counts[0]) for number in range(1, counts[0] + 1)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UsageError(
                f"{above}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
                hint=f"Run the same quantize command with --part {missing[0].replace('-of-', '/')}.",
            )
        folders = tuple(above / name for name in wanted)
        return cls(out, folders, read_json(folders[0] / WORK_FOLDER / REQUEST_NAME))

    def hand_over(self, target: SafetensorsTarget | GgufTarget, belongs: Mapping[str, str]) -> None:
        """Move what the shares hold into the build's folder, and what their journals say into its.

        Killed at any moment, the same call goes on.

        Raises:
            StaleJournalError: a share was made from other inputs.
            UsageError: one is not finished.
            OutputError: a share is still being made, or a file cannot be moved.
        """
        with contextlib.ExitStack() as stack:
            for folder in self.folders:
                stack.enter_context(locked(folder))
            sizes = sizes_of(target)
            journals = [self._journal(folder, belongs, sizes) for folder in self.folders]
            with output_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.out))
            if enter(self.out) is FolderState.COMPLETE:
                return  # killed when only their folders were left to be removed
            journal, _ = open_journal(self.out, belongs)
            stamps = {one.source for one in journals}
            if len(stamps) == 1 and journal.source is None and (stamp := stamps.pop()) is not None:
                journal.see_source(stamp)
            for folder, one in zip(self.folders, journals, strict=True):
                for key in (key for key in sizes if key in one.units and key not in journal.units):
                    record = one.units[key]
                    self._move(folder, journal, record.get("files", [{"name": key, **record}]))
                    journal.commit(key, record)

    def _journal(self, folder: Path, belongs: Mapping[str, str], sizes: Mapping[str, int]) -> Journal:
        """That of a share that is finished, and of the build's inputs."""
        number = self.folders.index(folder) + 1
        again = f"Run the same quantize command with --part {number}/{len(self.folders)} again."
        journal = Journal.load(folder / WORK_FOLDER / JOURNAL_NAME)
        if journal is None:
            raise UsageError(f"{folder}: holds no part of a build.", hint=again)
        require_same(folder, journal.fingerprints, {**belongs, PART: folder.name})
        mine = keys_of_share(sizes, number, len(self.folders))
        left = [key for key in sizes if key in mine and key not in journal.units]
        if left:
            raise UsageError(f"{folder}: is not finished: {len(left)} of {len(mine)} are left.", hint=again)
        return journal

    def _move(self, folder: Path, journal: Journal, files: Iterable[Mapping[str, Any]]) -> None:
        listed = [ShardRecord(file["name"], file["size"], file["sha256"]) for file in files]
        journal.announce(listed)
        with output_errors(self.out):
            for file in listed:
                here, there = folder / file.name, self.out / file.name
                if not here.is_file():
                    if there.is_file():
                        continue  # moved before a kill; it is checked with all others
                    raise OutputError(f"{here}: is gone.", hint="Put it back, or make the part again with --restart.")
                if there.exists():
                    raise OutputError(f"{there}: lies where a part's file belongs.", hint="Move it away.")
                os.rename(here, there)
            sync_folder(self.out)

    def remove(self) -> None:
        """Remove what is left of them."""
        for folder in self.folders:
            remove_claimed(folder / WORK_FOLDER)
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            shares_folder(self.out).rmdir()
