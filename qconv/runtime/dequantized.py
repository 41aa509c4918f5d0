"""Packed files as the dense model that they stand for, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.core.architecture import Architecture, Linear
from qconv.runtime.activations import InputRounding
from qconv.runtime.files import ModelFiles
from qconv.runtime.packed import DenseWeight, PackedWeight


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The dense model that packed files stand for, dequantized tensor by tensor when it is asked for.

    Attributes:
        files: The packed ones.
        dtype: What weights are rounded to.
    """

    files: ModelFiles
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file."""
        return self.files.path

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the dense model."""
        return self.files.config

    @property
    def architecture(self) -> Architecture:
        """Its linears and norms."""
        return self.files.architecture

    def weight(self, linear: Linear) -> PackedWeight:
        """The dense weight."""
        return DenseWeight(linear.name, self.files.weight(linear).dequantize(self.dtype))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The same tensor."""
        return self.files.tensor(name, shape)

    def bias(self, linear: Linear) -> Tensor | None:
        """The same bias."""
        return self.files.bias(linear)

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Dense rows."""
        return DenseWeight(linear.name, self.files.rows(linear, start, stop).dequantize(self.dtype))

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """The same rows."""
        return self.files.gather(linear, ids)

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """The same rounding: of inputs, not of weights."""
        return self.files.input_rounding(linear)

    def inverse_frequency_divisors(self) -> Tensor | None:
        """The same divisors."""
        return self.files.inverse_frequency_divisors()
