"""The run: layer by layer from source shards to verified builds, one or several, resumable at every layer.

Each layer is looked at once, whatever is made of it: attention, routing, the experts' outputs and the statistics of
their inputs are the same for all builds, since several of them see the outputs of unquantized layers alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from qconv.artifacts.source import Source
from qconv.building.inputs import merged, on_devices
from qconv.building.output import Outcome, begin
from qconv.building.several import enter_all
from qconv.building.share import named_share
from qconv.building.target import LayerSink, Log, Means, PackedModule, Target, Writer
from qconv.calibration.corpus import TokenSet, build_tokens
from qconv.calibration.layer import Finished, LayerBuild, LayerContext
from qconv.calibration.run import Calibration
from qconv.calibration.statistics import InputSquares
from qconv.checkpoint.window import HubFolder
from qconv.checkpoint.writer import output_errors
from qconv.core.architecture import Layer
from qconv.core.devices import Lending, devices_of, make_deterministic
from qconv.core.settings import CalibrationSettings
from qconv.core.workers import AT_ONCE
from qconv.executors import DEFAULT, get_executor
from qconv.folders.journal import WORK_FOLDER, Journal, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.part import Part, key_of, own
from qconv.folders.readings import SourceRecord
from qconv.folders.state import FolderState
from qconv.planning.costs import Demand
from qconv.planning.plan import ACTIVATION_BYTES
from qconv.verification.outcome import Progress


def make_builds(
    source: Source,
    targets: Sequence[Target],
    out: Path,
    *,
    restart: bool,
    threads: int | None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    progress: Progress,
    log: Log,
) -> list[Outcome]:
    """Make builds of a model, or go on with them; their outcomes in the order of the targets.

    Args:
        source: The model.
        targets: What to build: one without a name, or several with names, which agree in how layers are looked at.
        out: The run's folder, made if absent.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts and matrices worked on at once; the bytes of the builds do not depend on it.
        executor: Where the work runs: the name of a module of :mod:`qconv.executors`.
        devices: On what tensors are computed that are added up; see :func:`qconv.core.devices.devices_of`.
        progress: Told what is at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the source is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    places = devices_of(devices)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    demand = functools.reduce(Demand.beside, [target.demand for target in targets])
    count = demand.workers() if threads is None else threads
    make_deterministic(places)
    allowance = max(target.allowance(count) for target in targets)
    workers = get_executor(executor)(count, allowance, Lending(places, demand.on_device(AT_ONCE)))
    committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
    with locked(out), workers, committer:
        return _Run(source, targets, out, Means(workers, committer, progress, log)).run(restart)


