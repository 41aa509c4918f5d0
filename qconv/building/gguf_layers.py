"""Layers of a GGUF build that are calibrated: each one's blocks are a file of the work folder until they are written.

A layer is what is committed: its blocks, then what an importance matrix says of it, then its outputs, on which the next
layer is calibrated. A file of the build is written of the layers that it holds; once it is committed, those of them
that no later file needs are removed. So a run goes on from the layer at which it was stopped, and needs the disk of
one file more than the build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.artifacts.gguf_tensors import encoder
from qconv.artifacts.source import Source
from qconv.calibration.corpus import TokenSet
from qconv.calibration.imatrix import LayerSums, blocks_key, read_for, require_kept, sums_key
from qconv.calibration.layer import LayerBuild
from qconv.calibration.run import Calibration
from qconv.calibration.schemes import FittedScheme, Scheme
from qconv.checkpoint.header import TensorEntry, TensorSpec, read_header
from qconv.checkpoint.reader import map_tensor
from qconv.checkpoint.writer import ShardWriter
from qconv.core.architecture import Layer, Linear
from qconv.executors.threads import Workers
from qconv.folders.journal import Journal
from qconv.folders.ownership import claim
from qconv.folders.readings import READ, SourceRecord, checksum
from qconv.formats.gguf.container import FileLayout
from qconv.formats.gguf.names import GgufTensor, permute_heads
from qconv.grids.blocks import BlockGrid, BlockTensor
from qconv.planning.gguf_plan import GgufPlan
from qconv.planning.recipe import Recipe
from qconv.verification.outcome import Progress


class CalibratedLayers:
    """The blocks of calibrated linears, made layer by layer as files need them."""

    def __init__(
        self,
        source: Source,
        plan: GgufPlan,
        recipe: Recipe,
        tokens: TokenSet,
        work: Path,
        record: SourceRecord,
        workers: Workers,
        progress: Progress,
        log: Callable[[str], None],
    ) -> None:
        """Say how the layers of a build are calibrated; nothing is done yet.

        Args:
            source: The model.
            plan: The build.
            recipe: The method and its settings.
            tokens: The calibration text.
            work: The folder of activations and blocks.
            record: What was read of the source, and the journal.
            workers: Threads.
            progress: Told the layer at work, the weights done and the weights in all.
            log: Told about decisions.
        """
        self._source = source
        self._plan = plan
        self._recipe = recipe
        self._tokens = tokens
        self._work = work
        self._record = record
        self._workers = workers
        self._progress = progress
        self._log = log
        self._calibration: Calibration | None = None
        self._grids = _grids(plan)
        self._sums = LayerSums(source, tokens, work, record.journal)
        self._stages: dict[int, dict[str, TensorEntry]] = {}

    @property
    def journal(self) -> Journal:
        """Of the run."""
        return self._record.journal

    def prepare(self, file: FileLayout) -> None:
        """Calibrate the layers that a file of the build holds, as far as they are not yet.

        Raises:
            CheckpointError: a weight is not finite.
            OutputError: the disk is full.
            VerificationError: a layer's blocks are gone or damaged.
        """
        needed = self._needed(file)
        for layer in self._source.architecture.layers[: max(needed, default=-1) + 1]:
            self._require(layer, staged=layer.index in needed)

    def finish(self) -> None:
        """Calibrate what layers are left, those without a tensor that has codes: the importance matrix is of all."""
        for layer in self._source.architecture.layers:
            self._require(layer, staged=False)

    def release(self, pending: Iterable[FileLayout]) -> None:
        """Remove the blocks of layers of which no file that is yet to come holds a tensor."""
        kept = {layer for file in pending for layer in self._needed(file)}
        for layer in self._source.architecture.layers:
            if layer.index not in kept:
                self._stages.pop(layer.index, None)
                _path(self._work, layer).unlink(missing_ok=True)

    def holds(self, tensor: GgufTensor) -> bool:
        """Whether a tensor's blocks come from here."""
        return bool(tensor.sources) and tensor.sources[0] in self._grids

    def blocks(self, tensor: GgufTensor, part: int) -> Tensor:
        """The blocks of one part of a tensor, uint8 [rows, bytes of a row], in file order."""
        assert tensor.layer is not None
        data = map_tensor(self._stages[tensor.layer][tensor.sources[part]])
        return permute_heads(data, tensor.heads) if tensor.heads else data

    def merge(self, out: Path) -> Path:
        """The importance matrix of all layers, in ``out``; see :meth:`LayerSums.merge`."""
        return self._sums.merge(out)

    def report(self) -> list[dict[str, Any]]:
        """What happened in each layer, in their order."""
        return [self.journal.units[blocks_key(layer)]["report"] for layer in self._source.architecture.layers]

    def _needed(self, file: FileLayout) -> set[int]:
        """The layers of which a file that is not committed holds calibrated tensors."""
        if file.name in self.journal.units:
            return set()
        tensors = (self._plan.tensors[info.name] for info in file.tensors)
        return {tensor.layer for tensor in tensors if tensor.layer is not None and self.holds(tensor)}

    def _require(self, layer: Layer, *, staged: bool) -> None:
        committed = blocks_key(layer) in self.journal.units
        if not committed or self._pending(layer):
            self._calibrate(layer, committed)
        if staged and layer.index not in self._stages:
            self._stages[layer.index] = self._opened(layer)

    def _pending(self, layer: Layer) -> bool:
        """Whether a committed layer's outputs are not safe while a later one needs them."""
        layers = self._source.architecture.layers
        if layer.index + 1 == len(layers) or all(blocks_key(one) in self.journal.units for one in layers):
            return False
        return layer.index >= self._begun().next_layer

    def _begun(self) -> Calibration:
        if self._calibration is None:
            self._calibration = Calibration(
                self._source, self._recipe.calibration, self._tokens, self._work, self.journal, self._workers
            )
        return self._calibration

    def _calibrate(self, layer: Layer, committed: bool) -> None:
        calibration, what = self._begun(), f"calibrating layer {layer.index}"
        linears = [linear for linear in layer.linears() if linear.weight in self._grids]
        schemes: dict[str, Scheme] = {linear.name: FittedScheme(self._grids[linear.weight]) for linear in linears}
        made = LayerBuild.of(self._source, layer, self._recipe, schemes.keys(), schemes)
        context = calibration.context(layer, [made])
        done, total = 0, sum(linear.numel for linear in layer.linears())
        self._progress(what, done, total)
        if committed:
            self._log(f"{what}: committed before its outputs were; computing them again")
            for _ in calibration.modules(context):
                pass
        else:
            path = claim(_path(self._work, layer))
            specs = [self._spec(linear) for linear in linears]
            with ShardWriter(path, specs, self.journal.staged(path.name)) as writer:
                for _, finished in calibration.modules(context):
                    if isinstance(finished.weight, BlockTensor) and isinstance(finished.module, Linear):
                        writer.write(finished.module.weight, finished.weight.data)
                    done += finished.module.numel if isinstance(finished.module, Linear) else 0
                    self._progress(what, min(done, total), total)
                written = writer.finish()
                writer.publish()
            self._commit(layer, made, {"size": written.size, "sha256": written.sha256})
        calibration.advance(context)

    def _commit(self, layer: Layer, made: LayerBuild, values: dict[str, Any]) -> None:
        read = checksum(self._source.checkpoint, read_for(self._source, layer), self._workers)
        seen = {f"{name}.weight": squares for name, squares in made.squares.items()}
        self.journal.commit(sums_key(layer), self._sums.keep(layer, seen))
        report = {"experts": made.report.experts, "compensations": made.report.compensations}
        self._record.commit(blocks_key(layer), values | {READ: read, "report": report})

    def _spec(self, linear: Linear) -> TensorSpec:
        nbytes = self._grids[linear.weight].type.row_bytes(linear.in_features)
        return TensorSpec(linear.weight, torch.uint8, (linear.out_features, nbytes))

    def _opened(self, layer: Layer) -> dict[str, TensorEntry]:
        path = _path(self._work, layer)
        require_kept(path, self.journal.units[blocks_key(layer)], "made")
        return read_header(path)


def _grids(plan: GgufPlan) -> dict[str, BlockGrid]:
    """The grids of the linears in layers that have codes to choose, by the name of their weight."""
    found: dict[str, BlockGrid] = {}
    for tensor in plan.tensors.values():
        grid = BlockGrid(encoder(plan.types[tensor.name]))
        if tensor.layer is not None and tensor.quantizable and grid.has_codes:
            found |= dict.fromkeys(tensor.sources, grid)
    return found


def _path(work: Path, layer: Layer) -> Path:
    return work / f"{blocks_key(layer)}.safetensors"
