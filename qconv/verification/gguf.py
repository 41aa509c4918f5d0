"""Whether GGUF files are what they claim: checksums, structure, and every weight's distance from the source."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from qconv.build import REPORT_NAME
from qconv.checkpoint.reader import read_json
from qconv.errors import CheckpointError
from qconv.gguf.names import GgufTensor, gguf_tensors
from qconv.gguf.reader import GgufModel
from qconv.gguf.rope import rope_of
from qconv.gguf.tensors import parts
from qconv.parallel import Workers
from qconv.qtensor import SquaredError
from qconv.source import Source
from qconv.verification.checksums import check_sums
from qconv.verification.floors import snr_floor_db
from qconv.verification.outcome import Progress, Verification

_FLOAT_FLOORS = {"F32": math.inf, "F16": 60.0, "BF16": 45.0, "MXFP4": 10.0}
"""Signal to noise of 11 and 8 significant bits is about 73 and 55 dB, that of E2M1 with a power of two for scale 16."""

_LATTICE_FLOORS = {"IQ3_S": 8.0, "IQ3_XXS": 7.0, "IQ2_S": 3.5, "IQ2_XS": 3.5, "IQ2_XXS": 2.0}
"""Without importance. Gaussian weights have 17.8, 15.0, 12.4, 10.9 and 9.6 dB. The worst that a search came to, on
weights from a Cauchy distribution or three of a hundred not zero, is about one above these: no level is zero, so what
is small beside its neighbours gets an error of its own size."""

_WEIGHTED_LATTICE_FLOOR = -1.0
"""With importance, trained weights lose up to four dB. But a few outliers can hold most of the signal, and if they
matter to no output they may become the lowest level, even with the wrong sign. A wrong tensor has -3 dB."""


def floor_db(type: GGMLQuantizationType, weighted: bool) -> float:
    """The least credible signal to noise ratio of a tensor of a type, in decibels.

    Args:
        type: Its type.
        weighted: Whether an importance may have moved errors between columns.
    """
    if type.name in _FLOAT_FLOORS:
        return _FLOAT_FLOORS[type.name]
    if type.name in _LATTICE_FLOORS:
        return _WEIGHTED_LATTICE_FLOOR if weighted else _LATTICE_FLOORS[type.name]
    bits = int(next(character for character in type.name if character.isdigit()))
    return snr_floor_db(bits, compensated=weighted)


def decoded(data: Tensor, type: GGMLQuantizationType) -> Tensor:
    """The values of encoded rows, uint8 [rows, bytes]: float32 [rows, columns]."""
    return torch.from_numpy(dequantize(data.numpy(), type).astype("float32", copy=True))


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder that holds one and no config.json."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def verify_gguf(path: Path, against: Path | None = None, progress: Progress | None = None) -> Verification:
    """Check a GGUF file or the set in a folder; with ``against`` also weight by weight against its source.

    Raises:
        CheckpointError: the source (not the build) is damaged.
        UsageError: the source is of a family without a GGUF form.
    """
    result = Verification()
    if path.is_dir():
        check_sums(path, result, progress)
    source = None if against is None else Source.open(against)
    try:
        made = GgufModel.open(path)
    except CheckpointError as error:
        result.problems.append(error.message)
    if result.problems:
        return result
    result.checked.append(f"{len(made.entries)} tensors in {len(made.files)} files, each inside its file")
    if source is not None:
        with Workers() as workers:
            _check_weights(path, made, source, result, progress, workers)
    return result


def _check_weights(
    path: Path, made: GgufModel, source: Source, result: Verification, progress: Progress | None, workers: Workers
) -> None:
    model = source.architecture
    tensors = gguf_tensors(model, rope_of(source.checkpoint.config).factors(model.head_dim))
    expected = {tensor.name: tensor for tensor in tensors}
    for name in sorted(expected.keys() - made.entries.keys()):
        result.problems.append(f"tensor {name} is missing")
    for name in sorted(made.entries.keys() - expected.keys()):
        result.problems.append(f"tensor {name} is not part of the model")
    for name in expected.keys() & made.entries.keys():
        if made.entries[name].shape != expected[name].shape:
            result.problems.append(f"{name} is {list(made.entries[name].shape)}, not {list(expected[name].shape)}")
    if result.problems:
        return
    weighted = _may_be_weighted(path)

    def compare(tensor: GgufTensor) -> SquaredError:
        return _error(made, source, tensor)

    for done, (tensor, error) in enumerate(zip(tensors, workers.map(compare, tensors), strict=True)):
        if progress is not None:
            progress("weights", done, len(tensors))
        snr, floor = error.snr_db, floor_db(made.entries[tensor.name].type, weighted)
        if tensor.quantizable:
            result.snr_db[tensor.name] = snr
        if not snr >= floor:
            result.problems.append(f"{tensor.name}: signal to noise {snr:.1f} dB, below {floor:.1f}")
    finite = [value for value in result.snr_db.values() if math.isfinite(value)]
    least = f", signal to noise at least {min(finite):.1f} dB" if finite else ""
    result.checked.append(f"{len(tensors)} tensors against the source{least}")


def _error(made: GgufModel, source: Source, tensor: GgufTensor) -> SquaredError:
    """All values of a tensor against the source's, whatever the blocks in which either side comes."""
    theirs = (block.reshape(-1) for part in parts(source, tensor) for block in part)
    total, reference = SquaredError(), torch.empty(0)
    for block in made.dequantized(tensor.name):
        ours = block.reshape(-1)
        while len(ours):
            if not len(reference):
                reference = next(theirs)
            count = min(len(ours), len(reference))
            total += SquaredError.between_(reference[:count].float().contiguous(), ours[:count])
            ours, reference = ours[count:], reference[count:]
    return total


def _may_be_weighted(path: Path) -> bool:
    """Whether a build's report names an imatrix, or nothing says how it was made."""
    if not (path / REPORT_NAME).is_file():
        return True
    return read_json(path / REPORT_NAME).get("imatrix") is not None
