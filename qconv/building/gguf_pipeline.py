"""GGUF straight to the final type: one pass over the source, file by file, resumable at every file.

A file of the set is what is committed: written under a temporary name, read back from disk, and only then given its
name and journalled. Every block of rows is decoded again as it is encoded, a few rows of it, so that an encoder that
does not stand for its weights is found before its file is published; ``verify`` decodes all of them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qconv import __version__, native
from qconv.artifacts.gguf_tensors import Importance, importance_of, uniform, weighted_blocks
from qconv.artifacts.source import Source
from qconv.building.completion import already_complete
from qconv.building.gguf_blocks import Block, Encoded, Ready, block_checksum, encoded_block
from qconv.building.gguf_report import Coverage, model_card
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import Outcome, begin, enter, publish, require_apart, require_published
from qconv.calibration.corpus import TokenSet, build_tokens
from qconv.calibration.imatrix import (
    IMATRIX_NAME,
    blocks_key,
    collect_imatrix,
    layer_readings,
    scratch_bytes,
    sums_key,
)
from qconv.checkpoint.writer import output_errors, sha256_of
from qconv.core.qtensor import SquaredError
from qconv.core.settings import TextSettings
from qconv.errors import UsageError, VerificationError
from qconv.executors.threads import Workers
from qconv.folders.journal import WORK_FOLDER, Journal, locked
from qconv.folders.ownership import remove_claimed
from qconv.folders.readings import READ, SourceRecord, combined
from qconv.folders.state import CHECKSUMS_NAME, REPORT_NAME, FolderState
from qconv.formats.gguf.container import FileLayout, GgufWriter
from qconv.formats.gguf.imatrix import Imatrix, merge, read_imatrix
from qconv.formats.gguf.mixture import fallbacks, needs_importance
from qconv.formats.gguf.names import GgufTensor
from qconv.grids.ggml import compiled
from qconv.planning.gguf_plan import GgufPlan, plan_gguf
from qconv.planning.gguf_recipe import GgufRecipe, require_matches
from qconv.verification.blocks import floor_db
from qconv.verification.checksums import render_checksums
from qconv.verification.outcome import Progress

if TYPE_CHECKING:
    from qconv.building.gguf_layers import CalibratedLayers

Log = Callable[[str], None]


def quantize_gguf(
    model: Path,
    out: Path,
    recipe: GgufRecipe,
    *,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Write a model as GGUF, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder of the files; made if absent.
        recipe: What to build.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts, and blocks of rows, worked on at once; the bytes do not depend on it.
        progress: Told what is at work, the weights done and the weights in all, of collecting and then of encoding.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the source or an imatrix is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    require_apart(model, out)
    source = Source.open(model)
    source.require_publishable()
    for notice in source.notices():
        log(f"source: {notice}")
    given = [read_imatrix(Path(file)) for file in recipe.imatrix.files]
    plan, text = _decide(source, recipe, f"{source.name}-{recipe.type}")
    if given:
        _require_coverage(plan, recipe, merge(given), complete=text is None)
    if text is not None and recipe.calibration is None and not recipe.is_calibrated:
        log(f"gguf:{recipe.type} needs an imatrix: one is collected")
    replaced = fallbacks(plan.wanted, plan.types)
    if replaced is not None:
        log(f"types: {replaced}")
    native.load(compiled.LIBRARY)  # its warning, if there is one, comes before the progress bar
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), Workers(threads) as workers:
        return _Run(source, plan, recipe, text, given, out, workers, progress, log).run(restart)


def _decide(source: Source, recipe: GgufRecipe, name: str) -> tuple[GgufPlan, TextSettings | None]:
    """The plan, and the text that an imatrix is collected on: the recipe's, or any where a type needs one."""

    def planned(importance: bool) -> GgufPlan:
        return plan_gguf(
            source,
            recipe.type,
            name,
            importance=importance,
            overrides=recipe.overrides,
            max_split_size=recipe.output.max_shard_size,
        )

    text: TextSettings | None = recipe.calibrated().calibration if recipe.is_calibrated else recipe.calibration
    plan = planned(text is not None or bool(recipe.imatrix.files))
    require_matches(recipe, plan.tensors.values())
    if text is None and not recipe.imatrix.files and any(_needing(plan)):
        text = TextSettings()
        plan = planned(True)
    return plan, text


def _needing(plan: GgufPlan) -> Iterator[GgufTensor]:
    """The tensors that are useless without an importance."""
    for tensor in plan.tensors.values():
        if needs_importance(plan.file_type, tensor, plan.types[tensor.name]):
            yield tensor


def _require_coverage(plan: GgufPlan, recipe: GgufRecipe, matrix: Imatrix, *, complete: bool) -> Coverage:
    """How far a matrix covers the model; if ``complete``, it must cover all that needs it.

    Raises:
        UsageError: it is of another model, or lacks what a type needs.
    """
    coverage = Coverage.of(matrix, plan.tensors.values(), recipe.imatrix.shrinkage_tokens)
    for tensor in _needing(plan) if complete else ():
        entry = matrix.entry(tensor.name, len(tensor.sources), tensor.columns)
        if entry is None or not bool(entry.seen.any()):
            raise UsageError(
                f"gguf:{plan.file_type}: {tensor.name} becomes {plan.types[tensor.name].name}, which is useless "
                "without an importance, and the imatrix has none for it.",
                hint="Give --calib to collect one, or another type for this tensor.",
            )
    return coverage