class _Run:
    def __init__(self, source: Source, targets: Sequence[Target], out: Path, means: Means) -> None:
        self.source = source
        self.targets = targets
        self.out = out
        self.work = out / WORK_FOLDER
        self.means = means
        # Those of a target that rounds by what is seen, if there is one: to others the text is all that counts.
        looking = sorted(targets, key=lambda target: not target.calibrates)
        self.settings = next((one.calibration for one in looking if one.calibration is not None), None)

    def run(self, restart: bool) -> list[Outcome]:
        means, log = self.means, self.means.log
        state = enter_all(self.out, [target.name for target in self.targets], restart=restart)
        tokens = None if self.settings is None else self._tokens(self.settings)
        places = means.workers.lending.devices
        belongs = [
            on_devices(target.fingerprints(self._own(target, tokens)), places) | named_share(target.share)
            for target in self.targets
        ]
        if state is FolderState.COMPLETE and not restart:
            return self._already_complete(belongs)
        if isinstance(self.source.checkpoint.path, HubFolder):
            log("scales that the format cannot hold are found when their layer is committed: weights come once")
        elif restart or state is not FolderState.UNFINISHED:
            # Now, and not when a layer's calibration is done; an unfinished run has done it.
            for target in self.targets:
                target.check(means)
        names = [key_of(target.name, name) for target in self.targets for name in target.names()]
        belong = merged({target.name: one for target, one in zip(self.targets, belongs, strict=True)})
        builds = [target.name for target in self.targets if target.name]
        needed = partial(self._needed, tokens)
        journal, resumed = begin(self.out, belong, names, needed, restart=restart, builds=builds)
        if resumed:
            log(f"resuming: {'; '.join(self._standing(target, journal) for target in self.targets)}")
        for target in self.targets:
            if target.share is not None:
                target.share.record(self.work)
        record = SourceRecord(self.source.checkpoint, journal, self._readings())
        record.require_unchanged(means.progress)
        with contextlib.ExitStack() as stack:
            meter = _Meter(means.progress, sum(target.weights for target in self.targets))
            for target, one in zip(self.targets, belongs, strict=True):
                if target.name:
                    with output_errors(target.folder):
                        target.folder.mkdir(exist_ok=True)
                    stack.enter_context(locked(target.folder))
                part, show = Part(record, target.name), meter.of(target.name)
                meter.writers.append(target.begin(part, self._own(target, tokens), one, means, show))
            _Work(self, meter, tokens, journal).run()
            record.require_unchanged(means.progress)
            outcomes = [writer.finish() for writer in meter.writers]
        if all(outcome.share is None for outcome in outcomes):
            remove_claimed(self.work)
        return outcomes

    def _tokens(self, settings: CalibrationSettings) -> TokenSet:
        tokens = build_tokens(settings, self.source.checkpoint.path)
        what = "calibration" if any(target.calibrates for target in self.targets) else "imatrix"
        self.means.log(f"{what}: {tokens.ids.numel():,} tokens of {tokens.source}")
        return tokens

    @staticmethod
    def _own(target: Target, tokens: TokenSet | None) -> TokenSet | None:
        return None if target.calibration is None else tokens

    def _already_complete(self, belongs: Sequence[Mapping[str, str]]) -> list[Outcome]:
        """Builds that are finished, with the companions that the source has now."""
        outcomes = []
        for target, one in zip(self.targets, belongs, strict=True):
            outcome = target.complete(one, self.means)
            if outcome.renewed:
                where = f"{target.name}: " if target.name else ""
                self.means.log(
                    f"{where}the source has other files beside its weights now: {', '.join(outcome.renewed)} are made "
                    "again"
                )
            outcomes.append(outcome)
        remove_claimed(self.work)
        return outcomes

    def _standing(self, target: Target, journal: Journal) -> str:
        said = target.standing(own(journal.units, target.name).keys())
        return f"{target.name}: {said}" if target.name else said

    def _needed(self, tokens: TokenSet | None, committed: Collection[str]) -> int:
        """Bytes of disk that a run still needs that has committed some units."""
        needed, looks = 0, False
        for target in self.targets:
            mine = own(dict.fromkeys(committed), target.name).keys()
            needed += target.needed(mine, self.work)
            looks = looks or target.looks_again(mine)
        if looks and tokens is not None and self.settings is not None:
            row = self.source.architecture.hidden_size * ACTIVATION_BYTES
            present = sum(file.stat().st_size for file in self.work.glob("*.bin"))
            needed += max(0, self.settings.streams * tokens.ids.numel() * row - present)
        return needed

    def _readings(self) -> dict[str, partial[str]]:
        """By the journal's keys what reads a unit's part of the source again, and gives the checksum of it."""
        return {
            key_of(target.name, key): partial(read)
            for target in self.targets
            for key, read in target.readings(self.means.workers).items()
        }


