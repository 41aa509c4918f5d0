"""GGUF straight to the final type: one pass over the source, file by file, resumable at every file.

A file of the set is what is committed: written under a temporary name, read back from disk, and only then given its
name and journalled. Every block of rows is decoded again as it is encoded, a few rows of it, so that an encoder that
does not stand for its weights is found before its file is published; ``verify`` decodes all of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv import __version__, native
from qconv.build import REPORT_NAME
from qconv.checkpoint.reader import read_json
from qconv.checkpoint.writer import output_errors, sha256_of, write_atomically
from qconv.errors import UsageError, VerificationError
from qconv.ggml import compiled, encode
from qconv.gguf.container import FileLayout, GgufWriter, TensorInfo
from qconv.gguf.imatrix import Imatrix, read_imatrix
from qconv.gguf.metadata import require_expressible
from qconv.gguf.mixture import needs_importance, tensor_types
from qconv.gguf.names import gguf_tensors
from qconv.gguf.plan import GgufPlan, plan_gguf
from qconv.gguf.rope import rope_of
from qconv.gguf.tensors import encoder, importance_of, uniform, weighted_blocks
from qconv.gguf_verify import decoded, floor_db
from qconv.manifest import WORK_FOLDER, Journal, locked
from qconv.models import architecture
from qconv.output import (
    FolderState,
    Outcome,
    already_complete,
    enter,
    open_journal,
    require_apart,
    require_disk,
    require_published,
)
from qconv.parallel import Workers
from qconv.qtensor import SquaredError
from qconv.source import Source
from qconv.verify import CHECKSUMS_NAME, Progress, build_files, render_checksums

Log = Callable[[str], None]

SAMPLED_ROWS = 4
"""Of each block of rows, decoded again at once."""
SHRINKAGE_TOKENS = 64.0
"""k of ``(n own + k layer) / (n + k)`` for the importance of an expert that saw n tokens."""


def quantize_gguf(
    model: Path,
    out: Path,
    file_type: str,
    *,
    imatrix: Path | None = None,
    max_file_size: int,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Write a model as GGUF, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder of the files; made if absent.
        file_type: As llama.cpp calls it: ``Q4_K_M``.
        imatrix: An importance matrix in llama.cpp's GGUF or legacy form.
        max_file_size: Bytes of tensors in a file; larger models become a set of splits.
        restart: Discard what ``out`` holds, if that is a model or build.
        threads: Blocks of rows worked on at once; the bytes do not depend on it.
        progress: Told the file at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError: the request cannot work.
        CheckpointError: the source or the imatrix is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    require_apart(model, out)
    source = Source.open(model)
    for notice in source.notices():
        log(f"source: {notice}")
    matrix = None if imatrix is None else read_imatrix(imatrix)
    name = f"{model.resolve().name}-{file_type}"
    plan = plan_gguf(source, file_type, name, importance=matrix is not None, max_split_size=max_file_size)
    if matrix is None:
        _require_no_importance(plan)
    else:
        log(f"imatrix: {_coverage(plan, matrix)}")
    fingerprints = {
        "weights": source.checkpoint.fingerprint(),
        "recipe": hashlib.sha256(json.dumps([file_type, max_file_size, SHRINKAGE_TOKENS]).encode()).hexdigest(),
        "calibration data": "none" if imatrix is None else sha256_of(imatrix),
        "versions": f"qconv={__version__} torch={torch.__version__}",
    }
    native.load(compiled.LIBRARY)  # its warning, if there is one, comes before the progress bar
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), Workers(threads) as workers:
        return _Run(source, plan, matrix, out, fingerprints, workers, progress, log).run(restart)


def tensor_infos(model: Path, file_type: str) -> list[TensorInfo]:
    """What a build would hold, from config.json alone.

    Raises:
        CheckpointError: config.json is missing, damaged or of unknown architecture.
        UsageError: no such file type, or a model that llama.cpp cannot express.
    """
    config = read_json(model / "config.json")
    described = architecture(config)
    require_expressible(config, described)
    tensors = gguf_tensors(described, rope_of(config).factors(described.head_dim))
    types = tensor_types(file_type, described, tensors, importance=False)
    return [TensorInfo(tensor.name, types[tensor.name], tensor.shape) for tensor in tensors]


def _require_no_importance(plan: GgufPlan) -> None:
    for tensor in plan.tensors.values():
        if needs_importance(plan.file_type, tensor, plan.types[tensor.name]):
            type = plan.types[tensor.name].name
            raise UsageError(
                f"gguf:{plan.file_type}: {tensor.name} becomes {type}, which is useless without an imatrix.",
                hint="Give --imatrix FILE.",
            )


def _coverage(plan: GgufPlan, matrix: Imatrix) -> str:
    """How much of the model an importance matrix speaks of, as a sentence."""
    tensors = [tensor for tensor in plan.tensors.values() if tensor.quantizable and tensor.layer is not None]
    missing, experts, unseen = 0, 0, 0
    for tensor in tensors:
        entry = matrix.entry(tensor.name, len(tensor.sources), tensor.columns)
        if entry is None:
            missing += 1
        elif len(tensor.sources) > 1:
            experts += len(entry.seen)
            unseen += int((entry.seen == 0).sum())
    said = f"{len(tensors) - missing} of {len(tensors)} weights in layers have an importance"
    if experts:
        said += f"; {unseen} of {experts} experts' saw no token and take their layer's"
    return said


class _Run:
    def __init__(
        self,
        source: Source,
        plan: GgufPlan,
        importance: Imatrix | None,
        out: Path,
        fingerprints: dict[str, str],
        workers: Workers,
        progress: Progress,
        log: Log,
    ) -> None:
        self.source = source
        self.plan = plan
        self.importance = importance
        self.columns = uniform if importance is None else importance_of(importance, SHRINKAGE_TOKENS)
        self.weights = sum(tensor.numel for tensor in plan.tensors.values())
        self.out = out
        self.work = out / WORK_FOLDER
        self.fingerprints = fingerprints
        self.workers = workers
        self.progress = progress
        self.log = log
        self.done = 0

    def run(self, restart: bool) -> Outcome:
        if enter(self.out, restart) is FolderState.COMPLETE:
            return already_complete(self.out, self.fingerprints)
        journal, resumed = open_journal(self.out, self.fingerprints)
        if resumed:
            self.log(f"resuming: {len(journal.units)} of {len(self.plan.files)} files are committed")
        require_disk(self.out, sum(file.size for file in self.plan.files if file.name not in journal.units))
        for file in self.plan.files:
            self._file(file, journal)
        return Outcome(self.out, self._finish(journal), already_complete=False)

    def _file(self, file: FileLayout, journal: Journal) -> None:
        weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
        self.progress(file.name, self.done, self.weights)
        if file.name in journal.units:
            require_published(self.out / file.name, journal.units[file.name]["size"])
            self.done += weights
            return
        with GgufWriter(self.out, file) as writer:
            snr_db = self._write(file, writer)
            record = writer.commit()
        journal.commit(file.name, {"size": record.size, "sha256": record.sha256, "snr_db": snr_db})

    def _write(self, file: FileLayout, writer: GgufWriter) -> dict[str, float | None]:
        """Encode and write a file's tensors; each one's signal to noise on the sampled rows, in decibels."""
        snr_db: dict[str, float | None] = {}
        encoded = self.workers.map(_encode, self._blocks(file))
        for name, group in itertools.groupby(encoded, key=lambda one: one.name):
            errors: list[SquaredError] = []
            writer.write_blocks(name, self._counted(group, errors))
            snr = sum(errors, SquaredError()).snr_db
            floor = floor_db(self.plan.types[name], self.importance is not None)
            if not snr >= floor:
                raise VerificationError(
                    f"{file.name}: {name} does not stand for the source: signal to noise {snr:.1f} dB, below "
                    f"{floor:.1f}.",
                    hint="Nothing of this file was kept. If memory is sound, this is a bug.",
                )
            snr_db[name] = round(snr, 3) if math.isfinite(snr) else None
        return snr_db

    def _counted(self, group: Iterator[_Encoded], errors: list[SquaredError]) -> Iterator[Tensor]:
        for one in group:
            errors.append(one.error)
            yield one.data
            self.done += one.weights
            self.progress(one.name, self.done, self.weights)

    def _blocks(self, file: FileLayout) -> Iterator[_Block]:
        for info in file.tensors:
            tensor, type = self.plan.tensors[info.name], self.plan.types[info.name]
            importance = self.columns if tensor.quantizable else uniform
            for rows, columns in weighted_blocks(self.source, tensor, importance):
                yield _Block(tensor.name, type, rows, columns)

    def _finish(self, journal: Journal) -> dict[str, Any]:
        plan = self.plan
        report = {
            "qconv": __version__,
            "source": self.source.checkpoint.path.resolve().name,
            "format": f"gguf:{plan.file_type}",
            "fingerprints": journal.fingerprints,
            "imatrix": None if self.importance is None else list(self.importance.datasets),
            "parameters": self.weights,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "files": [file.name for file in plan.files],
            "tensors": {
                name: {"type": plan.types[name].name, "snr_db": snr}
                for record in journal.units.values()
                for name, snr in record["snr_db"].items()
            },
        }
        write_atomically(self.out / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
        names = build_files(self.out)
        sums = dict(zip(names, self.workers.map(lambda name: sha256_of(self.out / name), names), strict=True))
        for file in plan.files:
            if sums.get(file.name) != journal.units[file.name]["sha256"]:
                raise VerificationError(
                    f"{self.out / file.name}: changed since it was committed.", hint="Start over with --restart."
                )
        write_atomically(self.out / CHECKSUMS_NAME, render_checksums(sums).encode())
        shutil.rmtree(self.work)
        return report


@dataclass(frozen=True, slots=True)
class _Block:
    name: str
    type: GGMLQuantizationType
    rows: Tensor
    importance: Tensor | None


@dataclass(frozen=True, slots=True)
class _Encoded:
    name: str
    data: Tensor
    weights: int
    error: SquaredError


def _encode(block: _Block) -> _Encoded:
    data = encode(block.rows, encoder(block.type), block.importance)
    reference = block.rows[:SAMPLED_ROWS].float().contiguous()
    error = SquaredError.between_(reference, decoded(data[:SAMPLED_ROWS], block.type))
    return _Encoded(block.name, data, block.rows.numel(), error)
