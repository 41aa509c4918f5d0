"""Whether GGUF files are what they claim: checksums, structure, and every weight's distance from the source."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch

from qconv.artifacts.folded import FoldedSource, Weights, read_folded_scales
from qconv.artifacts.gguf_tensors import parts
from qconv.artifacts.reported import has_report, read_report, says_matched
from qconv.artifacts.source import Source
from qconv.core.qtensor import SquaredError
from qconv.core.workers import Workers
from qconv.errors import CheckpointError
from qconv.executors.threads import Threads
from qconv.formats.gguf.metadata import FOLDED
from qconv.formats.gguf.names import GgufTensor, gguf_tensors
from qconv.formats.gguf.reader import GgufModel, model_files, split_paths
from qconv.formats.gguf.rope import rope_of
from qconv.verification.blocks import finite_blocks, floor_db, is_known, least_of_rows
from qconv.verification.checksums import check_sums, check_sums_of
from qconv.verification.keys import check_keys
from qconv.verification.outcome import Progress, Verification
from qconv.verification.rows import SMALLEST, RowReader, WrongRows

_PARTS_NAMED = 3


def verify_gguf(path: Path, against: Path | None = None, progress: Progress | None = None) -> Verification:
    """Check a GGUF file, or all models in a folder; with ``against`` also weight by weight against their source.

    Raises:
        CheckpointError: the source (not the build) is damaged.
        UsageError: the source is of a family without a GGUF form, or scales were folded into the file that are not
            beside it.
    """
    result = Verification()
    try:
        if path.is_dir():
            check_sums(path, result, progress)
            first = model_files(path)
        else:
            first = [path]
            check_sums_of([file for file in split_paths(path) if file.is_file()], result, progress)
    except CheckpointError as error:
        result.problems.append(error.message)
    source = None if against is None else Source.open(against)
    if result.problems:
        return result
    with Threads() as workers:
        for file in first:
            _check(file, source, result, progress, workers)
    return result


def _check(
    file: Path, source: Source | None, result: Verification, progress: Progress | None, workers: Workers
) -> None:
    """One model, given by any of its files."""
    try:
        made = GgufModel.open(file)
        types = _reported_types(file.parent, made)
    except CheckpointError as error:
        result.problems.append(error.message)
        return
    for name, type in types.items():
        if made.entries[name].type.name != type:
            result.problems.append(f"{name} is {made.entries[name].type.name}; the build's report says {type}")
    result.checked.append(f"{len(made.entries)} tensors in {len(made.files)} files, each inside its file")
    _check_values(made, result, progress, workers)
    if source is not None and not result.problems:
        check_keys(made, bool(types), source, result)
        _check_weights(made, file.parent, source, result, progress, workers)


def _reported_types(folder: Path, made: GgufModel) -> dict[str, str]:
    """What the report of a build that qconv made says of its tensors; empty if it made none of these files."""
    if not has_report(folder):
        return {}
    report = read_report(folder)
    if not {file.name for file in made.files} <= set(report.get("files", ())):
        return {}
    missing = sorted(made.entries.keys() ^ report["tensors"].keys())
    if missing:
        raise CheckpointError(f"{made.files[0]}: tensor {missing[0]!r} is in the file or in its report, not in both.")
    return {name: one["type"] for name, one in report["tensors"].items()}


def _check_values(made: GgufModel, result: Verification, progress: Progress | None, workers: Workers) -> None:
    """Every block's scales, and what is not quantized, finite."""

    known = {name for name, entry in made.entries.items() if is_known(entry.type)}
    others = sorted({entry.type.name for entry in made.entries.values() if not is_known(entry.type)})
    if others:
        result.not_checked.append(f"values of {', '.join(others)}: where their scales are is not known to qconv")
    names = [name for name in made.entries if name in known]
    for done, problem in enumerate(workers.map(partial(_not_finite, made), names)):
        if progress is not None:
            progress("scales", done, len(names))
        result.problems += [] if problem is None else [problem]
    result.checked.append("every block's scales finite")


