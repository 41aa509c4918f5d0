"""Layers of a GGUF build that are calibrated: each one's blocks are a file of the work folder until they are written.

A layer is what is committed: its blocks, then what an importance matrix says of it, then its outputs, on which the next
layer is calibrated. A file of the build is written of the layers that it holds; once it is committed, those of them
that no later file needs are removed. So a run goes on from the layer at which it was stopped, and needs the disk of
one file more than the build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qconv.artifacts.folded import Weights
from qconv.artifacts.gguf_tensors import encoder
from qconv.artifacts.source import Source
from qconv.building.gguf_folds import FoldedLayers
from qconv.building.target import PackedModule
from qconv.calibration.imatrix import LayerSums, blocks_key, layer_weights, read_for, require_kept, sums_key
from qconv.calibration.layer import Finished, LayerBuild
from qconv.calibration.mixture import corpus_coverage
from qconv.calibration.schemes import FittedScheme, Scheme
from qconv.calibration.statistics import InputSquares
from qconv.checkpoint.header import TensorEntry, TensorSpec, read_header
from qconv.checkpoint.reader import map_tensor
from qconv.checkpoint.writer import ShardWriter
from qconv.core.architecture import Layer, Linear
from qconv.core.workers import Workers
from qconv.folders.ownership import claim
from qconv.folders.part import Part
from qconv.folders.readings import READ, checksum
from qconv.formats.gguf.container import FileLayout
from qconv.formats.gguf.names import GgufTensor, permute_heads
from qconv.grids.blocks import BlockGrid, BlockTensor
from qconv.planning.gguf_plan import GgufPlan
from qconv.planning.gguf_recipe import GgufRecipe

_SCALES = "scales"
"""The key, within what the journal holds of a layer, of its scales."""


class StagedLayers:
    """The blocks of calibrated linears, until files hold them.

    Attributes:
        done: Weights of the layers that are behind.
    """

    def __init__(
        self,
        source: Source,
        plan: GgufPlan,
        recipe: GgufRecipe,
        sums: LayerSums,
        part: Part,
        workers: Workers,
    ) -> None:
        """Say how the layers of a build are calibrated; nothing is done yet.

        Args:
            source: The model.
            plan: The build.
            recipe: The settings, and the steps by which each tensor is made. Where they are those of its type by
                itself, the next layer sees what that makes of it, and no blocks of it are kept.
            sums: Of the importance matrix that falls off.
            part: The build's part of the journal and the work folder.
            workers: Threads.
        """
        self.source = source
        self.sums = sums
        self.part = part
        self.workers = workers
        self.done = 0
        self._plan = plan
        self._recipe = recipe.calibrated()
        self._schemes = _schemes(plan, recipe, source.architecture.layers)
        self.folds: FoldedLayers | None = None
        if any("awq" in recipe.method_for(tensor) for tensor in plan.tensors.values()):
            self.folds = FoldedLayers(source, part)
        self._types = {name: grid for name, (grid, steps) in self._schemes.items() if steps != ("rtn",)}
        self._stages: dict[int, dict[str, TensorEntry]] = {}

    def pending(self, layer: Layer) -> bool:
        """Whether the layer is to be calibrated yet; one without codes too, since the importance matrix is of all."""
        return blocks_key(layer) not in self.part.units

    def doing(self, layer: Layer) -> str:
        """For progress."""
        return f"calibrating layer {layer.index}"

    def build(self, layer: Layer) -> LayerBuild:
        """How the layer's linears are rounded."""
        schemes: dict[str, Scheme] = {
            one.name: FittedScheme(*self._schemes[one.weight]) for one in layer.linears() if one.weight in self._schemes
        }
        return LayerBuild.of(self.source, layer, self._recipe, schemes.keys(), schemes)

    def sink(self, layer: Layer) -> _StageSink:
        """What takes the layer."""
        specs = [self._spec(linear) for linear in self._linears(layer)]
        return _StageSink(self, layer, specs)

    def pass_by(self, layer: Layer) -> None:
        """Count the layers up to this one as done."""
        self.done = sum(layer_weights(one) for one in self.sums.layers if one.index <= layer.index)

    def _linears(self, layer: Layer) -> list[Linear]:
        """Those whose codes are chosen here."""
        return [linear for linear in layer.linears() if linear.weight in self._types]

    def ready(self, file: FileLayout) -> bool:
        """Whether all layers are calibrated of which a file that is not committed holds tensors."""
        units = self.part.units
        return all(blocks_key(layer) in units for layer in self.sums.layers if layer.index in self._needed(file))

    def open(self, file: FileLayout) -> None:
        """Check and open the blocks that a file is made of.

        Raises:
            VerificationError: a layer's blocks are gone or damaged.
        """
        for layer in self.sums.layers:
            if layer.index in self._needed(file) and layer.index not in self._stages:
                path = self.path(layer)
                require_kept(path, self.part.units[blocks_key(layer)], "made")
                self._stages[layer.index] = read_header(path)

    def release(self, pending: Iterable[FileLayout]) -> None:
        """Remove the blocks of layers of which no file that is yet to come holds a tensor."""
        kept = {layer for file in pending for layer in self._needed(file)}
        for layer in self.sums.layers:
            if layer.index not in kept and blocks_key(layer) in self.part.units:
                self._stages.pop(layer.index, None)
                self.path(layer).unlink(missing_ok=True)

    def holds(self, tensor: GgufTensor) -> bool:
        """Whether a tensor's blocks come from here."""
        return bool(tensor.sources) and tensor.sources[0] in self._types

    def blocks(self, tensor: GgufTensor, part: int) -> Tensor:
        """The blocks of one part of a tensor, uint8 [rows, bytes of a row], in file order."""
        assert tensor.layer is not None
        data = map_tensor(self._stages[tensor.layer][tensor.sources[part]])
        if tensor.moved is not None and tensor.moved.rows is not None:
            return data[tensor.moved.rows]
        return permute_heads(data, tensor.heads) if tensor.heads else data

    def keeps(self, linear: Linear) -> bool:
        """Whether a linear's blocks are kept for the files."""
        return linear.weight in self._types

    def report(self) -> list[dict[str, Any]]:
        """What happened in each layer, in their order."""
        return [self.part.units[blocks_key(layer)]["report"] for layer in self.sums.layers]

    def corpora(self, recipe: GgufRecipe) -> dict[str, Any]:
        """What the report says of the experts' tokens by corpus."""
        experts = [one for layer in self.report() for one in layer["experts"] if ".experts." in one["module"]]
        return corpus_coverage(recipe.calibrated().calibration, experts)

    def commit(self, layer: Layer, made: LayerBuild, values: Mapping[str, Any]) -> None:
        """Record that a layer's blocks are safe, and what an importance matrix says of it."""
        read = checksum(self.source.checkpoint, read_for(self.source, layer), self.workers)
        self.part.note(sums_key(layer), self.sums.keep(layer, made.squares))
        report = {"experts": made.report.experts, "compensations": made.report.compensations}
        if self.folds is not None:
            values = {**values, _SCALES: self.folds.keep(layer, made.scales)}
            report["searches"] = made.report.searches
        self.part.commit(blocks_key(layer), {**values, READ: read, "report": report})

    def scales(self) -> dict[str, Mapping[str, Any]]:
        """What the journal holds of each calibrated layer's scales, by its number."""
        units = self.part.units
        kept = (layer for layer in self.sums.layers if blocks_key(layer) in units)
        return {str(layer.index): units[blocks_key(layer)][_SCALES] for layer in kept}

    def weights(self) -> Weights:
        """The model that the blocks stand for: the source, or what folding makes of it."""
        return self.source if self.folds is None else self.folds.folded(self.scales())

    def path(self, layer: Layer) -> Path:
        """Of a layer's blocks."""
        return self.part.scratch(f"{blocks_key(layer)}.safetensors")

    def _needed(self, file: FileLayout) -> set[int]:
        """The layers that decide what a file holds that is not committed: of calibrated tensors, or of folded ones."""
        if file.name in self.part.units:
            return set()
        tensors = (self._plan.tensors[info.name] for info in file.tensors)
        folds = self.folds is not None
        return {tensor.layer for tensor in tensors if tensor.layer is not None and (folds or self.holds(tensor))}

    def _spec(self, linear: Linear) -> TensorSpec:
        nbytes = self._types[linear.weight].type.row_bytes(linear.in_features)
        return TensorSpec(linear.weight, torch.uint8, (linear.out_features, nbytes))


