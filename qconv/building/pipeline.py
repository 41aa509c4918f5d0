"""The run: layer by layer from source shards to verified output shards, resumable at every layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.building.committer import UnitWriter
from qconv.building.completion import already_complete
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import (
    Outcome,
    begin,
    companion_files,
    companion_names,
    enter,
    planned_files,
    publish,
    remove_vanished,
    require_apart,
    require_published,
)
from qconv.building.report import Report
from qconv.building.scale_range import check_scales
from qconv.calibration.corpus import TokenSet, build_tokens
from qconv.calibration.layer import Finished, LayerBuild, LayerReport
from qconv.checkpoint.writer import output_errors, sha256_of
from qconv.core.architecture import Linear
from qconv.core.qtensor import CHANNEL, QTensor
from qconv.core.rounding import assemble
from qconv.executors.threads import Workers, default_workers
from qconv.folders.journal import WORK_FOLDER, Journal, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.readings import READ, SourceRecord, checksum
from qconv.folders.state import CHECKSUMS_NAME, FolderState
from qconv.grids import e4m3, integers
from qconv.heap import return_freed_memory
from qconv.planning.plan import BuildPlan, Item, Module, Unit, make_plan, modelled_costs
from qconv.planning.recipe import Recipe
from qconv.verification.checksums import render_checksums
from qconv.verification.outcome import Progress, Verification
from qconv.verification.structure import check_structure

Log = Callable[[str], None]


def quantize(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Make a build, or continue one.

    Args:
        model: The source checkpoint's folder.
        out: The build's folder; made if absent.
        recipe: What to build.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts and matrices worked on at once; the bytes of the build do not depend on it.
        progress: Told the unit at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the source is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    require_apart(model, out)
    source = Source.open(model)
    source.require_publishable()
    for notice in source.notices():
        log(f"source: {notice}")
    plan = make_plan(source.architecture, recipe, lambda name: source.checkpoint.entry(name).dtype)
    for notice in plan.notices():
        log(f"build: {notice}")
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    count = default_workers() if threads is None else threads
    workers, committer = Workers(count, plan.allowance(count)), ThreadPoolExecutor(1, thread_name_prefix="commit")
    with locked(out), workers, committer:
        return _Run(source, plan, out, workers, committer, progress, log).run(restart)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A module's tensors as the file holds them: names and blocks of rows."""

    module: Module
    tensors: tuple[tuple[str, Iterable[Tensor]], ...]


Made = TypeVar("Made", Finished, _Packed)


