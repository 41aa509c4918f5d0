"""What a run asks of each build that it makes: a target before anything is written, a writer while it is.

A run of one build and of several is the same loop. It looks at each layer once for all targets; what a layer becomes,
in which files and when, is the target's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from qconv.building.output import Outcome
from qconv.building.share import Share
from qconv.calibration.corpus import TokenSet
from qconv.calibration.layer import Finished, LayerBuild
from qconv.calibration.statistics import InputSquares
from qconv.core.architecture import CacheScales, Layer, Linear, Module
from qconv.core.settings import CalibrationSettings
from qconv.core.workers import Workers
from qconv.folders.part import Part
from qconv.planning.costs import Demand
from qconv.verification.outcome import Progress

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Means:
    """What a run lends to its targets.

    Attributes:
        workers: Threads.
        committer: Checks and publishes what is written while the next is worked on.
        progress: Told what is at work, and how much of that is done.
        log: Told about decisions, one sentence each.
    """

    workers: Workers
    committer: Executor
    progress: Progress
    log: Log


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A module's tensors as files hold them: names and blocks of rows."""

    module: Module | CacheScales
    tensors: tuple[tuple[str, Iterable[Tensor]], ...]


class LayerSink(Protocol):
    """Takes a calibrated layer. A context manager: left before :meth:`commit`, nothing of the layer is kept."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def pack(self, finished: Finished) -> PackedModule:
        """A module as files hold it; called by worker threads."""

    def add(self, packed: PackedModule) -> None:
        """Write the layer's next module, in the order of the plan."""

    def see(self, linear: Linear) -> None:
        """Count a linear whose inputs were looked at, where nothing is made of the layer."""

    def commit(self, build: LayerBuild | None, seen: Mapping[str, InputSquares]) -> None:
        """Keep the layer, now or while the next one is worked on.

        Args:
            build: What :meth:`Writer.build` gave, with what came of it.
            seen: The squared inputs of the unquantized layer by linear, where the writer asked for no build.

        Raises:
            OutputError: the disk is full.
            VerificationError: what was written does not stand for the source.
        """


class Writer(Protocol):
    """A target at work.

    Attributes:
        done: Weights that are behind, of the target's.
    """

    @property
    def done(self) -> int: ...

    def pending(self, layer: Layer) -> bool:
        """Whether the layer is to be calibrated, or looked at, for this build yet."""

    def doing(self, layer: Layer) -> str:
        """What is done to a calibrated layer, for progress."""

    def build(self, layer: Layer) -> LayerBuild | None:
        """What calibration is to make of a layer; None if it is to be looked at only."""

    def sink(self, layer: Layer) -> LayerSink:
        """What takes the layer."""

    def before_layers(self) -> None:
        """Write what needs none of them."""

    def after_layer(self, layer: Layer) -> None:
        """Write what a layer completes that is safe where it is calibrated."""

    def after_layers(self) -> None:
        """Write what is left."""

    def settle(self) -> None:
        """Wait until all that was handed over is safe; its errors are raised here."""

    def finish(self) -> Outcome:
        """Complete the folder, check it as a whole, and only then write the checksums that call it complete.

        Raises:
            VerificationError: a file is not what it was when it was committed.
        """


class Target(Protocol):
    """One build of a run.

    Attributes:
        name: Of its folder in the run's; empty for the only build, which has that itself.
        folder: Its folder.
        weights: How many it works through, for progress.
        calibration: How it wants layers looked at; None if it does not look at them.
        calibrates: Whether layers are rounded by what is seen, not just looked at.
        share: The units that are made, if those are not all.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def weights(self) -> int: ...

    @property
    def calibration(self) -> CalibrationSettings | None: ...

    @property
    def calibrates(self) -> bool: ...

    @property
    def share(self) -> Share | None: ...

    @property
    def demand(self) -> Demand:
        """Memory by the number of workers."""

    def allowance(self, workers: int) -> float:
        """How many weights may be in flight."""

    def names(self) -> list[str]:
        """Every file that it will give a name to, relative to its folder."""

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What it belongs to, by itself."""

    def check(self, means: Means) -> None:
        """Refuse what could only fail at the end, before a run begins.

        Raises:
            RecipeError: the format cannot hold a weight.
        """

    def needed(self, committed: Collection[str], work: Path) -> int:
        """Bytes of disk that it still needs besides activations, given the keys of what it has committed."""

    def looks_again(self, committed: Collection[str]) -> bool:
        """Whether it needs the activations of layers yet."""

    def readings(self, workers: Workers) -> dict[str, Callable[[], str]]:
        """By key what reads again that of which a unit was made, and gives its checksum."""

    def standing(self, committed: Collection[str]) -> str:
        """How much of it is committed, in words: ``3 of 6 units are committed``."""

    def complete(self, belongs: Mapping[str, str], means: Means) -> Outcome:
        """The outcome of asking for it where it is complete already.

        Raises:
            StaleJournalError: it was made from other inputs.
            VerificationError: a file is missing or not what it was.
        """

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> Writer:
        """Go to work.

        Args:
            part: Its part of the journal and the work folder.
            tokens: The calibration text, if it looks at layers.
            belongs: Its fingerprints.
            means: What the run lends.
            show: Told what is at work whenever the writer's ``done`` has changed.
        """
