"""A GGUF model in files of another size: splits merged or a file split, every key and every byte of a tensor kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValue, GGUFValueType, Keys, LlamaFileType
from torch import Tensor

from qconv import __version__
from qconv.artifacts.reported import has_report, read_report
from qconv.building.completion import already_complete
from qconv.building.gguf_report import model_card
from qconv.building.output import Outcome, begin, complete_files, enter, require_apart, require_published
from qconv.building.target import Log
from qconv.checkpoint.hub import folder_name
from qconv.checkpoint.writer import output_errors, sha256_of
from qconv.conversion.target import CONVERTED
from qconv.core.devices import Lending
from qconv.core.workers import Workers
from qconv.executors import DEFAULT, get_executor
from qconv.folders.journal import WORK_FOLDER, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.part import Part
from qconv.folders.readings import READ, SourceRecord
from qconv.folders.state import REPORT_NAME, FolderState
from qconv.formats.gguf.container import FileLayout, GgufWriter, TensorInfo, lay_out
from qconv.formats.gguf.metadata import Metadata
from qconv.formats.gguf.reader import GgufModel, set_name
from qconv.planning.engines import engine_values, judged_as_it_is
from qconv.verification.outcome import Progress

_WORKERS = 2


@dataclass(frozen=True, slots=True)
class _Files:
    """A model as what a run is made from."""

    files: list[Path]
    path: Path


def split_anew(
    path: Path, out: Path, split_bytes: int, *, restart: bool = False, progress: Progress, log: Log
) -> Outcome:
    """Write a GGUF model in files of at most so many bytes of tensors, or go on with it.

    Args:
        path: A GGUF file, any of a set, or a folder that holds one model.
        out: The new files' folder; made if absent.
        split_bytes: The largest file; a larger tensor gets one of its own.
        restart: Discard what ``out`` holds, if qconv made all of it.
        progress: Told the tensor at hand, the bytes done and the bytes in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError: more files than a set may have.
        CheckpointError: a file is damaged or missing.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was read back is not what was written.
    """
    model = GgufModel.open(path)
    folder = path if path.is_dir() else path.parent
    require_apart(folder, out)
    infos = [TensorInfo(one.name, one.type, one.shape) for one in model.entries.values()]
    layouts = lay_out(set_name(model.files[0]), typed_keys(model.files[0]), infos, split_bytes)
    log(f"{len(model.files)} files of {model.files[0].name} become {len(layouts)}")
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    workers = get_executor(DEFAULT)(_WORKERS, math.inf, Lending())
    with locked(out), workers:
        return _Splitting(model, folder, out, layouts, workers, progress).run(split_bytes, restart=restart)


class _Splitting:
    def __init__(
        self,
        model: GgufModel,
        folder: Path,
        out: Path,
        layouts: list[FileLayout],
        workers: Workers,
        progress: Progress,
    ) -> None:
        self.model = model
        self.folder = folder
        self.out = out
        self.layouts = layouts
        self.workers = workers
        self.progress = progress
        self.total = sum(entry.nbytes for entry in model.entries.values())
        self.done = 0

    def run(self, split_bytes: int, *, restart: bool) -> Outcome:
        belongs = {
            "weights": _fingerprint(self.model),
            "recipe": f"sharded:{split_bytes}",
            "versions": f"qconv={__version__}",
        }
        files = [layout.name for layout in self.layouts]
        if enter(self.out) is FolderState.COMPLETE and not restart:
            return already_complete(self.out, belongs, files, self.workers, self.progress)
        journal, _ = begin(self.out, belongs, [*files, REPORT_NAME, "README.md"], self._needed, restart=restart)
        readings: dict[str, Callable[[], str]] = {
            layout.name: partial(_read_again, self.model, layout) for layout in self.layouts
        }
        record = SourceRecord(_Files(list(self.model.files), self.folder), journal, readings)
        record.require_unchanged(self.progress)
        part = Part(record)
        for layout in self.layouts:
            self._file(layout, part)
        record.require_unchanged(self.progress)
        report = self._report(belongs, files)
        small = {REPORT_NAME: (json.dumps(report, indent=2) + "\n").encode(), "README.md": model_card(report).encode()}
        complete_files(self.out, part, small, files, lambda names: [sha256_of(self.out / name) for name in names])
        remove_claimed(self.out / WORK_FOLDER)
        return Outcome(self.out, report, already_complete=False)

    def _needed(self, committed: Collection[str]) -> int:
        return sum(layout.size for layout in self.layouts if layout.name not in committed)

    def _file(self, layout: FileLayout, part: Part) -> None:
        committed = part.units.get(layout.name)
        if committed is not None:
            require_published(self.out / layout.name, committed["size"])
            self.done += sum(tensor.nbytes for tensor in layout.tensors)
            return
        digest = hashlib.sha256()
        with GgufWriter(self.out, layout, part.staged(layout.name)) as writer:
            for tensor in layout.tensors:
                self.progress(tensor.name, self.done, self.total)
                writer.write_blocks(tensor.name, _hashed(self.model, tensor.name, digest))
                self.done += tensor.nbytes
            written = writer.finish()
            part.announce([written])
            writer.publish()
        part.commit(layout.name, {"size": written.size, "sha256": written.sha256, READ: digest.hexdigest()[:16]})

    def _report(self, belongs: dict[str, str], files: list[str]) -> dict[str, Any]:
        """What the model says of itself: what the report before said, where there is one."""
        model, said = self.model, dict[str, Any]()
        if has_report(self.folder):
            before = read_report(self.folder)
            said = before if set(before.get("files", ())) == {file.name for file in model.files} else {}
        elements = sum(entry.numel for entry in model.entries.values())
        values = {
            "qconv": __version__,
            "source": said.get("source") or folder_name(self.folder),
            "format": said.get("format") or f"gguf:{_file_type(model)}",
            "recipe": {},
            "bits_per_weight": round(8.0 * self.total / elements, 4),
            "parameters": elements,
            "tensors": {name: {"type": one.type.name, "snr_db": None} for name, one in model.entries.items()},
            "imatrix": None,
            **said,
            "fingerprints": belongs,
            "files": files,
            CONVERTED: {"from": f"{len(model.files)} files", "rounded_again": {}, "method_known": bool(said)},
        }
        return values | {"engines": engine_values(judged_as_it_is(self.out / files[0]))}


def typed_keys(file: Path) -> Metadata:
    """A file's keys with the types in which it holds them, but for those that say which split it is."""
    metadata: Metadata = {}
    for key, field in GGUFReader(file).fields.items():
        if key.startswith(("GGUF.", "split.")) or key == Keys.General.ALIGNMENT:
            continue
        kind, *inner = field.types
        of = inner[-1] if kind is GGUFValueType.ARRAY and inner else None
        metadata[key] = GGUFValue(field.contents(), kind, of)
    return metadata