class _StageSink:
    def __init__(self, owner: StagedLayers, layer: Layer, specs: list[TensorSpec]) -> None:
        self._owner = owner
        self._layer = layer
        path = claim(owner.path(layer))
        self._stack = contextlib.ExitStack()
        self._writer = ShardWriter(path, specs, owner.part.staged(f"{blocks_key(layer)}.safetensors"))

    def __enter__(self) -> Self:
        self._stack.enter_context(self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def pack(self, finished: Finished) -> PackedModule:
        """See :class:`qconv.building.target.LayerSink`."""
        module, weight = finished.module, finished.weight
        if isinstance(weight, BlockTensor) and isinstance(module, Linear) and self._owner.keeps(module):
            return PackedModule(module, ((module.weight, [weight.data]),))
        return PackedModule(module, ())

    def add(self, packed: PackedModule) -> None:
        """See :class:`qconv.building.target.LayerSink`."""
        for name, blocks in packed.tensors:
            self._writer.write_blocks(name, blocks)
        if isinstance(packed.module, Linear):
            self._owner.done += packed.module.numel

    def see(self, linear: Linear) -> None:
        """See :class:`qconv.building.target.LayerSink`."""

    def commit(self, build: LayerBuild | None, seen: Mapping[str, InputSquares]) -> None:
        """See :class:`qconv.building.target.LayerSink`."""
        assert build is not None
        written = self._writer.finish()
        self._writer.publish()
        self._owner.commit(self._layer, build, {"size": written.size, "sha256": written.sha256})


def _schemes(
    plan: GgufPlan, recipe: GgufRecipe, layers: Iterable[Layer]
) -> dict[str, tuple[BlockGrid, tuple[str, ...]]]:
    """Grid and method of the linears in layers that have codes to choose, by the name of their weight."""
    found: dict[str, tuple[BlockGrid, tuple[str, ...]]] = {}
    rounded = {linear.weight for layer in layers for linear in layer.linears()}
    for tensor in plan.tensors.values():
        grid = BlockGrid(encoder(plan.types[tensor.name]))
        calibrated = tensor.in_rows and tensor.sources[0] in rounded if tensor.sources else False
        if tensor.layer is not None and tensor.quantizable and grid.has_codes and calibrated:
            found |= dict.fromkeys(tensor.sources, (grid, recipe.method_for(tensor)))
    return found