class _Meter:
    """Progress over all targets: weights that are behind, of all that they work through."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.total = total
        self.writers: list[Writer] = []

    def show(self, what: str) -> None:
        self.progress(what, sum(writer.done for writer in self.writers), self.total)

    def of(self, name: str) -> Callable[[str], None]:
        """The same for what one of several targets does."""
        return lambda what: self.show(key_of(name, what))


class _Work:
    """What a run does between its beginning and its end: every unit that is not committed yet."""

    def __init__(self, run: _Run, meter: _Meter, tokens: TokenSet | None, journal: Journal) -> None:
        self.source = run.source
        self.layers = run.source.architecture.layers
        self.work = run.work
        self.means = run.means
        self.settings = run.settings
        self.meter = meter
        self.writers = meter.writers
        pairs = zip(run.targets, meter.writers, strict=True)
        self.looking = [writer for target, writer in pairs if target.calibration is not None]
        self.tokens = tokens
        self.journal = journal
        self.calibration: Calibration | None = None

    def run(self) -> None:
        """The loop."""
        if any(writer.pending(layer) for writer in self.looking for layer in self.layers):
            self.calibration = self._begun()
        for writer in self.writers:
            writer.before_layers()
        for layer in self.layers:
            self._look(layer)
            for writer in self.writers:
                writer.after_layer(layer)
        if self.looking:
            remove_claimed(self.work, (".bin",))
        for writer in self.writers:
            writer.after_layers()
        for writer in self.writers:
            writer.settle()
        self.meter.show("finishing")

    def _look(self, layer: Layer) -> None:
        """Calibrate a layer, or compute its outputs anew, unless both are safe."""
        pending = [writer for writer in self.looking if writer.pending(layer)]
        if not pending and not any(writer.pending(one) for writer in self.looking for one in self._after(layer)):
            return
        assert self.calibration is not None
        if layer.index >= self.calibration.next_layer:
            self._pass(self.calibration, layer, pending)

    def _begun(self) -> Calibration:
        assert self.settings is not None
        assert self.tokens is not None
        return Calibration(self.source, self.settings, self.tokens, self.work, self.journal, self.means.workers)

    def _after(self, layer: Layer) -> Sequence[Layer]:
        return [one for one in self.layers if one.index > layer.index]

    def _pass(self, calibration: Calibration, layer: Layer, pending: Sequence[Writer]) -> None:
        """One layer for the writers that have none of it yet; for all again where its outputs depend on them."""
        what = self.looking[0].doing(layer) if len(self.writers) == 1 else f"layer-{layer.index:05d}"
        self.meter.show(what)
        if not pending:
            self.means.log(f"{what}: committed before its outputs were; computing them again")
        again = self.looking if calibration.propagates else []
        made = [writer.build(layer) for writer in pending or again]
        seen: dict[str, InputSquares] | None = {} if pending and None in made else None
        context = calibration.context(layer, [build for build in made if build is not None], seen)
        with contextlib.ExitStack() as stack:
            sinks = [stack.enter_context(writer.sink(layer)) for writer in pending]
            if context.builds:
                self._calibrate(calibration, context, dict(zip(made, sinks, strict=False)), what)
            else:
                for linear in calibration.linears(context):
                    for sink in sinks:
                        sink.see(linear)
                    self.meter.show(what)
            for build, sink in zip(made, sinks, strict=False):
                sink.commit(build, seen or {})
        # A layer's outputs may only count as made once the layer itself is safe.
        for writer in self.writers:
            writer.settle()
        calibration.advance(context)

    def _calibrate(
        self, calibration: Calibration, context: LayerContext, sinks: Mapping[LayerBuild | None, LayerSink], what: str
    ) -> None:
        """Give the sinks their modules as they come; without any the layer's outputs are all that is wanted."""

        def pack(made: tuple[LayerBuild, Finished]) -> tuple[LayerSink, PackedModule] | None:
            build, finished = made
            return (sinks[build], sinks[build].pack(finished)) if build in sinks else None

        with contextlib.closing(self.means.workers.map(pack, calibration.modules(context))) as packed:
            for one in packed:
                if one is not None:
                    sink, module = one
                    sink.add(module)
                self.meter.show(what)
