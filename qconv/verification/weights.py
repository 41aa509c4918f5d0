"""The weights of a build: each one's distance from the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.mlx_view import MlxCheckpoint
from qconv.artifacts.source import Source
from qconv.checkpoint.reader import Tensors
from qconv.checkpoint.stream import same_bits
from qconv.core import integer_grid
from qconv.core.architecture import Layer, Linear, Module
from qconv.core.qtensor import QTensor, SquaredError
from qconv.core.rounding import row_blocks
from qconv.core.workers import Workers
from qconv.errors import CheckpointError
from qconv.models.folding import Folds, folded_weight
from qconv.verification.floors import float_snr_floor_db, matched_floor_db, snr_floor_db
from qconv.verification.outcome import Progress, Verification
from qconv.verification.rows import WrongRows
from qconv.verification.values import bad_parameters, not_finite


@runtime_checkable
class Coded(Protocol):
    """Tensors that know of which codes and scales they are made."""

    def is_made_of(self, name: str, weight: QTensor) -> bool:
        """Whether a tensor is certainly what a weight dequantizes to: the same codes, and steps equal as float32."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How modules of a build are compared with the source.

    Attributes:
        source: The source's tensors.
        folds: What was folded into the modules' layer.
        matched: Whether weights that are compensated may have been moved before, by matched calibration.
        ours: Whether qconv made them: others' scales may be negative.
    """

    source: Tensors
    folds: Folds
    matched: bool = False
    ours: bool = True

    def weight(self, linear: Linear, weight: QTensor, *, compensated: bool) -> tuple[float, str | None]:
        """A quantized weight's signal to noise ratio in decibels, and what is wrong with it or None.

        Args:
            linear: Which.
            weight: As the build holds it.
            compensated: Whether its elements may carry compensation for each other's errors.
        """
        same = isinstance(self.source, Coded) and self.source.is_made_of(linear.weight, weight)
        snr = math.inf if same else self._error(linear, weight).snr_db
        problem = bad_parameters(weight) if self.ours else not_finite(weight)
        grid = weight.grid
        floor = float_snr_floor_db(compensated) if grid.number == "e4m3" else snr_floor_db(grid.bits, compensated)
        floor = matched_floor_db(floor) if self.matched and compensated else floor
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

    def rows(self, linear: Linear, weight: QTensor) -> str | None:
        """Which rows of a quantized weight are not the source's, however near the whole is; None if all are."""
        in_scale, out_scale = self.folds.input_scale(linear), self.folds.output_scale(linear)
        found, start = WrongRows(), 0
        for block in self.source.blocks(linear.weight, weight.grid.row_multiple):
            for first, last in row_blocks(block.shape[0], block.shape[1], weight.grid.row_multiple):
                rows = slice(start + first, start + last)
                out = None if out_scale is None else out_scale[rows]
                reference = folded_weight(block[first:last], in_scale, out)
                found.add(reference, weight.rows(rows.start, rows.stop).dequantize())
            start += len(block)
        return f"{linear.name}: {found}" if found.rows else None

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


def check_weights(
    build: Build, source: Source, result: Verification, progress: Progress | None, workers: Workers
) -> None:
    model = build.architecture
    if dict(model.tensors()) != dict(source.architecture.tensors()):
        result.problems.append("the source is another model: its tensors differ in name or shape")
        return
    ends: list[Module] = [model.embedding, model.final_norm]
    if model.lm_head is not None:
        ends.append(model.lm_head)
    compensated = build.compensated()
    groups: list[tuple[Layer | None, list[Module]]] = [(None, ends)]
    groups += [(layer, [*layer.modules()]) for layer in model.layers]
    for done, (layer, modules) in enumerate(groups):
        if progress is not None:
            progress("weights", done, len(groups))
        try:
            folds = Folds.none() if layer is None else Folds.of(model, layer, build.fold_scales(layer))
        except CheckpointError as error:
            result.problems.append(error.message)
            continue
        comparison = Comparison(source.checkpoint, folds, build.is_matched, build.is_ours)
        compare = partial(_compare, build, comparison, compensated)
        for module, (snr, problem) in zip(modules, workers.map(compare, modules), strict=True):
            if snr is not None:
                result.snr_db[module.name] = snr
            if problem is not None:
                result.problems.append(problem)
    finite = [value for value in result.snr_db.values() if math.isfinite(value)]
    least = f", signal to noise at least {min(finite):.1f} dB" if finite else ""
    result.checked.append(f"{len(result.snr_db)} quantized linears against the source{least}; the rest bit for bit")


def _end(stored: MlxCheckpoint, comparison: Comparison, module: Module, name: str) -> tuple[float, str | None]:
    """The same of an embedding, head or router that has codes."""
    ours, theirs = stored.read(name), comparison.folds.expected(module, name, comparison.source.read(name)).float()
    error, rows = SquaredError(), WrongRows()
    for start, stop in row_blocks(*ours.shape):
        rows.add(theirs[start:stop], ours[start:stop])
        error += SquaredError.between_(theirs[start:stop].contiguous(), ours[start:stop])
    floor = snr_floor_db(stored.grids[name].bits, compensated=True)
    if not error.snr_db >= floor:
        return error.snr_db, f"{name}: signal to noise {error.snr_db:.1f} dB, below {floor:.1f}"
    return error.snr_db, f"{name}: {rows}" if rows.rows else None


def _compare(
    build: Build, comparison: Comparison, compensated: Callable[[str], bool], module: Module
) -> tuple[float | None, str | None]:
    """A module's signal to noise ratio, None where it is not quantized, and what is wrong or None."""
    snr, problem = None, None
    for name, _ in module.tensors():
        found = None
        if isinstance(module, Linear) and name == module.weight and build.is_quantized(module):
            weight = build.qtensor(module)
            snr, found = comparison.weight(module, weight, compensated=compensated(module.name))
            found = found or comparison.rows(module, weight)
        elif isinstance(build.checkpoint, MlxCheckpoint) and build.checkpoint.is_dequantized(name):
            snr, found = _end(build.checkpoint, comparison, module, name)
        elif build.checkpoint.entry(name).dtype != comparison.source.entry(name).dtype:
            ours, theirs = build.checkpoint.entry(name).dtype_name, comparison.source.entry(name).dtype_name
            found = f"{name} is {ours}, {theirs} in the source"
        elif not comparison.is_copy(module):
            found = comparison.folded(module, name, build.checkpoint.read(name))
        else:
            pairs = zip(build.checkpoint.blocks(name), comparison.source.blocks(name), strict=True)
            if not all(same_bits(ours, theirs) for ours, theirs in pairs):
                found = f"{name}: differs from the source"
        problem = problem or found
    return snr, problem
