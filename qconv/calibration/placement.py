"""Where a layer's parts are computed: attention and routing on the first device, experts on any that is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from qconv.artifacts.source import Source
from qconv.calibration.forward import Decoder
from qconv.calibration.mlp import StagedWeights
from qconv.core.architecture import Layer, Mlp
from qconv.core.devices import CPU
from qconv.core.workers import Workers

Item = TypeVar("Item")
Result = TypeVar("Result")


class Passing(Protocol):
    """A layer that tokens pass."""

    @property
    def source(self) -> Source:
        """The model."""

    @property
    def decoder(self) -> Decoder:
        """Its modules."""

    @property
    def layer(self) -> Layer:
        """The layer."""

    @property
    def workers(self) -> Workers:
        """Who works on it."""


def at_home(passing: Passing, function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The same for workers: with the first device borrowed, which computes it."""

    def called(item: Item) -> Result:
        return passing.workers.lending.call(lambda _: function(item), passing.layer.name, home=True)

    return called


def staged_weights(passing: Passing, mlp: Mlp) -> StagedWeights:
    """The weights of one of the layer's MLPs, read before a device is borrowed for them.

    Raises:
        CheckpointError: not readable, or values that are not finite.
    """
    gating = passing.decoder.gating(passing.layer, mlp)
    return StagedWeights.read(passing.source, mlp, gating, pin=passing.workers.lending.home != CPU)
