"""Which part of a build costs most: single parts of it stand in the reference, and the divergence of each is measured.

First every layer as a whole, then the parts of the layers that cost most: attention, router, norms, every expert. A
part's neighbours come from the reference, in the coordinates that AWQ folded the layer into, so that what is measured
is the part's error alone. The costs of parts need not add up to the build's: errors cancel and compound.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qconv.evaluation.statistics import ratio_standard_error
from qconv.folding import Folds
from qconv.models.base import Layer, Linear, Moe, Norm
from qconv.runtime.backends import get_backend
from qconv.runtime.files import Dequantized, ModelFiles
from qconv.runtime.packed import DenseWeight, PackedWeight
from qconv.runtime.skeleton import Installer, empty_model, experts_name, module_path

DTYPE = torch.float32
"""What everything is computed in: a part's error must not drown in bf16's rounding."""

Progress = Callable[[str, int, int], None]


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
class Cost:
    """What a part of the build costs where all else is the reference's.

    Attributes:
        part: The part.
        kld: Mean KL divergence from the reference, nats a token.
        error: Its standard error over sequences.
    """

    part: Part
    kld: float
    error: float


@dataclass(frozen=True, slots=True)
class Blame:
    """Costs, the largest first.

    Attributes:
        whole: Of the build as a whole.
        layers: Of every layer, and of what is outside of layers.
        parts: Of the parts within the layers that cost most.
        tokens: Tokens that were scored.
    """

    whole: Cost
    layers: tuple[Cost, ...]
    parts: tuple[Cost, ...]
    tokens: int

    def as_values(self) -> dict[str, Any]:
        """Ready for JSON."""

        def values(cost: Cost) -> dict[str, Any]:
            return {"part": cost.part.name, "layer": cost.part.layer, "kld": cost.kld, "error": cost.error}

        return {
            "tokens": self.tokens,
            "whole": values(self.whole),
            "layers": [values(one) for one in self.layers],
            "parts": [values(one) for one in self.parts],
        }


@dataclass(frozen=True, slots=True)
class Mixed:
    """A model of two: chosen modules are the build's, all others the reference's, folded as the build's are."""

    reference: ModelFiles
    build: ModelFiles
    chosen: Collection[str]
    folds: Folds

    @property
    def path(self) -> Any:
        """The reference's."""
        return self.reference.path

    @property
    def config(self) -> dict[str, Any]:
        """The reference's."""
        return self.reference.config

    @property
    def architecture(self) -> Any:
        """The reference's."""
        return self.reference.architecture

    def weight(self, linear: Linear) -> PackedWeight:
        """The dense weight."""
        if linear.name in self.chosen:
            return self.build.weight(linear)
        weight = self.reference.weight(linear).dequantize(DTYPE)
        return DenseWeight(linear.name, self.folds.expected(linear, linear.weight, weight))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm, a router or a bias."""
        owner = name.rpartition(".")[0]
        if owner in self.chosen:
            return self.build.tensor(name, shape)
        tensor = self.reference.tensor(name, shape)
        layers = self.reference.architecture.layers
        module = next((one for layer in layers for one in _modules(layer) if one.name == owner), None)
        return tensor if module is None else self.folds.expected(module, name, tensor.to(DTYPE))

    def bias(self, linear: Linear) -> Tensor | None:
        """A linear's bias."""
        if linear.name in self.chosen:
            return self.build.bias(linear)
        bias = self.reference.bias(linear)
        return None if bias is None else self.folds.expected(linear, f"{linear.name}.bias", bias.to(DTYPE))

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Rows of the embedding or head."""
        return (self.build if linear.name in self.chosen else self.reference).rows(linear, start, stop)

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        return (self.build if linear.name in self.chosen else self.reference).gather(linear, ids)

    def inverse_frequency_divisors(self) -> Tensor | None:
        """The reference's."""
        return self.reference.inverse_frequency_divisors()


def find_blame(
    reference: ModelFiles,
    build: ModelFiles,
    folds: Callable[[Layer], Folds],
    sequences: Sequence[Tensor],
    *,
    worst_layers: int = 2,
    progress: Progress,
) -> Blame:
    """Measure the cost of every layer of a build, then of the parts of the worst ones.

    The reference is held in memory as float32.

    Args:
        reference: The unquantized model.
        build: The build.
        folds: What the build folded into a layer.
        sequences: Token ids, int64 [length] each.
        worst_layers: So many layers are looked into.
        progress: Told the part at work, how many are done, and how many there are.

    Raises:
        CheckpointError: the two are not the same model, or damaged.
    """
    bench = _Bench(reference, build, folds, sequences)
    layers = [*_layers(reference), *_outside(reference)]
    looked_into = [layer for layer in reference.architecture.layers if isinstance(layer, Layer)]
    most = max((len(list(_parts(layer))) for layer in looked_into), default=0)
    total = 1 + len(layers) + min(worst_layers, len(looked_into)) * most
    done = 0

    def cost(part: Part) -> Cost:
        nonlocal done
        progress(part.name, done, total)
        done += 1
        return bench.cost([part])

    costs = sorted(map(cost, layers), key=lambda one: -one.kld)
    progress("the whole build", done, total)
    whole = bench.cost(layers)
    worst = [one.part.layer for one in costs if one.part.layer is not None][:worst_layers]
    parts = [cost(part) for index in worst for part in _parts(reference.architecture.layers[index])]
    progress("done", total, total)
    parts.sort(key=lambda one: -one.kld)
    return Blame(whole, tuple(costs), tuple(parts), sum(map(len, sequences)))


