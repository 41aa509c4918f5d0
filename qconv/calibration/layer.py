"""One layer calibrated, quantized and passed through: attention first, then the MLPs on its quantized output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.calibration.activations import ActivationFile, ResidentActivations
from qconv.calibration.forward import Decoder
from qconv.calibration.schemes import Scheme, StaticScheme
from qconv.calibration.statistics import InputSquares, InputStatistics
from qconv.core.architecture import Architecture, CacheScales, Layer, Linear, Module
from qconv.core.devices import CPU
from qconv.core.grid import Packed
from qconv.core.qtensor import QTensor
from qconv.core.settings import CalibrationSettings
from qconv.core.workers import Workers
from qconv.formats import get_format
from qconv.grids.e4m3 import activation_scale
from qconv.grids.fp4 import largest_magnitude, local_scale
from qconv.methods import rounding_of
from qconv.methods.awq import Choice
from qconv.models.folding import Folds
from qconv.planning.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Finished:
    """A module as the build will hold it: a quantized weight or None, then its plain tensors as blocks of rows."""

    module: Module | CacheScales
    weight: Packed | None
    dense: tuple[tuple[str, Iterable[Tensor]], ...]


@dataclass(slots=True)
class LayerReport:
    """What happened in a layer, for the build's report: plain values by name."""

    searches: dict[str, dict[str, Any]] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    compensations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def search(self, name: str, choice: Choice) -> None:
        """Record a scale search under the producer's name."""
        self.searches[name] = {
            "alpha": round(choice.alpha, 4),
            "loss": choice.loss,
            "rtn_loss": choice.rtn_loss,
            "kept_rtn": choice.index == 0,
        }


