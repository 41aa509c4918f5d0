"""Whether a build is what it claims: its checksums, its structure, its skip list, and its distance from the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qconv import integer_grid
from qconv.build import Build
from qconv.checkpoint.reader import Tensors
from qconv.checkpoint.writer import sha256_of
from qconv.errors import CheckpointError, VerificationError
from qconv.folding import Folds, folded_weight
from qconv.manifest import WORK_FOLDER
from qconv.methods.base import row_blocks
from qconv.models.base import Layer, Linear
from qconv.parallel import Workers
from qconv.plan import Module
from qconv.qtensor import QTensor, SquaredError
from qconv.source import Source

CHECKSUMS_NAME = "SHA256SUMS"
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""


@dataclass(slots=True)
class Verification:
    """The outcome.

    Attributes:
        checked: What was checked, as sentences.
        problems: What is wrong, as sentences; empty for a good build.
        snr_db: Signal to noise ratio of every quantized linear against the source, in decibels, by module name.
        notices: What a reader should know though it is no fault.
    """

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    snr_db: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def raise_if_bad(self, path: Path) -> None:
        """Turn problems into an error.

        Raises:
            VerificationError: there are problems; names the first few.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 3} more)" if len(self.problems) > 3 else ""
            raise VerificationError(
                f"{path}: the build is bad: {'; '.join(self.problems[:3])}{more}.",
                hint="Do not publish it; build it again.",
            )


def snr_floor_db(bits: int, compensated: bool) -> float:
    """The least credible signal to noise ratio of a linear with that many bits, in decibels.

    A uniform quantizer gains 6.02 dB a bit; gaussian weights in groups of 128 come within 4 dB of that, heavy tails and
    clipping cost a few more. Ten below is beyond any sound rounding and far above what swapped nibbles, shifted scales
    or a wrong tensor give: -3 dB, the ratio of two unrelated tensors of one size.

    Compensation (GPTQ) puts errors where the inputs have little energy, and the more of them the more the inputs
    correlate: 12 dB less than rounding were seen, with one input far larger than all others. So it is given six more,
    down to -2 dB for few bits.
    """
    return max(6.02 * bits - 20.0, -2.0) if compensated else 6.02 * bits - 14.0


FLOAT_SNR_FLOOR_DB = 24.0
"""The least possible signal to noise ratio of a linear of E4M3 floats, whatever its weights.

Rounding to three bits of fraction moves a number by at most 1/17 of itself (1 + 1/16 becomes 1), which is 24.6 dB; what
lies below 2**-6 moves by at most 2**-10 where the largest of its block is 448, which 100 million weights that share a
scale bring to 24.1 dB. Sound weights have about 31.5: errors of a gaussian are spread over each power of two.
"""


def verify(path: Path, against: Path | None = None, progress: Progress | None = None) -> Verification:
    """Check a build; with ``against`` also weight by weight against its source.

    Raises:
        CheckpointError: the source (not the build) is damaged.
    """
    result = Verification()
    check_sums(path, result, progress)
    source = None if against is None else Source.open(against)
    try:
        build = Build.open(path)
        check_structure(build, result)
    except CheckpointError as error:
        result.problems.append(error.message)
    if result.problems:
        return result
    with Workers() as workers:
        if source is not None:
            _check_weights(build, source, result, progress, workers)
        else:
            _check_scales(build, result, progress, workers)
    return result


