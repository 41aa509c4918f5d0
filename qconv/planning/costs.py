"""What a run takes of the machine, modelled from shapes: not measured.

Memory is the interpreter with torch; for rounding, blocks of the source, and codes and packed words of what may be in
flight, at least the largest linear; for calibration, the float32 copies that the attention search or one expert needs
and a window of activations. GPTQ holds Hessians and their factors besides: attention's, which are worked on alone, then
those of one expert for each worker. Matched calibration holds as much again of how inputs drift.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconv.core.architecture import Architecture
from qconv.core.machine import available_memory, processors
from qconv.core.settings import MATCHED
from qconv.core.workers import AT_ONCE
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.plan import ACTIVATION_BYTES, BuildPlan
from qconv.planning.recipe import Recipe

_MIB = 2**20
_ROUNDING, _CALIBRATING = 350 * _MIB, 1100 * _MIB
"""The interpreter with what it imports."""
_WINDOW_TOKENS = 2048
_SHARE = 0.8
"""Of the memory that is there: the rest is for what is mapped, and for others."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Peak resident memory by the number of workers, in bytes.

    Attributes:
        base: What is always there.
        alone: Besides, for what one worker does while the others wait for it.
        shared: Besides, for all workers together.
        each: Besides, for each of them.
    """

    base: int
    alone: int = 0
    shared: int = 0
    each: int = 0

    def at(self, workers: int) -> int:
        """The peak with so many workers."""
        return self.base + max(self.alone, self.shared + workers * self.each)

    def workers(self, available: int | None = None, most: int | None = None) -> int:
        """As many workers as there are processors, or as memory allows; at least one.

        Args:
            available: Bytes that may be used; by default what this machine has left, with some to spare.
            most: Processors; by default those of this process.
        """
        most = processors() if most is None else most
        if available is None:
            left = available_memory()
            if left is None:
                return most
            available = int(_SHARE * left)
        if not self.each:
            return most
        return max(1, min(most, (available - self.base - self.shared) // self.each))

    def on_device(self, at_once: int) -> int:
        """Bytes of a device where so many experts are worked on at once; the interpreter stays outside."""
        return max(self.alone, self.shared + at_once * self.each)

    def beside(self, other: Demand) -> Demand:
        """Of two builds of one run: layers are held once, what is made of them for each."""
        return Demand(
            max(self.base, other.base),
            max(self.alone, other.alone),
            max(self.shared, other.shared),
            max(self.each, other.each),
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """Modelled costs of a run, in bytes, and the workers that they are of.

    ``device`` is what it takes of each device's memory where it computes on some; 0 where it would not use them.
    """

    memory: int
    scratch: int
    workers: int = 1
    device: int = 0

    @classmethod
    def of(cls, demand: Demand, scratch: int) -> Costs:
        """With as many workers as this machine would take."""
        workers = demand.workers()
        device = demand.on_device(AT_ONCE) if demand.base == _CALIBRATING else 0
        return cls(demand.at(workers), scratch, workers, device)


def demand_of(plan: BuildPlan) -> Demand:
    """Of a build in safetensors."""
    if plan.needs_calibration:
        return _calibrated(plan.architecture, plan.recipe, any(one.rounding for one in plan.schemes.values()))
    sizes = [linear.numel for linear in plan.quantized]
    average = sum(sizes) // max(1, len(sizes))
    return Demand(_ROUNDING, alone=2 * max(sizes, default=0), shared=2 * average, each=2 * average)


def demand_of_gguf(architecture: Architecture, recipe: GgufRecipe) -> Demand:
    """Of a GGUF build."""
    if recipe.is_calibrated:
        calibrated = recipe.calibrated()
        return _calibrated(architecture, calibrated, calibrated.rounding is not None)
    if recipe.calibration is not None:
        return demand_of_passing(architecture)
    return Demand(_ROUNDING, each=96 * _MIB)


def demand_of_passing(architecture: Architecture) -> Demand:
    """Of tokens that pass the unquantized layers."""
    attention, mlp = _largest(architecture)
    window = 4 * _WINDOW_TOKENS * 4 * architecture.hidden_size
    return Demand(_CALIBRATING, alone=4 * attention + window, each=4 * mlp + window)


def scratch_of(plan: BuildPlan) -> int:
    """Disk for activations, besides the build."""
    if not plan.needs_calibration:
        return 0
    settings = plan.recipe.calibration
    return settings.tokens * plan.architecture.hidden_size * ACTIVATION_BYTES * settings.streams


def modelled_costs(plan: BuildPlan) -> Costs:
    """Of a build in safetensors on this machine."""
    return Costs.of(demand_of(plan), scratch_of(plan))


def _calibrated(architecture: Architecture, recipe: Recipe, rounding: bool) -> Demand:
    hidden = architecture.hidden_size
    attention, mlp = _largest(architecture)
    inner = max(group.in_features for layer in architecture.layers for group in layer.groups()[1:])
    window = 4 * _WINDOW_TOKENS * (hidden + 2 * inner)
    if not rounding:
        return Demand(_CALIBRATING, alone=16 * attention + window, each=16 * mlp + window)
    drift = 2 if recipe.calibration.propagate == MATCHED else 0
    alone = 4 * (3 * attention + hidden**2 + (3 + drift) * inner**2) + window
    return Demand(_CALIBRATING, alone, shared=4 * hidden**2, each=4 * (3 * mlp + (4 + drift) * hidden**2) + window)


def _largest(architecture: Architecture) -> tuple[int, int]:
    """Weights of the largest attention and of the largest MLP, an expert where there are some."""
    layers = architecture.layers
    attention = max(sum(one.numel for one in layer.attention.linears()) for layer in layers)
    return attention, max(sum(one.numel for one in mlp.linears()) for layer in layers for mlp in layer.mlps())
