"""A build of safetensors shards: units in their order, each written, read back, checked and published together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.building.chosen import Chosen
from qconv.building.committer import UnitWriter
from qconv.building.completion import already_complete
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import (
    Outcome,
    companion_files,
    companion_names,
    planned_files,
    publish,
    remove_vanished,
    require_published,
)
from qconv.building.report import Report
from qconv.building.scale_range import check_scales
from qconv.building.share import Share
from qconv.building.target import Means, PackedModule
from qconv.calibration.corpus import TokenSet
from qconv.calibration.layer import Finished, LayerBuild, LayerReport
from qconv.calibration.schemes import StaticScheme, scheme_of
from qconv.calibration.statistics import InputSquares
from qconv.checkpoint.writer import sha256_of
from qconv.core.architecture import Layer, Linear
from qconv.core.qtensor import CHANNEL, QTensor
from qconv.core.rounding import assemble
from qconv.core.settings import CalibrationSettings
from qconv.core.workers import Workers
from qconv.folders.part import Part
from qconv.folders.readings import READ, checksum
from qconv.folders.state import CHECKSUMS_NAME
from qconv.grids.fp4 import Nvfp4Grid, largest_magnitude
from qconv.grids.of_formats import grid_of
from qconv.heap import return_freed_memory
from qconv.planning.costs import Demand, demand_of
from qconv.planning.engines import engine_values, judged
from qconv.planning.plan import BuildPlan, Item, Unit, disk_needed
from qconv.planning.schemes import LinearScheme, matrices
from qconv.verification.checksums import render_checksums
from qconv.verification.outcome import Verification
from qconv.verification.structure import check_structure


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsTarget:
    """See :class:`qconv.building.target.Target`.

    Attributes:
        chosen: How the recipe's grids were chosen, if they were.
        share: The units that are made, if that is not all.
    """

    source: Source
    plan: BuildPlan
    folder: Path
    name: str = ""
    chosen: Chosen | None = None
    share: Share | None = None

    @property
    def units(self) -> list[Unit]:
        """Those that are made."""
        return [unit for unit in self.plan.units if self.share is None or unit.key in self.share.keys]

    @property
    def weights(self) -> int:
        """The number of parameters that they hold."""
        return sum(unit.weights for unit in self.units)

    @property
    def calibration(self) -> CalibrationSettings | None:
        """How layers are looked at, if the method does."""
        return self.plan.recipe.calibration if self.plan.needs_calibration else None

    @property
    def calibrates(self) -> bool:
        """Whether layers are rounded by what is seen."""
        return self.plan.needs_calibration

    @property
    def demand(self) -> Demand:
        """Of the plan."""
        return demand_of(self.plan)

    def allowance(self, workers: int) -> float:
        """How many weights may be in flight."""
        return self.plan.allowance(workers)

    def names(self) -> list[str]:
        """Every file that gets a name."""
        if self.share is not None:
            return [shard for unit in self.units for shard, _ in unit.shards]
        return [*planned_files(self.plan), *companion_names(self.source, self.plan)]

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What the build belongs to."""
        # The search of clipping ranges compares sums, whose order is torch's.
        adds_up = self.plan.recipe.searches_clipping
        found = fingerprints(self.source, self.plan.recipe.digest(), tokens, adds_up=adds_up, companions="copied")
        return found if self.chosen is None else self.chosen.instead(found)

    def check(self, means: Means) -> None:
        """Refuse scales that the format cannot hold."""
        if self.plan.needs_calibration:
            means.progress("scales", 0, self.plan.weights)
            check_scales(self.source, self.plan, means.workers)

    def needed(self, committed: Collection[str], work: Path) -> int:
        """Bytes of the units that are not committed."""
        return disk_needed([unit for unit in self.units if unit.key not in committed])

    def looks_again(self, committed: Collection[str]) -> bool:
        """Whether there are such units, and activations are looked at."""
        return self.plan.needs_calibration and any(unit.key not in committed for unit in self.plan.units)

    def readings(self, workers: Workers) -> dict[str, Callable[[], str]]:
        """By unit what reads its part of the source again."""

        def read(unit: Unit) -> str:
            names = (name for item in unit.items for name, _ in item.module.tensors())
            return checksum(self.source.checkpoint, names, workers)

        return {unit.key: partial(read, unit) for unit in self.plan.units}

    def standing(self, committed: Collection[str]) -> str:
        """How many units are committed."""
        return f"{len(committed)} of {len(self.units)} units are committed"

    def complete(self, belongs: Mapping[str, str], means: Means) -> Outcome:
        """The finished build, with the companions that the source has now."""

        def renew(report: dict[str, Any]) -> dict[str, bytes]:
            engines = engine_values(judged(self.plan, self.source))
            return companion_files(self.source, self.plan, Report(report | {"engines": engines}))

        shards = [shard for unit in self.plan.units for shard, _ in unit.shards]
        return already_complete(self.folder, belongs, shards, means.workers, means.progress, renew)

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> SafetensorsWriter:
        """Go to work."""
        return SafetensorsWriter(self, part, tokens, belongs, means, show)