@dataclass(frozen=True, slots=True)
class Comparison:
    """How modules of a build are compared with the source.

    Attributes:
        source: The source's tensors.
        folds: What was folded into the modules' layer.
        compensated: Whether weights may carry compensation for each other's errors.
    """

    source: Tensors
    folds: Folds
    compensated: bool

    def weight(self, linear: Linear, weight: QTensor) -> tuple[float, str | None]:
        """A quantized weight's signal to noise ratio in decibels, and what is wrong with it or None."""
        snr = self._error(linear, weight).snr_db
        problem = _bad_parameters(weight)
        floor = FLOAT_SNR_FLOOR_DB if weight.grid.is_float else snr_floor_db(weight.grid.bits, self.compensated)
        if problem is None and not snr >= floor:
            problem = f"signal to noise {snr:.1f} dB, below {floor:.1f}"
        return snr, None if problem is None else f"{linear.name}: {problem}"

    def _error(self, linear: Linear, weight: QTensor) -> SquaredError:
        """Signal and noise over the whole weight, of which memory holds one block of the source's rows."""
        in_scale, out_scale = self.folds.input_scale(linear), self.folds.output_scale(linear)
        error, start = SquaredError(), 0
        for block in self.source.blocks(linear.weight, weight.grid.row_multiple):
            stop = start + len(block)
            out = None if out_scale is None else out_scale[start:stop]
            error += weight_error(block, weight.rows(start, stop), in_scale, out)
            start = stop
        return error

    def is_copy(self, module: Module) -> bool:
        """Whether the module's plain tensors must be the source's, bit for bit."""
        return not self.folds.touches(module)

    def folded(self, module: Module, name: str, tensor: Tensor) -> str | None:
        """What is wrong with a plain tensor that folding changed, or None."""
        if torch.equal(tensor, self.folds.expected(module, name, self.source.read(name))):
            return None
        return f"{name}: is not the source's after folding"


def weight_error(source: Tensor, weight: QTensor, in_scale: Tensor | None, out_scale: Tensor | None) -> SquaredError:
    """Signal and noise of a quantized weight against its source [out, in] after folding."""
    error = integer_grid.squared_error(source, weight, in_scale, out_scale)
    if error is not None:
        return error
    total = SquaredError()
    for start, stop in row_blocks(*weight.shape, weight.grid.row_multiple):
        out = None if out_scale is None else out_scale[start:stop]
        reference = folded_weight(source[start:stop], in_scale, out)
        total += SquaredError.between_(reference, weight.rows(start, stop).dequantize())
    return total


def parse_checksums(text: str) -> dict[str, str]:
    """File names and sha256 from a checksum file in sha256sum's format.

    Raises:
        ValueError: not exactly what :func:`render_checksums` writes.
    """
    sums = {}
    for line in text.splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or not name:
            raise ValueError(f"malformed line {line!r}")
        sums[name] = digest
    if render_checksums(sums) != text or any(len(value) != 64 for value in sums.values()):
        raise ValueError("not in canonical form")
    return sums


def render_checksums(sums: dict[str, str]) -> str:
    """sha256sum's format, sorted by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def build_files(path: Path) -> list[str]:
    """Every file of a build but the checksum file and the work folder, relative, sorted."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if file.parts[0] != WORK_FOLDER and str(file) != CHECKSUMS_NAME)


def check_sums(path: Path, result: Verification, progress: Progress | None) -> None:
    """Every file against the checksums of the build, if it has them."""
    file = path / CHECKSUMS_NAME
    if not file.exists():
        result.notices.append(f"no {CHECKSUMS_NAME}: flipped bits that leave the structure whole cannot be found")
        return
    try:
        sums = parse_checksums(file.read_text())
    except (OSError, ValueError) as error:
        result.problems.append(f"{CHECKSUMS_NAME}: {error}")
        return
    for done, (name, expected) in enumerate(sums.items()):
        if progress is not None:
            progress("checksums", done, len(sums))
        try:
            if sha256_of(path / name) != expected:
                result.problems.append(f"{name}: its sha256 is not the one in {CHECKSUMS_NAME}")
        except OSError as error:
            result.problems.append(f"{name}: {error.strerror}")
    for name in build_files(path):
        if name in sums:
            continue
        if name.endswith(".safetensors"):
            result.problems.append(f"{name}: not listed in {CHECKSUMS_NAME}")
        else:
            result.notices.append(f"{name}: not part of the build")
    result.checked.append(f"sha256 of {len(sums)} files")


