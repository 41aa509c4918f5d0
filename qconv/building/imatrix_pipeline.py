"""An importance matrix by itself, for llama.cpp's programs or for several GGUF builds of one model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.artifacts.source import Source
from qconv.building.collecting import Collecting, unquantized
from qconv.building.completion import already_complete
from qconv.building.gguf_report import Coverage
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import Outcome, publish, require_apart
from qconv.building.run import make_builds
from qconv.building.target import LayerSink, Log, Means
from qconv.calibration.corpus import TokenSet
from qconv.calibration.imatrix import IMATRIX_NAME, LayerSums, layer_readings, layer_weights, sums_bytes
from qconv.checkpoint.writer import sha256_of
from qconv.core.architecture import Layer
from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.core.workers import Workers
from qconv.executors import DEFAULT
from qconv.folders.part import Part
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME
from qconv.formats.gguf.imatrix import Imatrix
from qconv.formats.gguf.metadata import require_expressible
from qconv.formats.gguf.names import gguf_tensors
from qconv.planning.costs import Demand, demand_of_passing
from qconv.planning.gguf_recipe import ImatrixSettings
from qconv.verification.checksums import render_checksums
from qconv.verification.outcome import Progress


def write_model_imatrix(
    model: Path,
    out: Path,
    text: TextSettings,
    *,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    progress: Progress,
    log: Log,
) -> Outcome:
    """Collect a model's importance matrix, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder that gets ``imatrix.gguf``, a report and checksums; made if absent.
        text: What the model reads.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts worked on at once; the bytes do not depend on it.
        executor: Where the work runs, by name: a module of :mod:`qconv.executors`.
        devices: On what tensors are computed that are added up; see :func:`qconv.core.devices.devices_of`.
        progress: Told the layer at work, the weights passed and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError: llama.cpp cannot express the model, or the text is too short.
        CheckpointError: the source is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
    """
    require_apart(model, out)
    source = Source.open(model)
    _ = source.name  # refused now, if no report can hold it
    for notice in source.notices():
        log(f"source: {notice}")
    require_expressible(source.checkpoint.config, source.architecture)
    target = ImatrixTarget(source, text, out)
    return make_builds(
        source,
        [target],
        out,
        restart=restart,
        threads=threads,
        executor=executor,
        devices=devices,
        progress=progress,
        log=log,
    )[0]


@dataclass(frozen=True, slots=True)
class ImatrixTarget:
    """See :class:`qconv.building.target.Target`."""

    source: Source
    text: TextSettings
    folder: Path
    name: str = ""
    share: None = None

    @property
    def weights(self) -> int:
        """The weights that the pass goes through."""
        return sum(map(layer_weights, self.source.architecture.layers))

    @property
    def calibration(self) -> CalibrationSettings:
        """How layers are looked at."""
        return unquantized(self.text)

    @property
    def calibrates(self) -> bool:
        """No."""
        return False

    @property
    def demand(self) -> Demand:
        """Of layers that are passed."""
        return demand_of_passing(self.source.architecture)

    def allowance(self, workers: int) -> float:
        """No bound."""
        return math.inf

    def names(self) -> list[str]:
        """Every file that gets a name."""
        return [IMATRIX_NAME, REPORT_NAME]

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What the matrix belongs to."""
        return fingerprints(self.source, "imatrix", tokens, adds_up=True, companions="left out")

    def check(self, means: Means) -> None:
        """Nothing."""

    def needed(self, committed: Collection[str], work: Path) -> int:
        """Bytes of what is seen of the layers."""
        if not self.looks_again(committed):
            return 0
        present = sum(file.stat().st_size for file in work.glob("*.gguf"))
        return max(0, sums_bytes(self.source.architecture) - present)

    def looks_again(self, committed: Collection[str]) -> bool:
        """Whether the matrix is not there."""
        return IMATRIX_NAME not in committed

    def readings(self, workers: Workers) -> dict[str, Callable[[], str]]:
        """By layer what reads its part of the source again."""
        return layer_readings(self.source, workers)

    def standing(self, committed: Collection[str]) -> str:
        """How many layers are collected."""
        layers = self.source.architecture.layers
        return f"{min(len(committed), len(layers))} of {len(layers)} layers are collected"

    def complete(self, belongs: Mapping[str, str], means: Means) -> Outcome:
        """The finished matrix."""
        return already_complete(self.folder, belongs, [IMATRIX_NAME], means.workers, means.progress)

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> ImatrixWriter:
        """Go to work."""
        assert tokens is not None
        return ImatrixWriter(self, part, tokens, belongs, means)


class ImatrixWriter:
    """See :class:`qconv.building.target.Writer`."""

    def __init__(
        self, target: ImatrixTarget, part: Part, tokens: TokenSet, belongs: Mapping[str, str], means: Means
    ) -> None:
        """See :meth:`qconv.building.target.Target.begin`."""
        self.target = target
        self.out = target.folder
        self.part = part
        self.tokens = tokens
        self.belongs = belongs
        self.means = means
        self.sums = LayerSums(target.source, tokens, part)
        self.layers = Collecting(target.source, self.sums, part, means.workers)
        self.matrix: Imatrix | None = None

    @property
    def done(self) -> int:
        """Weights of the layers that are behind."""
        return self.layers.done

    def pending(self, layer: Layer) -> bool:
        """Whether the layer's sums are to be collected yet."""
        return self.layers.pending(layer)

    def doing(self, layer: Layer) -> str:
        """For progress."""
        return self.layers.doing(layer)

    def build(self, layer: Layer) -> None:
        """Nothing: layers are looked at only."""

    def sink(self, layer: Layer) -> LayerSink:
        """What takes the layer."""
        return self.layers.sink(layer)

    def before_layers(self) -> None:
        """Nothing."""

    def after_layer(self, layer: Layer) -> None:
        """Count it."""
        self.layers.pass_by(layer)

    def after_layers(self) -> None:
        """The matrix of all layers."""
        self.matrix = self.sums.merge(self.out)

    def settle(self) -> None:
        """Nothing is handed over that is not safe."""

    def finish(self) -> Outcome:
        """Complete the folder."""
        assert self.matrix is not None
        tensors = gguf_tensors(self.target.source.architecture)
        report: dict[str, Any] = {
            "qconv": __version__,
            "source": self.target.source.name,
            "format": "imatrix",
            "fingerprints": lasting(self.belongs),
            "calibration": self.target.text.model_dump(mode="json"),
            "datasets": [self.tokens.source],
            "coverage": Coverage.of(self.matrix, tensors, ImatrixSettings().shrinkage_tokens).values(),
        }
        publish(self.out, self.part, {REPORT_NAME: (json.dumps(report, indent=2) + "\n").encode()})
        sums = {name: sha256_of(self.out / name) for name in self.target.names()}
        publish(self.out, self.part, {CHECKSUMS_NAME: render_checksums(sums).encode()})
        return Outcome(self.out, report, already_complete=False)
