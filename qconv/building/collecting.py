"""An importance matrix collected from the unquantized model, layer by layer, resumable at every layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from qconv.artifacts.source import Source
from qconv.building.target import PackedModule
from qconv.calibration.imatrix import LayerSums, layer_weights, read_for, sums_key
from qconv.calibration.layer import Finished, LayerBuild
from qconv.calibration.statistics import InputSquares
from qconv.core.architecture import Layer, Linear
from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.core.workers import Workers
from qconv.folders.part import Part
from qconv.folders.readings import READ, checksum


def unquantized(text: TextSettings) -> CalibrationSettings:
    """How the layers of the unquantized model are looked at."""
    return CalibrationSettings(**{key: getattr(text, key) for key in TextSettings.model_fields}, propagate=False)


class Collecting:
    """The layers of which an importance matrix is collected.

    Attributes:
        done: Weights of the layers that are behind.
    """

    def __init__(self, source: Source, sums: LayerSums, part: Part, workers: Workers) -> None:
        """Nothing is read or written yet."""
        self.source = source
        self.sums = sums
        self.part = part
        self.workers = workers
        self.done = 0

    def pending(self, layer: Layer) -> bool:
        """Whether the layer's sums are to be collected yet."""
        return sums_key(layer) not in self.part.units

    def doing(self, layer: Layer) -> str:
        """For progress."""
        return f"imatrix layer {layer.index}"

    def sink(self, layer: Layer) -> _SumsSink:
        """What takes the layer."""
        return _SumsSink(self, layer)

    def pass_by(self, layer: Layer) -> None:
        """Count the layers up to this one as done."""
        self.done = sum(layer_weights(one) for one in self.sums.layers if one.index <= layer.index)

    def commit(self, layer: Layer, seen: Mapping[str, InputSquares]) -> None:
        """Keep a layer's sums: once its outputs count as made nothing computes the layer again."""
        kept = self.sums.keep(layer, seen)
        read = checksum(self.source.checkpoint, read_for(self.source, layer), self.workers)
        self.part.commit(sums_key(layer), kept | {READ: read})


class _SumsSink:
    def __init__(self, owner: Collecting, layer: Layer) -> None:
        self._owner = owner
        self._layer = layer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def pack(self, finished: Finished) -> PackedModule:
        """See :class:`qconv.building.target.LayerSink`."""
        return PackedModule(finished.module, ())

    def add(self, packed: PackedModule) -> None:
        """See :class:`qconv.building.target.LayerSink`."""

    def see(self, linear: Linear) -> None:
        """See :class:`qconv.building.target.LayerSink`."""
        self._owner.done += linear.numel

    def commit(self, build: LayerBuild | None, seen: Mapping[str, InputSquares]) -> None:
        """See :class:`qconv.building.target.LayerSink`."""
        self._owner.commit(self._layer, seen)