class _Run:
    def __init__(
        self,
        source: Source,
        plan: GgufPlan,
        recipe: GgufRecipe,
        text: TextSettings | None,
        given: Sequence[Imatrix],
        out: Path,
        workers: Workers,
        progress: Progress,
        log: Log,
    ) -> None:
        self.source = source
        self.plan = plan
        self.recipe = recipe
        self.text = text
        self.given = given
        self.importance: Imatrix | None = None
        self.coverage: Coverage | None = None
        self.columns: Importance = uniform
        self.layers: CalibratedLayers | None = None
        self.weights = sum(tensor.numel for tensor in plan.tensors.values())
        self.out = out
        self.work = out / WORK_FOLDER
        self.workers = workers
        self.progress = progress
        self.log = log
        self.done = 0

    def run(self, restart: bool) -> Outcome:
        state = enter(self.out)
        tokens = None if self.text is None else build_tokens(self.text, self.source.checkpoint.path)
        belongs = self._fingerprints(tokens)
        if state is FolderState.COMPLETE and not restart:
            return already_complete(self.out, belongs, self._weight_files(), self.workers, self.progress)
        names = [*self._weight_files(), REPORT_NAME, "README.md"]
        journal, resumed = begin(self.out, belongs, names, partial(self._needed, tokens), restart=restart)
        if resumed:
            committed = sum(file.name in journal.units for file in self.plan.files)
            self.log(f"resuming: {committed} of {len(self.plan.files)} files are committed")
        record = SourceRecord(self.source.checkpoint, journal, self._readings(tokens))
        record.require_unchanged(self.progress)
        if self.recipe.is_calibrated and tokens is not None:
            self._calibrated_files(tokens, journal, record)
        else:
            self._get_importance(tokens, journal, record)
            for file in self.plan.files:
                self._file(file, journal, record)
        record.require_unchanged(self.progress)
        return Outcome(self.out, self._finish(journal), already_complete=False)

    def _fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        files = [sha256_of(Path(file)) for file in self.recipe.imatrix.files]
        # Encoders add up in an order of their own.
        return fingerprints(self.source, self.recipe.digest(), tokens, files, adds_up=False, companions="embedded")

    def _weight_files(self) -> list[str]:
        """The importance matrix, if one is collected, and the files of the model."""
        return [*([] if self.text is None else [IMATRIX_NAME]), *(file.name for file in self.plan.files)]

    def _needed(self, tokens: TokenSet | None, committed: Collection[str]) -> int:
        """Bytes of disk that a run still needs that has committed some files."""
        needed = sum(file.size for file in self.plan.files if file.name not in committed)
        if tokens is not None and IMATRIX_NAME not in committed:
            streams = self.recipe.calibrated().calibration.streams if self.recipe.is_calibrated else 1
            needed += scratch_bytes(self.source.architecture, tokens, self.work, streams)
        return needed

    def _readings(self, tokens: TokenSet | None) -> dict[str, Callable[[], str]]:
        """By the journal's keys what reads again that of which a file was made, and gives its checksum."""

        def read(file: FileLayout) -> str:
            checksums = self.workers.map(block_checksum, self._blocks(file, uniform))
            return combined((str(number), one) for number, one in enumerate(checksums))

        key = blocks_key if self.recipe.is_calibrated else sums_key
        collected = {} if tokens is None else layer_readings(self.source, self.workers, key)
        return collected | {file.name: partial(read, file) for file in self.plan.files}

    def _calibrated_files(self, tokens: TokenSet, journal: Journal, record: SourceRecord) -> None:
        """Each file once its layers are calibrated; the importance matrix that this gives too."""
        # transformers takes seconds to import; rounding does without.
        from qconv.building.gguf_layers import CalibratedLayers

        self.log(f"calibration: {tokens.ids.numel():,} tokens of {tokens.source}")
        self.layers = CalibratedLayers(
            self.source,
            self.plan,
            self.recipe.calibrated(),
            tokens,
            self.work,
            record,
            self.workers,
            self.progress,
            self.log,
        )
        for number, file in enumerate(self.plan.files):
            self.layers.prepare(file)
            self._file(file, journal, record)
            self.layers.release(self.plan.files[number + 1 :])
        self.layers.finish()
        self._take_importance([read_imatrix(self.layers.merge(self.out))])

    def _get_importance(self, tokens: TokenSet | None, journal: Journal, record: SourceRecord) -> None:
        """Collect an importance matrix where one is asked for, and put it together with those that were given."""
        matrices = list(self.given)
        if tokens is not None:
            self.log(f"imatrix: {tokens.ids.numel():,} tokens of {tokens.source}")
            path = collect_imatrix(
                self.source, tokens, self.out, self.work, journal, record, self.workers, self.progress
            )
            require_published(path, journal.units[IMATRIX_NAME]["size"])
            matrices.append(read_imatrix(path))
        if matrices:
            self._take_importance(matrices)

    def _take_importance(self, matrices: Sequence[Imatrix]) -> None:
        self.importance = matrices[0] if len(matrices) == 1 else merge(matrices)
        settings = self.recipe.imatrix
        self.columns = importance_of(self.importance, float(settings.shrinkage_tokens), settings.exponent)
        self.coverage = _require_coverage(self.plan, self.recipe, self.importance, complete=True)
        self.log(f"imatrix: {self.coverage.sentence()}")

    def _file(self, file: FileLayout, journal: Journal, record: SourceRecord) -> None:
        weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
        self.progress(file.name, self.done, self.weights)
        if file.name in journal.units:
            require_published(self.out / file.name, journal.units[file.name]["size"])
            self.done += weights
            return
        with GgufWriter(self.out, file, journal.staged(file.name)) as writer:
            snr_db, read = self._write(file, writer)
            written = writer.finish()
            journal.announce([written])
            writer.publish()
        record.commit(file.name, {"size": written.size, "sha256": written.sha256, "snr_db": snr_db, READ: read})

    def _write(self, file: FileLayout, writer: GgufWriter) -> tuple[dict[str, float | None], str]:
        """Encode and write a file's tensors.

        Gives each one's signal to noise on the sampled rows, in decibels, and the checksum of what was read.
        """
        snr_db: dict[str, float | None] = {}
        checksums: list[int] = []
        encoded = self.workers.map(encoded_block, self._blocks(file, self.columns))
        for name, group in itertools.groupby(encoded, key=lambda one: one.name):
            errors: list[SquaredError] = []
            writer.write_blocks(name, self._counted(group, errors, checksums))
            snr = sum(errors, SquaredError()).snr_db
            weighted, matched = self.importance is not None or self.layers is not None, self.recipe.is_matched
            floor = floor_db(self.plan.types[name], weighted, matched)
            if not snr >= floor:
                raise VerificationError(
                    f"{file.name}: {name} does not stand for the source: signal to noise {snr:.1f} dB, below "
                    f"{floor:.1f}.",
                    hint="Nothing of this file was kept. If memory is sound, this is a bug.",
                )
            snr_db[name] = round(snr, 3) if math.isfinite(snr) else None
        return snr_db, combined((str(number), one) for number, one in enumerate(checksums))

    def _counted(self, group: Iterator[Encoded], errors: list[SquaredError], checksums: list[int]) -> Iterator[Tensor]:
        for one in group:
            errors.append(one.error)
            checksums.append(one.checksum)
            yield one.data
            self.done += one.weights
            self.progress(one.name, self.done, self.weights)

    def _blocks(self, file: FileLayout, columns: Importance) -> Iterator[Block]:
        for info in file.tensors:
            tensor, type = self.plan.tensors[info.name], self.plan.types[info.name]
            importance = columns if tensor.quantizable else uniform
            ready = Ready.of(self.layers, tensor)
            for part, rows, weights in weighted_blocks(self.source, tensor, importance):
                yield Block(tensor.name, type, rows, weights, None if ready is None else ready.take(part, len(rows)))

    def _finish(self, journal: Journal) -> dict[str, Any]:
        plan = self.plan
        report = {
            "qconv": __version__,
            "source": self.source.name,
            "format": f"gguf:{plan.file_type}",
            "fingerprints": lasting(journal.fingerprints),
            "recipe": self.recipe.model_dump(mode="json"),
            "method": self.recipe.rounding or "rtn",
            "imatrix": self._imatrix_values(),
            "parameters": self.weights,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "files": [file.name for file in plan.files],
            "layers": [] if self.layers is None else self.layers.report(),
            "tensors": {
                name: {"type": plan.types[name].name, **self._replaced(name), "snr_db": snr}
                for file in plan.files
                for name, snr in journal.units[file.name]["snr_db"].items()
            },
        }
        small = {REPORT_NAME: (json.dumps(report, indent=2) + "\n").encode(), "README.md": model_card(report).encode()}
        publish(self.out, journal, small)
        names = sorted({*small, *self._weight_files()})
        sums = dict(zip(names, self.workers.map(lambda name: sha256_of(self.out / name), names), strict=True))
        for name in self._weight_files():
            if sums.get(name) != journal.units[name]["sha256"]:
                raise VerificationError(
                    f"{self.out / name}: changed since it was committed.", hint="Start over with --restart."
                )
        publish(self.out, journal, {CHECKSUMS_NAME: render_checksums(sums).encode()})
        remove_claimed(self.work)
        return report

    def _replaced(self, name: str) -> dict[str, str]:
        """The type that a tensor was to have, where it has another."""
        wanted = self.plan.wanted[name]
        return {} if wanted == self.plan.types[name] else {"wanted": wanted.name}

    def _imatrix_values(self) -> dict[str, Any] | None:
        """What the report says of the importance matrix."""
        if self.importance is None or self.coverage is None:
            return None
        return {
            "datasets": list(self.importance.datasets),
            "file": None if self.text is None else IMATRIX_NAME,
            "coverage": self.coverage.values(),
        }
