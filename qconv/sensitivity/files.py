"""The activations and gradients of one layer, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qconv.calibration.activations import ActivationFile


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """What the way back through a layer reads and writes.

    Attributes:
        inputs: Its inputs, [tokens, hidden].
        middle: Its middle, written on the way.
        gradient: With regard to its outputs; afterwards to its inputs.
        normed: With regard to what its MLPs read.
        sequence_length: Tokens that see each other.
    """

    inputs: ActivationFile
    middle: ActivationFile
    gradient: ActivationFile
    normed: ActivationFile
    sequence_length: int

    @classmethod
    def at(cls, folder: Path, inputs: ActivationFile, gradient: ActivationFile, sequence_length: int) -> LayerFiles:
        """The files of a work folder, in the gradient's dtype; the middle ones are shared by all layers."""

        def file(name: str) -> ActivationFile:
            dtype = gradient.dtype
            return ActivationFile(folder / name, inputs.tokens, inputs.width, dtype, computed=dtype)

        return cls(inputs, file("middle.bin"), gradient, file("normed.bin"), sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return self.inputs.tokens

    def sequence_windows(self, most_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows that hold whole sequences, at least one."""
        return self.inputs.windows(max(1, most_tokens // self.sequence_length) * self.sequence_length)
