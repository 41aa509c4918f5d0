"""Scales folded into a GGUF build's layers: a file each in the work folder, until they are one beside the build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qconv.artifacts.build import read_scales
from qconv.artifacts.folded import FoldedSource
from qconv.artifacts.source import Source
from qconv.boundary.content import FOLDED_SCALES
from qconv.calibration.imatrix import require_kept
from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.writer import ShardRecord, ShardWriter
from qconv.core.architecture import Layer
from qconv.folders.ownership import claim
from qconv.folders.part import Part
from qconv.models.folding import SCALE_SUFFIX


class FoldedLayers:
    """What was folded into each layer that is calibrated."""

    def __init__(self, source: Source, part: Part) -> None:
        """Nothing is read or written yet.

        Args:
            source: The model.
            part: The build's part of the journal and the work folder.
        """
        self._source = source
        self._part = part

    def keep(self, layer: Layer, scales: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write a layer's scales, by their producers' names; what the journal is to hold of them.

        Raises:
            OutputError: the disk is full.
        """
        path = claim(self._path(layer))
        written = _write(path, scales, self._part.staged(path.name))
        return {"size": written.size, "sha256": written.sha256}

    def scales(self, units: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        """Those of all layers that are kept.

        Args:
            units: By layer's number what the journal holds of its scales.

        Raises:
            VerificationError: a layer's are gone or damaged.
        """
        found: dict[str, Tensor] = {}
        for layer in self._source.architecture.layers:
            record = units.get(str(layer.index))
            if record is not None:
                require_kept(self._path(layer), record, "made")
                found |= read_scales(self._path(layer))
        return found

    def folded(self, units: Mapping[str, Mapping[str, Any]]) -> FoldedSource:
        """The source with them folded into it."""
        return FoldedSource.of(self._source, self.scales(units))

    def merge(self, out: Path, units: Mapping[str, Mapping[str, Any]]) -> None:
        """Make one file in ``out`` of all layers' scales, unless it is there.

        Raises:
            OutputError: the disk is full.
            VerificationError: a layer's are gone or damaged.
        """
        if FOLDED_SCALES in self._part.units:
            return
        path = out / FOLDED_SCALES
        written = _write(path, self.scales(units), self._part.staged(path.name), self._part)
        self._part.note(FOLDED_SCALES, {"size": written.size, "sha256": written.sha256})

    def _path(self, layer: Layer) -> Path:
        return self._part.scratch(f"scales-{layer.index:05d}.safetensors")


def _write(path: Path, scales: Mapping[str, Tensor], temporary: Path, part: Part | None = None) -> ShardRecord:
    specs = [TensorSpec(f"{name}{SCALE_SUFFIX}", scale.dtype, tuple(scale.shape)) for name, scale in scales.items()]
    with ShardWriter(path, specs, temporary) as writer:
        for spec, scale in zip(specs, scales.values(), strict=True):
            writer.write(spec.name, scale)
        written = writer.finish()
        if part is not None:
            part.announce([written])
        writer.publish()
    return written
