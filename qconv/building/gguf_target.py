"""A GGUF build straight to the final type: file by file, each resumable.

A file of the set is what is committed: written under a temporary name, read back from disk, and only then given its
name and journalled. Every block of rows is decoded again as it is encoded, a few rows of it, so that an encoder that
does not stand for its weights is found before its file is published; ``verify`` decodes all of them. A file is written
as soon as the layers that it holds are calibrated; without calibration before any layer, or where it needs their
importance after all of them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qconv import __version__
from qconv.artifacts.gguf_tensors import Importance, importance_of, uniform, weighted_blocks
from qconv.artifacts.source import Source
from qconv.boundary.content import FOLDED_SCALES
from qconv.building.chosen import Chosen, allocation_values
from qconv.building.collecting import Collecting, unquantized
from qconv.building.completion import already_complete
from qconv.building.gguf_blocks import Block, Encoded, Ready, block_checksum, encoded_block, require_standing
from qconv.building.gguf_report import (
    Coverage,
    importance_values,
    left_out_values,
    model_card,
    plan_values,
    require_coverage,
    tensor_values,
)
from qconv.building.gguf_stages import StagedLayers
from qconv.building.inputs import fingerprints, lasting
from qconv.building.output import Outcome, complete_files, require_published
from qconv.building.share import Share
from qconv.building.target import LayerSink, Means
from qconv.calibration.corpus import TokenSet
from qconv.calibration.imatrix import (
    IMATRIX_NAME,
    LayerSums,
    blocks_key,
    layer_readings,
    layer_weights,
    sums_bytes,
    sums_key,
)
from qconv.calibration.layer import LayerBuild
from qconv.checkpoint.writer import sha256_of
from qconv.core.architecture import Layer
from qconv.core.qtensor import SquaredError
from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.core.workers import Workers
from qconv.folders.part import Part
from qconv.folders.readings import READ, combined
from qconv.folders.state import REPORT_NAME
from qconv.formats.gguf.container import FileLayout, GgufWriter
from qconv.formats.gguf.imatrix import Imatrix, merge
from qconv.formats.gguf.names import GgufTensor
from qconv.planning.costs import Demand, demand_of_gguf, demand_of_passing
from qconv.planning.engines import engine_values, judged_as_it_is
from qconv.planning.gguf_plan import GgufPlan
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.verification.blocks import floor_db


@dataclass(frozen=True, slots=True)
class GgufTarget:
    """See :class:`qconv.building.target.Target`.

    Attributes:
        text: What layers are looked at on, if they are.
        given: Importance matrices that exist already.
        chosen: How the recipe's types were chosen, if they were.
        share: The files that are made, if those are not all.
    """

    source: Source
    plan: GgufPlan
    recipe: GgufRecipe
    text: TextSettings | None
    given: tuple[Imatrix, ...]
    folder: Path
    name: str = ""
    chosen: Chosen | None = None
    share: Share | None = None

    @property
    def made(self) -> list[FileLayout]:
        """The files of the model that are made."""
        return [file for file in self.plan.files if self.share is None or file.name in self.share.keys]

    @property
    def weights(self) -> int:
        """The weights of all tensors of its files, and those of the layers that are looked at before."""
        layers = () if self.text is None else self.source.architecture.layers
        tensors = (self.plan.tensors[info.name] for file in self.made for info in file.tensors)
        return sum(tensor.numel for tensor in tensors) + sum(map(layer_weights, layers))

    @property
    def calibrates(self) -> bool:
        """Whether layers are rounded by what is seen."""
        return self.recipe.is_calibrated

    @property
    def folds(self) -> bool:
        """Whether scales are folded into layers."""
        return self.recipe.searches_scales

    @property
    def calibration(self) -> CalibrationSettings | None:
        """How layers are looked at, if they are: unquantized ones, where an importance matrix is all that is asked."""
        if self.calibrates:
            return self.recipe.calibrated().calibration
        return None if self.text is None else unquantized(self.text)

    @property
    def demand(self) -> Demand:
        """Of layers that are calibrated or passed, and of blocks."""
        if self.calibrates or self.text is None:
            return demand_of_gguf(self.source.architecture, self.recipe)
        return demand_of_passing(self.source.architecture)

    def allowance(self, workers: int) -> float:
        """No bound: blocks of rows are small."""
        return math.inf

    def files(self) -> list[str]:
        """The importance matrix and the folded scales, if there are any, and the files of the model."""
        beside = [name for name, made in ((IMATRIX_NAME, self.text is not None), (FOLDED_SCALES, self.folds)) if made]
        return [*beside, *(file.name for file in self.made)]

    def names(self) -> list[str]:
        """Every file that gets a name."""
        return [*self.files(), *((REPORT_NAME, "README.md") if self.share is None else ())]

    def fingerprints(self, tokens: TokenSet | None) -> dict[str, str]:
        """What the build belongs to."""
        files = [sha256_of(Path(file)) for file in self.recipe.imatrix.files]
        # Encoders add up in an order of their own.
        found = fingerprints(self.source, self.recipe.digest(), tokens, files, adds_up=False, companions="embedded")
        return found if self.chosen is None else self.chosen.instead(found)

    def check(self, means: Means) -> None:
        """Nothing: blocks hold scales of every size."""

    def needed(self, committed: Collection[str], work: Path) -> int:
        """Bytes of the files that are not committed, and of what is seen of the layers."""
        needed = sum(file.size for file in self.made if file.name not in committed)
        if self.looks_again(committed):
            present = sum(file.stat().st_size for file in work.glob(f"{self.name}*.gguf"))
            needed += max(0, sums_bytes(self.source.architecture) - present)
        return needed

    def looks_again(self, committed: Collection[str]) -> bool:
        """Whether the importance matrix, which is made last, is not there."""
        return self.text is not None and IMATRIX_NAME not in committed

    def readings(self, workers: Workers) -> dict[str, Callable[[], str]]:
        """By the journal's keys what reads again that of which a file was made."""

        def read(file: FileLayout) -> str:
            checksums = workers.map(block_checksum, self.blocks(file, uniform, None))
            return combined((str(number), one) for number, one in enumerate(checksums))

        key = blocks_key if self.calibrates else sums_key
        collected = {} if self.text is None else layer_readings(self.source, workers, key)
        return collected | {file.name: partial(read, file) for file in self.plan.files}

    def standing(self, committed: Collection[str]) -> str:
        """How many files are committed."""
        there = sum(file.name in committed for file in self.made)
        return f"{there} of {len(self.made)} files are committed"

    def complete(self, belongs: Mapping[str, str], means: Means) -> Outcome:
        """The finished build."""
        return already_complete(self.folder, belongs, self.files(), means.workers, means.progress)

    def begin(
        self,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> GgufBuilder:
        """Go to work."""
        return GgufBuilder(self, part, tokens, belongs, means, show)

    def ready(self, tensor: GgufTensor, staged: StagedLayers | None) -> Ready | None:
        """A tensor's blocks, where they are made already."""
        return Ready.of(staged, tensor)

    def blocks(self, file: FileLayout, columns: Importance, staged: StagedLayers | None) -> Iterator[Block]:
        """A file's blocks of rows in their order.

        Args:
            file: The file.
            columns: The importance of their columns.
            staged: Has the blocks that calibration has made, if it has.
        """
        folded = self.source if staged is None else staged.weights()
        for info in file.tensors:
            tensor, type = self.plan.tensors[info.name], self.plan.types[info.name]
            importance = columns if tensor.quantizable else uniform
            ready = self.ready(tensor, staged)
            stored = weighted_blocks(self.source, tensor, importance)
            wanted = stored if staged is None or not self.folds else weighted_blocks(folded, tensor, importance)
            for part, rows, weights in wanted:
                source = rows if wanted is stored else next(stored)[1]
                blocks = None if ready is None else ready.take(part, len(rows))
                yield Block(tensor.name, type, rows, source, weights, blocks, ready.scale(part) if ready else 1.0)


class GgufBuilder:
    """See :class:`qconv.building.target.Writer`."""

    def __init__(
        self,
        target: GgufTarget,
        part: Part,
        tokens: TokenSet | None,
        belongs: Mapping[str, str],
        means: Means,
        show: Callable[[str], None],
    ) -> None:
        """See :meth:`qconv.building.target.Target.begin`."""
        self.target, self.plan, self.out = target, target.plan, target.folder
        self.part = part
        self.belongs = belongs
        self.means = means
        self.show = show
        self.importance: Imatrix | None = None
        self.coverage: Coverage | None = None
        self.columns: Importance = uniform
        self.written = 0
        """Weights of the files that are behind."""
        self.left = target.made
        self.sums: LayerSums | None = None
        self.staged: StagedLayers | None = None
        self.collecting: Collecting | None = None
        if tokens is not None:
            self.sums = LayerSums(target.source, tokens, part)
            if target.calibrates:
                self.staged = StagedLayers(target.source, self.plan, target.recipe, self.sums, part, means.workers)
            else:
                self.collecting = Collecting(target.source, self.sums, part, means.workers)

    @property
    def layers(self) -> StagedLayers | Collecting:
        """What is done to layers that are looked at."""
        found = self.staged or self.collecting
        assert found is not None
        return found

    @property
    def done(self) -> int:
        """Weights that are behind."""
        return self.written + (self.layers.done if self.sums is not None else 0)

    def pending(self, layer: Layer) -> bool:
        """Whether nothing of the layer is kept yet."""
        return self.layers.pending(layer)

    def doing(self, layer: Layer) -> str:
        """For progress."""
        return self.layers.doing(layer)

    def build(self, layer: Layer) -> LayerBuild | None:
        """How the layer's linears are rounded, if they are calibrated."""
        return None if self.staged is None else self.staged.build(layer)

    def sink(self, layer: Layer) -> LayerSink:
        """What takes the layer."""
        return self.layers.sink(layer)

    def before_layers(self) -> None:
        """All files, where no layer is looked at; else those that hold no calibrated one."""
        if self.sums is None and self.target.given:
            self._take_importance(self.target.given)
        self._write_ready()

    def after_layer(self, layer: Layer) -> None:
        """The files that hold no later layer."""
        if self.sums is not None:
            self.layers.pass_by(layer)
        self._write_ready()

    def after_layers(self) -> None:
        """The importance matrix of what was seen, and the files that needed it; the scales that were folded."""
        if self.staged is not None and self.staged.folds is not None:
            self.staged.folds.merge(self.out, self.staged.scales())
            require_published(self.out / FOLDED_SCALES, self.part.units[FOLDED_SCALES]["size"])
        if self.sums is not None:
            matrix = self.sums.merge(self.out)
            require_published(self.out / IMATRIX_NAME, self.part.units[IMATRIX_NAME]["size"])
            self._take_importance([*self.target.given, matrix] if self.staged is None else [matrix])
        self._write_ready()

    def settle(self) -> None:
        """Nothing is handed over that is not safe."""

    def _take_importance(self, matrices: Sequence[Imatrix]) -> None:
        self.importance = matrices[0] if len(matrices) == 1 else merge(matrices)
        settings = self.target.recipe.imatrix
        self.columns = importance_of(self.importance, float(settings.shrinkage_tokens), settings.exponent)
        self.coverage = require_coverage(self.plan, settings.shrinkage_tokens, self.importance, complete=True)
        self.means.log(f"imatrix: {self.coverage.sentence()}")

    def _write_ready(self) -> None:
        """Write the files, in their order, as far as what they need is there."""
        while self.left and self._is_ready(self.left[0]):
            if self.staged is not None:
                self.staged.open(self.left[0])
            self._file(self.left.pop(0))
            if self.staged is not None:
                self.staged.release(self.left)

    def _is_ready(self, file: FileLayout) -> bool:
        if self.staged is not None:
            return self.staged.ready(file)
        return self.collecting is None or self.importance is not None

    def _file(self, file: FileLayout) -> None:
        self.show(file.name)
        committed = self.part.units.get(file.name)
        if committed is not None:
            require_published(self.out / file.name, committed["size"])
            self.written += sum(math.prod(tensor.shape) for tensor in file.tensors)
            return
        with GgufWriter(self.out, file, self.part.staged(file.name)) as writer:
            snr_db, read = self._write(file, writer)
            written = writer.finish()
            self.part.announce([written])
            writer.publish()
        self.part.commit(file.name, {"size": written.size, "sha256": written.sha256, "snr_db": snr_db, READ: read})

    def _write(self, file: FileLayout, writer: GgufWriter) -> tuple[dict[str, float | None], str]:
        """Encode and write a file's tensors.

        Gives each one's signal to noise on the sampled rows, in decibels, and the checksum of what was read.
        """
        snr_db: dict[str, float | None] = {}
        checksums: list[int] = []
        encoded = self.means.workers.map(encoded_block, self.target.blocks(file, self.columns, self.staged))
        for name, group in itertools.groupby(encoded, key=lambda one: one.name):
            errors: list[SquaredError] = []
            writer.write_blocks(name, self._counted(group, errors, checksums))
            snr = sum(errors, SquaredError()).snr_db
            weighted, matched = self.importance is not None or self.staged is not None, self.target.recipe.is_matched
            require_standing(f"{file.name}: {name}", snr, floor_db(self.plan.types[name], weighted, matched))
            snr_db[name] = round(snr, 3) if math.isfinite(snr) else None
        return snr_db, combined((str(number), one) for number, one in enumerate(checksums))

    def _counted(self, group: Iterator[Encoded], errors: list[SquaredError], checksums: list[int]) -> Iterator[Tensor]:
        for one in group:
            errors.append(one.error)
            checksums.append(one.checksum)
            yield one.data
            self.written += one.weights
            self.show(one.name)

    def finish(self) -> Outcome:
        """Complete the folder."""
        if self.target.share is not None:
            return Outcome(self.out, {}, already_complete=False, share=self.target.share)
        report, files = self._report(), self.target.files()
        small = {REPORT_NAME: (json.dumps(report, indent=2) + "\n").encode(), "README.md": model_card(report).encode()}
        digest = partial(self.means.workers.map, lambda name: sha256_of(self.out / name))
        complete_files(self.out, self.part, small, files, digest)
        return Outcome(self.out, report, already_complete=False)

    def _report(self) -> dict[str, Any]:
        source, recipe, units, text = self.target.source, self.target.recipe, self.part.units, self.target.text
        importance = None
        if self.importance is not None and self.coverage is not None:
            importance = importance_values(self.importance, self.coverage, None if text is None else IMATRIX_NAME)
            importance["coverage"] |= {} if self.staged is None else self.staged.corpora(recipe)
        return {
            "qconv": __version__,
            "source": source.name,
            "format": f"gguf:{self.plan.file_type}",
            "fingerprints": lasting(self.belongs),
            "recipe": recipe.model_dump(mode="json"),
            "method": "+".join(recipe.method_steps),
            **allocation_values(self.target.chosen),
            "imatrix": importance,
            **plan_values(self.plan),
            **left_out_values(source.verbatim),
            "engines": engine_values(judged_as_it_is(self.out / self.plan.files[0].name)),
            "layers": [] if self.staged is None else self.staged.report(),
            "tensors": tensor_values(self.plan, {file.name: units[file.name]["snr_db"] for file in self.plan.files}),
        }