@dataclass(frozen=True, slots=True)
class Workspace:
    """The activations of one layer: inputs bf16, the middle of the layer bf16, and the running output in float32.

    ``reference`` holds the same of the unquantized model on the same tokens, where a calibration looks at both.
    """

    inputs: ActivationFile
    middle: ActivationFile
    total: ActivationFile
    sequence_length: int
    reference: Workspace | None = None

    @classmethod
    def at(cls, folder: Path, layer: int, tokens: int, sequence_length: int, hidden: int) -> Workspace:
        """The files of a layer in a work folder; the middle and the running output are shared by all layers."""
        return cls(
            inputs_file(folder, layer, tokens, hidden),
            ActivationFile(folder / "middle.bin", tokens, hidden, torch.bfloat16),
            ActivationFile(folder / "total.bin", tokens, hidden, torch.float32),
            sequence_length,
        )

    @property
    def scratch_bytes(self) -> int:
        """What the middle and the running output take."""
        return self.middle.nbytes + self.total.nbytes

    def resident(self, device: torch.device) -> Workspace:
        """The same with those two in a device's memory."""
        middle, total = (ResidentActivations(file, device) for file in (self.middle, self.total))
        return replace(self, middle=middle, total=total)

    def with_reference(self) -> Workspace:
        """Of files whose second half is the unquantized model's: the first, and the second as its reference."""
        tokens = self.tokens // 2

        def half(first: int, reference: Workspace | None) -> Workspace:
            inputs, middle, total = (file.part(first, tokens) for file in (self.inputs, self.middle, self.total))
            return Workspace(inputs, middle, total, self.sequence_length, reference)

        return half(0, half(tokens, None))

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.inputs.tokens

    def sequence_windows(self, most_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows that hold whole sequences, at least one."""
        return self.inputs.windows(max(1, most_tokens // self.sequence_length) * self.sequence_length)


def inputs_file(folder: Path, layer: int, tokens: int, hidden: int) -> ActivationFile:
    """The inputs of a layer, bf16 [tokens, hidden]."""
    return ActivationFile(folder / f"inputs-{layer:05d}.bin", tokens, hidden, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class LayerBuild:
    """One build's part in a layer: how its linears are rounded, and what came of it.

    Attributes:
        source: The model.
        recipe: The method and its settings; of its calibration, what the context says counts.
        schemes: How each quantized linear is rounded, by name; empty where activations are static.
        static: How they are rounded then, else None.
        quantized: Names of the linears that are quantized.
        report: What happened.
        scales: What is folded, filled in by the searches; by producer's module name.
        folds: A view of ``scales`` that always shows its present state.
        squares: The squared inputs of linears, routers included, by name, filled in where second moments are kept.
        peaks: The largest magnitude of the inputs of linears by name, filled in.
    """

    source: Source
    recipe: Recipe
    schemes: dict[str, Scheme]
    static: StaticScheme | None
    quantized: frozenset[str]
    report: LayerReport
    scales: dict[str, Tensor]
    folds: Folds
    squares: dict[str, InputSquares]
    peaks: dict[str, float]

    @classmethod
    def of(
        cls,
        source: Source,
        layer: Layer,
        recipe: Recipe,
        quantized: Collection[str],
        schemes: Mapping[str, Scheme],
        static: StaticScheme | None = None,
    ) -> LayerBuild:
        """Of a layer, nothing folded yet.

        Args:
            source: The model.
            layer: The layer.
            recipe: The method and its settings.
            quantized: Names of the linears that are quantized.
            schemes: How each of them is, by name.
            static: How all of them are where inputs have stored scales; then ``schemes`` are not looked at.
        """
        scales: dict[str, Tensor] = {}
        folds = Folds.of(source.architecture, layer, scales)
        return cls(source, recipe, {**schemes}, static, frozenset(quantized), LayerReport(), scales, folds, {}, {})

    def rounding(self, linear: Linear) -> str | None:
        """What chooses a linear's codes by second moments; None where nothing does, or it is not quantized."""
        return rounding_of(self.schemes[linear.name].method) if linear.name in self.schemes else None

    def searches_scales(self, linears: Sequence[Linear]) -> bool:
        """Whether AWQ's scales are searched for linears together: all of them are quantized, and by AWQ."""
        return all(one.name in self.schemes and "awq" in self.schemes[one.name].method for one in linears)

    def share(self, weights: Mapping[str, Tensor]) -> None:
        """Have linears that engines hold as one matrix rounded as one, given their weights by name."""
        together = {name: weight for name, weight in weights.items() if name in self.schemes}
        if len(together) > 1:
            largest = largest_magnitude(together.values())
            self.schemes.update({name: self.schemes[name].shared(largest) for name in together})

    def keep_peak(self, peak: float, linears: Iterable[Linear]) -> None:
        """Keep the largest magnitude of what linears read."""
        self.peaks.update(dict.fromkeys((linear.name for linear in linears), peak))

    def keep_squares(self, statistics: InputStatistics, linears: Iterable[Linear]) -> None:
        """Keep what an importance matrix says of the linears that read an input, where its second moments are known."""
        if statistics.gram.numel():
            self.squares.update(dict.fromkeys((linear.name for linear in linears), statistics.squares))

    def dense(self, module: Module) -> Finished:
        """A module that stays unquantized, after folding."""
        tensors = [(name, [self.folds.expected(module, name, self.source.read(name))]) for name, _ in module.tensors()]
        return Finished(module, None, tuple(tensors))

    def finished(self, linear: Linear, weight: Packed | None) -> Finished:
        """A linear after folding, quantized or not."""
        if weight is None:
            return self.dense(linear)
        if isinstance(weight, QTensor) and weight.grid.activations == "local":
            weight = replace(weight, input_scale=local_scale(self.peaks[linear.name]))
        elif isinstance(weight, QTensor) and weight.grid.stores_inputs and not weight.grid.is_float:
            weight = replace(weight, input_scale=activation_scale(torch.tensor(self.peaks[linear.name], device=CPU)))
        names = [name for name, _ in linear.tensors() if name != linear.weight]
        biases = tuple((name, [self.folds.expected(linear, name, self.source.read(name))]) for name in names)
        return Finished(linear, weight, biases)

    def cache_scales(self, layer: Layer, key: float, value: float) -> Finished:
        """The scales of the layer's cache, from the largest magnitudes of its keys and values."""
        naming, attention = get_format(self.recipe.format).cache, layer.attention
        assert naming is not None
        dtype = self.source.checkpoint.entry(attention.linears()[0].weight).dtype
        tensors = naming.tensors(attention.name, dtype, key, value)
        return Finished(CacheScales(attention.name), None, tuple((name, [tensor]) for name, tensor in tensors))


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What the two halves of a layer share, and all builds that are made of it.

    Attributes:
        calibration: How the layer is looked at.
        is_last: Whether no layer follows that would need this one's output.
        builds: What is made of the layer. Where the next one sees its quantized outputs, it is one build.
        seen: By linear, routers included, the sums of squared inputs of the unquantized model, filled in as an
            importance matrix collected by itself would have them; None where nobody asks.
    """

    source: Source
    decoder: Decoder
    calibration: CalibrationSettings
    layer: Layer
    work: Workspace
    workers: Workers
    is_last: bool
    builds: tuple[LayerBuild, ...]
    seen: dict[str, InputSquares] | None

    @property
    def home(self) -> torch.device:
        """Where attention, routing and the statistics of the layer are."""
        return self.workers.lending.home

    @property
    def model(self) -> Architecture:
        """The architecture."""
        return self.source.architecture

    def generator(self, salt: int) -> torch.Generator:
        """A random stream that depends on the seed, the layer and ``salt`` alone."""
        seed = (self.calibration.seed * 1_000_003 + self.layer.index) * 1_000_003 + salt
        return torch.Generator().manual_seed(seed % 2**63)

    def see(self, linears: Iterable[Linear], squares: InputSquares) -> None:
        """Add to what was seen of the linears that read an input."""
        if self.seen is not None:
            for linear in linears:
                before = self.seen.get(linear.name, InputSquares.empty(linear.in_features))
                self.seen[linear.name] = before + squares