def check_structure(build: Build, result: Verification) -> None:
    """Every tensor of the model once, of its shape, none besides; the skip list equal to what was skipped."""
    expected = dict(build.expected_tensors())
    entries = build.checkpoint.entries
    for name in expected.keys() - entries.keys():
        result.problems.append(f"tensor {name} is missing")
    for name in entries.keys() - expected.keys():
        result.problems.append(f"{entries[name].file.name}: tensor {name} is not part of the model")
    for name in expected.keys() & entries.keys():
        if entries[name].shape != expected[name]:
            result.problems.append(f"tensor {name} is {list(entries[name].shape)}, not {list(expected[name])}")
    model = build.architecture
    linears = [linear for layer in model.layers for linear in (*layer.routers(), *layer.linears())]
    if model.lm_head is not None:
        linears.append(model.lm_head)
    for linear in linears:
        skipped = build.format.is_skipped(linear.name, build.skipped)
        if skipped == build.is_quantized(linear):
            state, listed = ("quantized", "is") if skipped else ("not quantized", "is not")
            result.problems.append(f"{linear.name} is {state} but {listed} on the skip list")
    result.problems.sort()
    result.checked.append(f"{len(expected)} tensors present once with their shapes, skip list of {len(build.skipped)}")


_E4M3_NAN = 0x7F
"""With either sign."""


def _bad_parameters(weight: QTensor) -> str | None:
    scales = weight.scales.float()
    if not bool(torch.isfinite(scales).all()):
        return "a scale is not finite"
    if not bool((scales > 0).all()):
        return "a scale is not positive"
    if weight.grid.is_float:
        if bool(((weight.codes.view(torch.uint8) & _E4M3_NAN) == _E4M3_NAN).any()):
            return "a code is not a number"
    elif int(weight.codes.max()) >= weight.grid.levels:
        return "a code is out of range"
    if weight.grid.activations == "static":
        if weight.input_scale is None:
            return "there is no scale for its inputs"
        if not 0.0 < float(weight.input_scale) < math.inf:
            return "the scale of its inputs is not finite and positive"
    return None


def _check_scales(build: Build, result: Verification, progress: Progress | None, workers: Workers) -> None:
    def check(linear: Linear) -> str | None:
        return _bad_parameters(build.qtensor(linear))

    layers = build.architecture.layers
    for layer in layers:
        if progress is not None:
            progress("scales", layer.index, len(layers))
        linears = [linear for linear in layer.linears() if build.is_quantized(linear)]
        for linear, problem in zip(linears, workers.map(check, linears), strict=True):
            if problem is not None:
                result.problems.append(f"{linear.name}: {problem}")
    result.checked.append("every scale finite and positive")


def _check_weights(
    build: Build, source: Source, result: Verification, progress: Progress | None, workers: Workers
) -> None:
    model = build.architecture
    if dict(model.tensors()) != dict(source.architecture.tensors()):
        result.problems.append("the source is another model: its tensors differ in name or shape")
        return
    ends: list[Module] = [model.embedding, model.final_norm]
    if model.lm_head is not None:
        ends.append(model.lm_head)
    method = build.method()
    compensated = method is None or "gptq" in method
    groups: list[tuple[Layer | None, list[Module]]] = [(None, ends)]
    groups += [(layer, [*layer.norms(), *layer.routers(), *layer.linears()]) for layer in model.layers]
    for done, (layer, modules) in enumerate(groups):
        if progress is not None:
            progress("weights", done, len(groups))
        folds = Folds.none() if layer is None else Folds.of(model, layer, build.fold_scales(layer))
        compare = partial(_compare, build, Comparison(source.checkpoint, folds, compensated))
        for module, (snr, problem) in zip(modules, workers.map(compare, modules), strict=True):
            if snr is not None:
                result.snr_db[module.name] = snr
            if problem is not None:
                result.problems.append(problem)
    finite = [value for value in result.snr_db.values() if math.isfinite(value)]
    least = f", signal to noise at least {min(finite):.1f} dB" if finite else ""
    result.checked.append(f"{len(result.snr_db)} quantized linears against the source{least}; the rest bit for bit")


def _compare(build: Build, comparison: Comparison, module: Module) -> tuple[float | None, str | None]:
    """A module's signal to noise ratio, None where it is not quantized, and what is wrong or None."""
    snr, problem = None, None
    for name, _ in module.tensors():
        found = None
        if isinstance(module, Linear) and name == module.weight and build.is_quantized(module):
            snr, found = comparison.weight(module, build.qtensor(module))
        elif not comparison.is_copy(module):
            found = comparison.folded(module, name, build.checkpoint.read(name))
        else:
            pairs = zip(build.checkpoint.blocks(name), comparison.source.blocks(name), strict=True)
            if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
                found = f"{name}: differs from the source"
        problem = problem or found
    return snr, problem
