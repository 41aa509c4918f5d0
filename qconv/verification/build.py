"""A safetensors build, verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qconv.artifacts.build import Build
from qconv.artifacts.dtypes import weight_dtype
from qconv.artifacts.layout import Layout, layout_of
from qconv.artifacts.opening import open_checkpoint
from qconv.artifacts.source import Source, check_tensors
from qconv.boundary.printable import name_of
from qconv.checkpoint.fp8 import Dequantized
from qconv.checkpoint.header import DTYPE_NAMES
from qconv.checkpoint.reader import Checkpoint, in_config, require_finite
from qconv.core.qtensor import SquaredError
from qconv.core.workers import Workers
from qconv.errors import CheckpointError, UnreadLayoutError, UsageError
from qconv.executors.threads import Threads
from qconv.models import architecture, families, is_known
from qconv.verification.checksums import check_sums
from qconv.verification.companions import check_companions
from qconv.verification.floors import float_snr_floor_db
from qconv.verification.outcome import Progress, Verification
from qconv.verification.rows import WrongRows
from qconv.verification.structure import check_structure
from qconv.verification.values import check_inputs, check_values
from qconv.verification.verbatim import check_copies
from qconv.verification.weights import check_weights


def verify(path: Path, against: Path | None = None, progress: Progress | None = None) -> Verification:
    """Check a build; with ``against`` also weight by weight against its source, and the files beside the weights.

    What qconv does not read, a layout or an architecture, is not checked beyond its checksums and headers.

    Raises:
        CheckpointError: the source (not the build) is damaged.
    """
    result = Verification()
    check_sums(path, result, progress)
    source = None if against is None else Source.open(against)
    try:
        checkpoint = open_checkpoint(path)
        layout = layout_of(path, checkpoint.config)
        kind = checkpoint.config.get("model_type")
        if isinstance(kind, str) and not is_known(checkpoint.config):
            known = ", ".join(families())
            result.not_checked.append(f"an architecture that qconv does not know, {name_of(kind)!r}; it knows {known}")
        elif not result.problems:
            _check(checkpoint, layout, source, result, progress)
    except (UnreadLayoutError, UsageError) as error:
        result.not_checked.append(error.message)
    except CheckpointError as error:
        result.problems.append(error.message)
    return result


def _check(
    checkpoint: Checkpoint, layout: Layout, source: Source | None, result: Verification, progress: Progress | None
) -> None:
    """Of what is read, everything."""
    with Threads() as workers:
        if layout.format is not None:
            build = Build.of(checkpoint)
            check_structure(build, result)
            if not result.problems and source is None:
                check_values(build, result, progress, workers)
            elif not result.problems and source is not None:
                check_inputs(build, result, workers)
                check_weights(build, source, result, progress, workers)
                check_copies(build, source, result, workers)
                check_companions(checkpoint.path, build.is_ours, source, result)
        elif layout.scheme is not None:
            _check_float(checkpoint, layout, source, result, progress, workers)
        else:
            with in_config(checkpoint.path):
                check_tensors(checkpoint, architecture(checkpoint.config))
            result.not_checked.append(f"{checkpoint.path}: an unquantized checkpoint, no build")


def _check_float(
    checkpoint: Checkpoint,
    layout: Layout,
    source: Source | None,
    result: Verification,
    progress: Progress | None,
    workers: Workers,
) -> None:
    """FP8 in words that no format of qconv's uses: as the dense model that it stands for."""
    assert layout.scheme is not None
    dense = Dequantized.of(checkpoint, layout.scheme, weight_dtype(checkpoint.path, checkpoint.config))
    with in_config(checkpoint.path):
        model = architecture(dense.config)
        check_tensors(dense, model)
    result.checked.append(f"{len(dense.entries)} tensors present once with their shapes, {len(dense.scales)} in FP8")
    if source is not None and dict(model.tensors()) != dict(source.architecture.tensors()):
        result.problems.append("the source is another model: its tensors differ in name or shape")
        return

    def compare(name: str) -> tuple[float | None, str | None]:
        return _float_tensor(dense, source, name)

    names = [name for name, _ in model.tensors()]
    for done, (name, (snr, problem)) in enumerate(zip(names, workers.map(compare, names), strict=True)):
        if progress is not None:
            progress("weights", done, len(names))
        if snr is not None:
            result.snr_db[name.removesuffix(".weight")] = snr
        result.problems += [] if problem is None else [problem]
    result.checked.append("every scale and element finite" + ("" if source is None else ", each against the source"))
    if source is not None:
        check_companions(checkpoint.path, False, source, result)


def _float_tensor(dense: Dequantized, source: Source | None, name: str) -> tuple[float | None, str | None]:
    """A tensor's signal to noise ratio, None where it is not quantized or there is no source, and what is wrong."""
    entry = dense.entry(name)
    row, error, found = 0, SquaredError(), WrongRows()
    theirs: Iterator[torch.Tensor] = iter(()) if source is None else source.checkpoint.blocks(name)
    try:
        for block in dense.blocks(name):
            require_finite(block, entry, row)
            row += len(block) if block.dim() else 1
            if source is None:
                continue
            reference = next(theirs)
            if name not in dense.scales:
                if reference.dtype != block.dtype:
                    return None, f"{name} is {DTYPE_NAMES[block.dtype]}, {DTYPE_NAMES[reference.dtype]} in the source"
                if not torch.equal(reference, block):
                    return None, f"{name}: differs from the source"
                continue
            ours, wanted = block.float(), reference.float()
            found.add(wanted, ours)
            error += SquaredError.between_(wanted.contiguous(), ours)
    except CheckpointError as failure:
        return None, failure.message
    if source is None or name not in dense.scales:
        return None, None
    # Nothing says how it was made.
    floor = float_snr_floor_db(compensated=True)
    if not error.snr_db >= floor:
        return error.snr_db, f"{name}: signal to noise {error.snr_db:.1f} dB, below {floor:.1f}"
    return error.snr_db, f"{name}: {found}" if found.rows else None