class SafetensorsWriter:
    """See :class:`qconv.building.target.Writer`.

    Attributes:
        done: Weights that are behind.
    """

    def __init__(
        self,
        target: SafetensorsTarget,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> None:
        """See :meth:`qconv.building.target.Target.begin`."""
        self.source, self.plan, self.out, self.chosen = target.source, target.plan, target.folder, target.chosen
        self.share = target.share
        self.made = target.units
        self.part = part
        self.tokens = tokens
        self.belongs = belongs
        self.means = means
        self.show = show
        self.done = 0
        self.committing: Future[None] | None = None
        self.verbatim = {one.name for one in target.plan.verbatim}
        self.fused = {
            one.name: group for layer in self.plan.architecture.layers for group in matrices(layer) for one in group
        }
        self.units = {unit.layer.index: unit for unit in self.plan.units if unit.layer is not None}

    def pending(self, layer: Layer) -> bool:
        """Whether the layer is not committed."""
        return self.units[layer.index].key not in self.part.units

    def doing(self, layer: Layer) -> str:
        """The unit's key."""
        return self.units[layer.index].key

    def build(self, layer: Layer) -> LayerBuild:
        """How the layer's linears are rounded."""
        recipe, unit = self.plan.recipe, self.units[layer.index]
        planned = {item.module.name: item.scheme for item in unit.items if item.scheme is not None}
        if self.plan.is_static:
            static = StaticScheme(next(iter(self.plan.grids())), recipe)
            return LayerBuild.of(self.source, layer, recipe, planned, {}, static)
        schemes = {name: scheme_of(scheme, recipe) for name, scheme in planned.items()}
        return LayerBuild.of(self.source, layer, recipe, planned, schemes)

    def sink(self, layer: Layer) -> _UnitSink:
        """What takes the layer."""
        return _UnitSink(self, self.units[layer.index])

    def before_layers(self) -> None:
        """The embeddings."""
        self._write(self.plan.units[0])

    def after_layer(self, layer: Layer) -> None:
        """A layer that is not calibrated."""
        self._write(self.units[layer.index])

    def after_layers(self) -> None:
        """The head, and what is copied beside the model."""
        for unit in self.plan.units[1:]:
            if unit.layer is None:
                self._write(unit)

    def _write(self, unit: Unit) -> None:
        if unit not in self.made:
            return
        behind = sum(one.weights for one in self.made[: self.made.index(unit)])
        committed = self.part.units.get(unit.key)
        if committed is not None:
            for file in committed["files"]:
                require_published(self.out / file["name"], file["size"])
        else:
            self.done = behind
            self.show(unit.key)
            with _UnitSink(self, unit) as sink:
                sizes = (item.size for item in unit.items)
                packed = self.means.workers.map(lambda item: sink.pack(self._rounded(item)), unit.items, sizes)
                with contextlib.closing(packed):
                    for one in packed:
                        sink.add(one)
                        self.show(unit.key)
                    sink.commit(None, {})
        self.done = behind + unit.weights
        return_freed_memory()

    def _rounded(self, item: Item) -> Finished:
        """A module without calibration."""
        names, weight = [name for name, _ in item.module.tensors()], None
        if item.scheme is not None and isinstance(item.module, Linear):
            weight = self._round(item.module, item.scheme)
            names.remove(item.module.weight)
        # What nobody computes with may hold anything.
        read = self.source.checkpoint.blocks if item.module.name in self.verbatim else self.source.blocks
        return Finished(item.module, weight, tuple((name, read(name)) for name in names))

    def _round(self, linear: Linear, scheme: LinearScheme) -> QTensor:
        """A linear's weight without calibration, made block by block unless all rows share a scale."""
        grid, recipe = scheme.grid, self.plan.recipe
        clip = recipe.clip if recipe.clips(scheme.method) else None
        rounding = grid_of(grid, scheme.values, clip)
        if isinstance(rounding, Nvfp4Grid):
            rounding = rounding.shared(max(map(self._largest, self.fused.get(linear.name, (linear,)))))
        if scheme.values is not None or grid.block_rows == CHANNEL:
            return rounding.encode(self.source.read(linear.weight))
        blocks = self.source.blocks(linear.weight, grid.block_rows)
        return assemble(map(rounding.encode, blocks), linear.out_features)

    def _largest(self, linear: Linear) -> float:
        """The magnitude of its largest weight."""
        return largest_magnitude(self.source.blocks(linear.weight))

    def settle(self) -> None:
        """Wait until the unit before is published; its error is raised here."""
        if self.committing is not None:
            self.committing.result()
            self.committing = None

    def finish(self) -> Outcome:
        """Complete the folder."""
        if self.share is not None:
            return Outcome(self.out, {}, already_complete=False, share=self.share)
        corpus, units = None if self.tokens is None else self.tokens.source, self.part.units
        report = self._report(corpus, units)
        small = self._companions(report)
        publish(self.out, self.part, small)
        remove_vanished(self.out, self.part, small)
        names = sorted({*small, *(file["name"] for record in units.values() for file in record["files"])})
        digests = self.means.workers.map(lambda name: sha256_of(self.out / name), names)
        sums = dict(zip(names, digests, strict=True))
        self._check_whole(units, sums)
        publish(self.out, self.part, {CHECKSUMS_NAME: render_checksums(sums).encode()})
        return Outcome(self.out, report.values, already_complete=False)

    def _report(self, corpus: str | None, units: Mapping[str, Mapping[str, Any]]) -> Report:
        """What the build says of itself."""
        engines = judged(self.plan, self.source)
        return Report.make(self.plan, self.source.name, lasting(self.belongs), corpus, units, self.chosen, engines)

    def _companions(self, report: Report) -> dict[str, bytes]:
        """What lies beside the shards."""
        return companion_files(self.source, self.plan, report)

    def _check_whole(self, units: Mapping[str, Mapping[str, Any]], sums: Mapping[str, str]) -> None:
        """Check the build as it now lies on disk.

        Every file was checked against the source when it was committed, weight by weight; here it must still be that
        file to the last bit, and all of them together must be the whole model.

        Raises:
            VerificationError: they are not.
        """
        result = self._check_files(units, sums)
        build = Build.open(self.out)
        check_structure(build, result)
        quantized = {linear.name for linear in self.plan.quantized}
        measured = {name for record in units.values() for name in record["snr_db"]}
        for name in sorted(quantized ^ measured):
            result.problems.append(f"{name}: planned and measured do not agree")
        result.raise_if_bad(self.out)

    def _check_files(self, units: Mapping[str, Mapping[str, Any]], sums: Mapping[str, str]) -> Verification:
        """Check that every file is what was committed.

        Raises:
            VerificationError: one is not.
        """
        result = Verification()
        for record in units.values():
            for file in record["files"]:
                if sums.get(file["name"]) != file["sha256"]:
                    result.problems.append(f"{file['name']}: changed since it was committed")
        result.raise_if_bad(self.out)
        return result


class _UnitSink:
    """Writes a unit; it is checked and published while the next one is worked on, one unit at a time."""

    def __init__(self, owner: SafetensorsWriter, unit: Unit) -> None:
        self._owner = owner
        self._unit = unit
        self._stack = contextlib.ExitStack()
        self._writer = UnitWriter(owner.out, owner.plan, unit, owner.part.staged)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def pack(self, finished: Finished) -> PackedModule:
        """See :class:`qconv.building.target.LayerSink`."""
        weight = finished.weight
        assert weight is None or isinstance(weight, QTensor)
        packed: Iterable[tuple[str, Tensor]] = ()
        if weight is not None:
            packed = self._owner.plan.format.pack(finished.module.name, weight)
        return PackedModule(finished.module, (*((name, [tensor]) for name, tensor in packed), *finished.dense))

    def add(self, packed: PackedModule) -> None:
        """See :class:`qconv.building.target.LayerSink`."""
        for name, blocks in packed.tensors:
            self._writer.add(name, blocks)
        self._owner.done += packed.module.numel

    def see(self, linear: Linear) -> None:
        """See :class:`qconv.building.target.LayerSink`."""

    def commit(self, build: LayerBuild | None, seen: Mapping[str, InputSquares]) -> None:
        """See :class:`qconv.building.target.LayerSink`."""
        owner, writer, key = self._owner, self._writer, self._unit.key
        scales, report = ({}, LayerReport()) if build is None else (build.scales, build.report)
        owner.settle()
        written = self._stack.pop_all()

        def publish() -> None:
            with written:
                committed = writer.commit(owner.source, scales, owner.means.workers, owner.part.announce)
            files = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in committed.files]
            outcome = dataclasses.asdict(report)
            made = {"files": files, "snr_db": committed.snr_db, "report": outcome, READ: committed.read}
            owner.part.commit(key, made)

        owner.committing = owner.means.committer.submit(publish)