class _Bench:
    """The reference in memory; parts are put into it and taken out again."""

    def __init__(
        self, reference: ModelFiles, build: ModelFiles, folds: Callable[[Layer], Folds], sequences: Sequence[Tensor]
    ) -> None:
        self.reference = reference
        self.build = Dequantized(build, DTYPE)
        self.folds = folds
        self.sequences = sequences
        self.backend = get_backend("reference", None)
        self.model = empty_model(reference, DTYPE)
        self.plain = Dequantized(reference, DTYPE)
        # transformers' own modules of the experts, which an installer takes the place of.
        sparse = [layer.mlp for layer in reference.architecture.layers if isinstance(layer.mlp, Moe)]
        self.experts = {name: self.model.get_submodule(module_path(name)) for name in map(experts_name, sparse)}
        self._installer(self.plain).everything()
        self.known = [self._log_probabilities(one) for one in sequences]

    def cost(self, parts: Sequence[Part]) -> Cost:
        """Of parts that are exchanged together."""
        for part in parts:
            self._install(part, restore=False)
        sums = np.array([self._divergence(*pair) for pair in zip(self.sequences, self.known, strict=True)])
        for part in parts:
            self._install(part, restore=True)
        lengths = np.array([len(one) for one in self.sequences], dtype=np.float64)
        part = parts[0] if len(parts) == 1 else Part("build", None, frozenset())
        return Cost(part, float(sums.sum() / lengths.sum()), ratio_standard_error(sums, lengths))

    def _install(self, part: Part, *, restore: bool) -> None:
        if part.layer is None:
            chosen: Collection[str] = () if restore else part.modules
            installer = self._installer(Mixed(self.plain, self.build, chosen, Folds.none()))
            architecture = self.reference.architecture
            if architecture.embedding.name in part.modules:
                installer.embedding()
            installer.norm(architecture.final_norm)
            installer.head()
            return
        layer = self.reference.architecture.layers[part.layer]
        files = self.plain if restore else Mixed(self.plain, self.build, part.modules, self.folds(layer))
        installer = self._installer(files)
        if isinstance(layer.mlp, Moe):
            name = experts_name(layer.mlp)
            installer.replace(name, self.experts[name])
        installer.layer(layer)

    def _installer(self, files: ModelFiles) -> Installer:
        return Installer(self.model, files, self.backend, DTYPE)

    @torch.inference_mode()
    def _log_probabilities(self, sequence: Tensor) -> Tensor:
        logits: Tensor = self.model(sequence.unsqueeze(0)).logits[0]
        return functional.log_softmax(logits.float(), dim=-1)

    def _divergence(self, sequence: Tensor, known: Tensor) -> float:
        found = self._log_probabilities(sequence)
        return float(functional.kl_div(found, known, reduction="none", log_target=True).sum(dtype=torch.float64))


def _layers(files: ModelFiles) -> Iterator[Part]:
    for layer in files.architecture.layers:
        yield Part(layer.name, layer.index, frozenset(module.name for module in _modules(layer)))


def _outside(files: ModelFiles) -> Iterator[Part]:
    architecture = files.architecture
    yield Part(architecture.embedding.name, None, frozenset({architecture.embedding.name}))
    head = [architecture.final_norm.name, *([architecture.lm_head.name] if architecture.lm_head is not None else [])]
    yield Part(head[-1], None, frozenset(head))


def _parts(layer: Layer) -> Iterator[Part]:
    def part(name: str, modules: Sequence[Linear | Norm]) -> Part:
        return Part(name, layer.index, frozenset(module.name for module in modules))

    yield part(f"{layer.name}.self_attn", layer.attention.linears())
    yield part(f"{layer.name} norms", list(layer.norms()))
    for router in layer.routers():
        yield part(router.name, [router])
    for mlp in layer.mlps():
        yield part(mlp.gate.name.rpartition(".")[0], mlp.linears())


def _modules(layer: Layer) -> list[Linear | Norm]:
    return [*layer.norms(), *layer.routers(), *layer.linears()]