def _not_finite(made: GgufModel, name: str) -> str | None:
    """What is wrong with the scales of a tensor's blocks, or None."""
    entry, bad, rows = made.entry(name), 0, 0
    first: int | None = None
    for block in made.blocks(name):
        finite = finite_blocks(block, entry.type)
        if not bool(finite.all()):
            bad += int((~finite).sum())
            row = rows + int(torch.nonzero(~finite)[0]) * len(block) // len(finite)
            first = row if first is None else first
        rows += len(block)
    return f"{name}: {bad} blocks of {entry.type.name} are not finite, the first in row {first}" if bad else None


def _check_weights(
    made: GgufModel,
    folder: Path,
    source: Source,
    result: Verification,
    progress: Progress | None,
    workers: Workers,
) -> None:
    model = source.architecture
    factors = rope_of(source.checkpoint.config).factors(model.head_dim)
    tensors = gguf_tensors(model, factors, made.entries)
    expected = {tensor.name: tensor for tensor in tensors}
    beside = {one for name in expected for one in made.beside(name)}
    for name in sorted(expected.keys() - made.entries.keys()):
        result.problems.append(f"tensor {name} is missing")
    for name in sorted(made.entries.keys() - expected.keys() - beside):
        result.problems.append(f"tensor {name} is not part of the model")
    for name in expected.keys() & made.entries.keys():
        if made.entries[name].shape != expected[name].shape:
            result.problems.append(f"{name} is {list(made.entries[name].shape)}, not {list(expected[name].shape)}")
    if result.problems:
        return
    weights: Weights = source
    if made.metadata.get(FOLDED):
        weights = FoldedSource.of(source, read_folded_scales(folder, model))
    weighted, matched = _may_be_weighted(folder), has_report(folder) and says_matched(read_report(folder))

    def compare(tensor: GgufTensor) -> tuple[float, list[str]]:
        return _compare(made, weights, tensor, floor_db(made.entries[tensor.name].type, weighted, matched))

    for done, (tensor, (snr, problems)) in enumerate(zip(tensors, workers.map(compare, tensors), strict=True)):
        if progress is not None:
            progress("weights", done, len(tensors))
        if tensor.quantizable:
            result.snr_db[tensor.name] = snr
        result.problems += problems
    finite = [value for value in result.snr_db.values() if math.isfinite(value)]
    least = f", signal to noise at least {min(finite):.1f} dB" if finite else ""
    result.checked.append(f"{len(tensors)} tensors against the source, every expert and row{least}")


def _compare(made: GgufModel, source: Weights, tensor: GgufTensor, floor: float) -> tuple[float, list[str]]:
    """A tensor's signal to noise ratio, and what is wrong with it: as a whole, with an expert, with rows."""
    ours, total, problems = RowReader(made.dequantized(tensor.name)), SquaredError(), []
    for number, part in enumerate(parts(source, tensor)):
        error, found = SquaredError(), WrongRows(least_of_rows(made.entries[tensor.name].type))
        for block in part:
            wanted, start = block.reshape(-1, tensor.columns).float().contiguous(), 0
            for got in ours.take(len(wanted)):
                reference = wanted[start : start + len(got)]
                found.add(reference, got)
                error += SquaredError.between_(reference, got)
                start += len(got)
        total += error
        where = f"{tensor.name}, expert {number}" if len(tensor.sources) > 1 else tensor.name
        if _counts(error, found.of * tensor.columns) and not error.snr_db >= floor:
            problems.append(f"{where}: signal to noise {error.snr_db:.1f} dB, below {floor:.1f}")
        elif found.rows:
            problems.append(f"{where}: {found}")
    whole = f"{tensor.name}: signal to noise {total.snr_db:.1f} dB, below {floor:.1f}"
    if not total.snr_db >= floor and (not problems or 2 * len(problems) > len(tensor.sources)):
        return total.snr_db, [whole]
    if len(problems) > _PARTS_NAMED:
        problems = [*problems[:_PARTS_NAMED], f"{tensor.name}: {len(problems) - _PARTS_NAMED} more experts are wrong"]
    return total.snr_db, problems


def _counts(error: SquaredError, elements: int) -> bool:
    """Whether a part is not so small that half-precision scales have no room for it."""
    return error.signal >= SMALLEST**2 * elements


def _may_be_weighted(folder: Path) -> bool:
    """Whether a build's report names an imatrix, or nothing says how it was made."""
    if not has_report(folder):
        return True
    report = read_report(folder)
    return report.get("imatrix") is not None or "converted" in report