def _hashed(model: GgufModel, name: str, digest: hashlib._Hash) -> Iterator[Tensor]:
    """A tensor's bytes, which a digest sees on their way; what is written is read back and held against them."""
    for block in model.blocks(name):
        digest.update(block.contiguous().numpy().data)
        yield block


def _read_again(model: GgufModel, layout: FileLayout) -> str:
    digest = hashlib.sha256()
    for tensor in layout.tensors:
        for _ in _hashed(model, tensor.name, digest):
            pass
    return digest.hexdigest()[:16]


def _fingerprint(model: GgufModel) -> str:
    """sha256 over every file's name, size and everything before its first tensor's bytes."""
    digest = hashlib.sha256()
    for file in model.files:
        start = min((one.offset for one in model.entries.values() if one.file == file), default=0)
        digest.update(f"{file.name} {file.stat().st_size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as opened:
            digest.update(opened.read(start))
    return digest.hexdigest()


def _file_type(model: GgufModel) -> str:
    """What a model's types are called; the most frequent one's name where the file does not say."""
    try:
        said = model.metadata.get("general.file_type")
        return LlamaFileType(said if isinstance(said, int) else -1).name.removeprefix("MOSTLY_")
    except ValueError:
        types = [one.type.name for one in model.entries.values()]
        return max(sorted(set(types)), key=types.count)
