"""A model of two: chosen modules are a build's, all others its reference's. And the parts that modules make up."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.core.architecture import Architecture, Layer, Linear, Module, Moe, Norm
from qconv.models.folding import Folds
from qconv.runtime.activations import InputRounding
from qconv.runtime.files import ModelFiles
from qconv.runtime.packed import DenseWeight, PackedWeight

DTYPE = torch.float32
"""What everything is computed in: a part's error must not drown in bf16's rounding."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some modules of a model that are exchanged together.

    Attributes:
        name: ``model.layers.3``, or what within it: ``model.layers.3.mlp.experts.7``.
        layer: The layer's index; None for embedding, final norm and head.
        modules: Names of its linears and norms.
    """

    name: str
    layer: int | None
    modules: frozenset[str]


@dataclass(frozen=True, slots=True)
class Mixed:
    """One layer's files: chosen modules are the build's, the others the reference's in the build's coordinates.

    Attributes:
        reference: The reference, dequantized.
        build: The build, dequantized.
        chosen: Names of the modules that are the build's.
        folds: What the build folded into the layer.
        modules: All modules of the layer by name.
    """

    reference: ModelFiles
    build: ModelFiles
    chosen: Collection[str]
    folds: Folds
    modules: Mapping[str, Module]

    @classmethod
    def of(cls, reference: ModelFiles, build: ModelFiles, layer: Layer, chosen: Collection[str], folds: Folds) -> Mixed:
        """The files of one layer."""
        return cls(reference, build, chosen, folds, {module.name: module for module in layer.modules()})

    @property
    def path(self) -> Path:
        """The reference's."""
        return self.reference.path

    @property
    def config(self) -> dict[str, Any]:
        """The reference's."""
        return self.reference.config

    @property
    def architecture(self) -> Architecture:
        """The reference's."""
        return self.reference.architecture

    def weight(self, linear: Linear) -> PackedWeight:
        """The dense weight."""
        if linear.name in self.chosen:
            return self.build.weight(linear)
        weight = self.reference.weight(linear).dequantize(DTYPE)
        return DenseWeight(linear.name, self.folds.expected(linear, linear.weight, weight))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm or a router."""
        owner = name.rpartition(".")[0]
        if owner in self.chosen:
            return self.build.tensor(name, shape)
        return self.folds.expected(self.modules[owner], name, self.reference.tensor(name, shape).to(DTYPE))

    def bias(self, linear: Linear) -> Tensor | None:
        """A linear's bias."""
        if linear.name in self.chosen:
            return self.build.bias(linear)
        bias = self.reference.bias(linear)
        return None if bias is None else self.folds.expected(linear, f"{linear.name}.bias", bias.to(DTYPE))

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Rows of the embedding or head, which are in no layer: the reference's."""
        return self.reference.rows(linear, start, stop)

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """Rows of the embedding: the reference's."""
        return self.reference.gather(linear, ids)

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """None: weights alone are looked at."""
        return None

    def inverse_frequency_divisors(self) -> Tensor | None:
        """The reference's."""
        return self.reference.inverse_frequency_divisors()


def whole_layers(architecture: Architecture) -> Iterator[Part]:
    """Every layer as one part."""
    for layer in architecture.layers:
        yield Part(layer.name, layer.index, frozenset(module.name for module in layer.modules()))


def outside_layers(architecture: Architecture) -> Iterator[Part]:
    """The embedding; the final norm with the head."""
    yield Part(architecture.embedding.name, None, frozenset({architecture.embedding.name}))
    head = [architecture.final_norm.name, *([architecture.lm_head.name] if architecture.lm_head is not None else [])]
    yield Part(head[-1], None, frozenset(head))


def parts_of(layer: Layer) -> Iterator[Part]:
    """Attention, norms, routers, every expert or the dense MLP of a layer."""

    def part(name: str, modules: Sequence[Module]) -> Part:
        return Part(name, layer.index, frozenset(module.name for module in modules))

    within = [module for module in layer.attention.modules() if not isinstance(module, Norm)]
    yield part(layer.attention.name, within)
    yield part(f"{layer.name} norms", layer.norms())
    if isinstance(layer.mlp, Moe):
        yield part(layer.mlp.router.name, [layer.mlp.router, *layer.mlp.parameters])
        yield from (part(gate.name, [gate]) for gate in layer.routers()[1:])
    for mlp in layer.mlps():
        yield part(mlp.gate.name.rpartition(".")[0], mlp.linears())