class _Run:
    def __init__(
        self,
        source: Source,
        plan: BuildPlan,
        out: Path,
        workers: Workers,
        committer: Executor,
        progress: Progress,
        log: Log,
    ) -> None:
        self.committer = committer
        self.committing: Future[None] | None = None
        self.workers = workers
        self.source = source
        self.plan = plan
        self.recipe = plan.recipe
        self.out = out
        self.work = out / WORK_FOLDER
        self.progress = progress
        self.log = log
        self.tokens: TokenSet | None = None
        self.done = 0
        """Weights of the units that are behind."""

    def run(self, restart: bool) -> Outcome:
        state = enter(self.out)
        if self.plan.needs_calibration:
            self.tokens = build_tokens(self.recipe.calibration, self.source.checkpoint.path)
            self.log(f"calibration: {self.tokens.ids.numel():,} tokens of {self.tokens.source}")
        belongs = self._fingerprints()
        if state is FolderState.COMPLETE and not restart:
            return self._already_complete(belongs)
        if self.tokens is not None and (restart or state is not FolderState.UNFINISHED):
            # Now, and not when a layer's calibration is done; an unfinished run has done it.
            self.progress("scales", 0, self.plan.weights)
            check_scales(self.source, self.plan.quantized, self.plan.grid, self.workers)
        names = [*planned_files(self.plan), *companion_names(self.source)]
        journal, resumed = begin(self.out, belongs, names, self._needed, restart=restart)
        if resumed:
            self.log(f"resuming: {len(journal.units)} of {len(self.plan.units)} units are committed")
        record = SourceRecord(self.source.checkpoint, journal, self._readings())
        record.require_unchanged(self.progress)
        self._units(journal, record)
        record.require_unchanged(self.progress)
        return Outcome(self.out, self._finish(journal), already_complete=False)

    def _already_complete(self, belongs: Mapping[str, str]) -> Outcome:
        """A build that is finished, with the companions that the source has now."""

        def renew(report: dict[str, Any]) -> dict[str, bytes]:
            return companion_files(self.source, self.plan, Report(report))

        shards = [shard for unit in self.plan.units for shard, _ in unit.shards]
        outcome = already_complete(self.out, belongs, shards, self.workers, self.progress, renew)
        if outcome.renewed:
            self.log(f"the source has other files beside its weights now: {', '.join(outcome.renewed)} are made again")
        return outcome

    def _fingerprints(self) -> dict[str, str]:
        # The search of clipping ranges compares sums, whose order is torch's.
        adds_up = self.recipe.searches_clipping
        return fingerprints(self.source, self.recipe.digest(), self.tokens, adds_up=adds_up, companions="copied")

    def _readings(self) -> dict[str, Callable[[], str]]:
        """By unit what reads its part of the source again, and gives the checksum of it."""

        def read(unit: Unit) -> str:
            names = (name for item in unit.items for name, _ in item.module.tensors())
            return checksum(self.source.checkpoint, names, self.workers)

        return {unit.key: partial(read, unit) for unit in self.plan.units}

    def _needed(self, committed: Collection[str]) -> int:
        """Bytes of disk that a run still needs that has committed some units."""
        pending = sum(unit.nbytes for unit in self.plan.units if unit.key not in committed)
        scratch = modelled_costs(self.plan).scratch if pending else 0
        present = sum(file.stat().st_size for file in self.work.glob("*.bin"))
        return pending + max(0, scratch - present)

    def _units(self, journal: Journal, record: SourceRecord) -> None:
        """The loop: every unit that is not committed yet."""
        calibrated = self._calibrated_units(journal, record) if self._pending_layers(journal) else None
        for unit in self.plan.units:
            self._show(unit)
            if unit.layer is not None and calibrated is not None and self.tokens is not None:
                calibrated(unit)
            elif unit.key in journal.units:
                self._require_published(unit, journal)
            else:
                sizes = (item.size for item in unit.items)
                packed = self.workers.map(lambda item: self._pack(self._rounded(item)), unit.items, sizes)
                self._commit(unit, packed, {}, LayerReport(), record)
            self.done += unit.weights
            return_freed_memory()
        self._await_commit()
        self.progress("finishing", self.done, self.plan.weights)

    def _show(self, unit: Unit, weights: int = 0) -> None:
        self.progress(unit.key, self.done + weights, self.plan.weights)

    def _pending_layers(self, journal: Journal) -> bool:
        return any(unit.layer is not None and unit.key not in journal.units for unit in self.plan.units)

    def _calibrated_units(self, journal: Journal, record: SourceRecord) -> Callable[[Unit], None] | None:
        """What makes a calibrated layer, or None if the method needs no calibration."""
        if self.tokens is None:
            return None
        # transformers takes seconds to import; rounding does without.
        from qconv.calibration.run import Calibration
        from qconv.calibration.schemes import StaticScheme, scheme_of

        calibration = Calibration(self.source, self.recipe.calibration, self.tokens, self.work, journal, self.workers)
        grid = self.plan.grid
        static = StaticScheme(grid, self.recipe) if grid.activations == "static" else None

        def make(unit: Unit) -> None:
            assert unit.layer is not None
            committed = unit.key in journal.units
            if committed:
                self._require_published(unit, journal)
            if unit.layer.index < calibration.next_layer:
                return
            quantized = [item.module.name for item in unit.items if item.quantized]
            schemes = {} if static else dict.fromkeys(quantized, scheme_of(grid, self.recipe))
            made = LayerBuild.of(self.source, unit.layer, self.recipe, quantized, schemes, static)
            context = calibration.context(unit.layer, [made])
            modules = (finished for _, finished in calibration.modules(context))
            if committed:
                self.log(f"{unit.key}: committed before its outputs were; computing them again")
                for _ in self._shown(unit, modules):
                    pass
            else:
                packed = self.workers.map(self._pack, modules)
                self._commit(unit, packed, made.scales, made.report, record)
            # A layer's outputs may only count as made once the layer itself is safe.
            self._await_commit()
            calibration.advance(context)

        return make

    def _rounded(self, item: Item) -> Finished:
        """A module without calibration."""
        names, weight = [name for name, _ in item.module.tensors()], None
        if item.quantized and isinstance(item.module, Linear):
            weight = self._round(item.module)
            names.remove(item.module.weight)
        return Finished(item.module, weight, tuple((name, self.source.blocks(name)) for name in names))

    def _round(self, linear: Linear) -> QTensor:
        """A linear's weight without calibration, made block by block unless all rows share a scale."""
        grid = self.plan.grid
        clip = self.recipe.clip if self.recipe.searches_clipping else None
        rounded = e4m3.quantize if grid.is_float else integers.quantize
        if grid.block_rows == CHANNEL:
            return rounded(self.source.read(linear.weight), grid, clip)
        blocks = self.source.blocks(linear.weight, grid.block_rows)
        return assemble((rounded(block, grid, clip) for block in blocks), linear.out_features)

    def _commit(
        self,
        unit: Unit,
        modules: Generator[_Packed, None, None],
        scales: Mapping[str, Tensor],
        report: LayerReport,
        record: SourceRecord,
    ) -> None:
        """Write a unit; it is checked and published while the next one is worked on, one unit at a time."""
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(UnitWriter(self.out, self.plan, unit, record.journal.staged))
            made = stack.enter_context(contextlib.closing(modules))
            for packed in self._shown(unit, made):
                for name, blocks in packed.tensors:
                    writer.add(name, blocks)
            self._await_commit()
            written = stack.pop_all()

        def publish() -> None:
            with written:
                committed = writer.commit(self.source, scales, self.workers, record.journal.announce)
            files = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in committed.files]
            outcome = dataclasses.asdict(report)
            made = {"files": files, "snr_db": committed.snr_db, "report": outcome, READ: committed.read}
            record.commit(unit.key, made)

        self.committing = self.committer.submit(publish)

    def _pack(self, finished: Finished) -> _Packed:
        weight = finished.weight
        assert weight is None or isinstance(weight, QTensor)
        packed = () if weight is None else self.plan.format.pack(finished.module.name, weight)
        return _Packed(finished.module, (*((name, [tensor]) for name, tensor in packed), *finished.dense))

    def _await_commit(self) -> None:
        """Wait until the unit before is published; its error is raised here."""
        if self.committing is not None:
            self.committing.result()
            self.committing = None

    def _shown(self, unit: Unit, modules: Iterator[Made]) -> Iterator[Made]:
        """The same modules; progress is shown as they come."""
        weights = 0
        for made in modules:
            yield made
            weights += made.module.numel
            self._show(unit, weights)

    def _require_published(self, unit: Unit, journal: Journal) -> None:
        for file in journal.units[unit.key]["files"]:
            require_published(self.out / file["name"], file["size"])

    def _finish(self, journal: Journal) -> dict[str, Any]:
        """Complete the folder, check it as a whole, and only then write the checksums that call it complete."""
        corpus = None if self.tokens is None else self.tokens.source
        report = Report.make(self.plan, self.source.name, lasting(journal.fingerprints), corpus, journal.units)
        small = companion_files(self.source, self.plan, report)
        publish(self.out, journal, small)
        remove_vanished(self.out, journal, small)
        names = sorted({*small, *(file["name"] for record in journal.units.values() for file in record["files"])})
        sums = dict(zip(names, self.workers.map(lambda name: sha256_of(self.out / name), names), strict=True))
        self._check_whole(journal, sums)
        publish(self.out, journal, {CHECKSUMS_NAME: render_checksums(sums).encode()})
        remove_claimed(self.work)
        return report.values

    def _check_whole(self, journal: Journal, sums: Mapping[str, str]) -> None:
        """Check the build as it now lies on disk.

        Every file was checked against the source when it was committed, weight by weight; here it must still be that
        file to the last bit, and all of them together must be the whole model.

        Raises:
            VerificationError: they are not.
        """
        result = Verification()
        for record in journal.units.values():
            for file in record["files"]:
                if sums.get(file["name"]) != file["sha256"]:
                    result.problems.append(f"{file['name']}: changed since it was committed")
        build = Build.open(self.out)
        check_structure(build, result)
        quantized = {linear.name for linear in self.plan.quantized}
        measured = {name for record in journal.units.values() for name in record["snr_db"]}
        for name in sorted(quantized ^ measured):
            result.problems.append(f"{name}: planned and measured do not agree")
        result.raise_if_bad(self.out)
