"""A model with scales folded into it: what a build whose method folds them is compared with, or made of.

Where a file has no place for the scales (GGUF), they are kept beside it, those of all layers in one file. Without them
nobody can say whether such a file is of its source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qconv.artifacts.build import read_scales
from qconv.artifacts.source import Source
from qconv.boundary.content import FOLDED_SCALES
from qconv.core.architecture import Architecture, Layer, Linear, Module, Norm
from qconv.errors import CheckpointError, UsageError
from qconv.models.folding import SCALE_SUFFIX, Folds, folded_vector, folded_weight, output_channels


class Weights(Protocol):
    """A model's tensors by name."""

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            CheckpointError: not readable, or NaN or infinite values in it.
        """

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The tensor as consecutive blocks of rows, each beginning at a multiple of ``multiple`` rows.

        Raises:
            CheckpointError: as :meth:`read`.
        """


@dataclass(frozen=True, slots=True)
class FoldedSource:
    """The tensors of a source after folding.

    Attributes:
        source: The source.
        touched: What folding changes: a module and the folds of its layer, by the name of each of its tensors.
    """

    source: Source
    touched: Mapping[str, tuple[Module, Folds]]

    @classmethod
    def of(cls, source: Source, scales: Mapping[str, Tensor]) -> FoldedSource:
        """With these scales, float32 [channels], by their producers' names."""
        model = source.architecture
        touched: dict[str, tuple[Module, Folds]] = {}
        for layer in model.layers:
            folds = Folds.of(model, layer, of_layer(layer, scales))
            for module in layer.modules():
                if folds.touches(module):
                    touched |= {name: (module, folds) for name, _ in module.tensors()}
        return cls(source, touched)

    def read(self, name: str) -> Tensor:
        """See :class:`Weights`: a folded weight in float32, a folded norm or bias in the source's dtype."""
        return self._folded(name, self.source.read(name), 0)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """See :class:`Weights`."""
        row = 0
        for block in self.source.blocks(name, multiple):
            yield self._folded(name, block, row)
            row += len(block)

    def _folded(self, name: str, block: Tensor, row: int) -> Tensor:
        """Some rows of a tensor from ``row`` on."""
        if name not in self.touched:
            return block
        module, folds = self.touched[name]
        out_scale = folds.output_scale(module)
        out_scale = None if out_scale is None else out_scale[row : row + len(block)]
        if not isinstance(module, Linear) or name != module.weight:
            return folded_vector(block, out_scale, module.offset if isinstance(module, Norm) else 0.0)
        return folded_weight(block, folds.input_scale(module), out_scale)


def of_layer(layer: Layer, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of one layer."""
    return {name: scales[name] for name in output_channels(layer) if name in scales}


def read_folded_scales(folder: Path, model: Architecture) -> dict[str, Tensor]:
    """The scales that lie beside a file into which they were folded, by their producers' names.

    Raises:
        UsageError: they do not: the file cannot be compared with its source.
        CheckpointError: they are damaged, or another model's.
    """
    path = folder / FOLDED_SCALES
    if not path.is_file():
        raise UsageError(
            f"{folder}: not comparable with its source: scales were folded into this model, and {FOLDED_SCALES}, which "
            "says which, is not beside it.",
            hint=f"Copy {FOLDED_SCALES} from the folder that the file was made in.",
        )
    scales = read_scales(path)
    channels = {name: count for layer in model.layers for name, count in output_channels(layer).items()}
    for name, scale in scales.items():
        if tuple(scale.shape) != (channels.get(name),):
            raise CheckpointError(
                f"{path}: {name + SCALE_SUFFIX!r} is {list(scale.shape)}; a scale is of the output channels of a "
                "norm or linear.",
                hint="The file is damaged, or of another model.",
            )
    return scales
