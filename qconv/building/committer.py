"""The commit of a unit: its shards written, read back, checked against the source, and only then given their names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from qconv.artifacts.build import scales_path
from qconv.artifacts.source import Source
from qconv.building.scale_range import require_storable
from qconv.building.stacking import Stacking
from qconv.checkpoint.header import TensorSpec, read_header
from qconv.checkpoint.reader import Tensors, map_tensor
from qconv.checkpoint.stream import TensorStream, same_bits
from qconv.checkpoint.writer import ShardRecord, ShardWriter, output_errors, sha256_of
from qconv.core.architecture import CacheScales, Linear
from qconv.core.settings import MATCHED
from qconv.core.workers import Workers
from qconv.errors import VerificationError
from qconv.folders.readings import combined
from qconv.methods import rounding_of
from qconv.models.folding import SCALE_SUFFIX, Folds
from qconv.planning.plan import BuildPlan, Item, Unit
from qconv.verification.weights import Comparison


@dataclass(frozen=True, slots=True)
class CommittedUnit:
    """A published unit.

    Attributes:
        files: Its files, named relative to the build.
        snr_db: Each quantized linear's signal to noise ratio in decibels; None for infinity.
        read: The checksum of the source's tensors of which it was made.
    """

    files: tuple[ShardRecord, ...]
    snr_db: dict[str, float | None]
    read: str


class UnitWriter:
    """Writes a unit's tensors in the order of the plan, shard after shard, and publishes all of them together.

    Use as a context manager: leaving it before :meth:`commit` removes every temporary file.
    """

    def __init__(self, out: Path, plan: BuildPlan, unit: Unit, staged: Callable[[str], Path]) -> None:
        """Begin a unit.

        Args:
            out: The build's folder.
            plan: Its plan.
            unit: Which unit.
            staged: Where a file is written before it gets its name.
        """
        self._out = out
        self._staged = staged
        self._plan = plan
        self._unit = unit
        self._stack = contextlib.ExitStack()
        self._writers: list[ShardWriter] = []
        self._stacking = Stacking(unit.stacks, staged(f"{unit.key}.stacks")) if unit.stacks else None
        if self._stacking is not None:
            self._stack.callback(self._stacking.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the unit's next tensor, given as consecutive blocks of its rows.

        One that goes into a stack waits until all of that are there.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        if self._stacking is not None and self._stacking.takes(name):
            self._stacking.add(name, blocks)
        else:
            self._append(name, blocks)

    def _append(self, name: str, blocks: Iterable[Tensor]) -> None:
        if not self._writers or self._writers[-1].complete:
            shard, specs = self._unit.shards[len(self._writers)]
            self._open(self._out / shard, specs)
        self._writers[-1].write_blocks(name, blocks)

    def commit(
        self,
        source: Source,
        scales: Mapping[str, Tensor],
        workers: Workers,
        announce: Callable[[Sequence[ShardRecord]], None],
    ) -> CommittedUnit:
        """Check what is on disk against the source and publish it.

        Args:
            source: The source model.
            scales: What was folded into the layer, float32 by producer's module name.
            workers: Threads for the comparison.
            announce: Told what the files are once they are checked and before they get their names.

        Raises:
            OutputError: the disk is full or a file cannot be written.
            VerificationError: a tensor on disk does not stand for the source's, or a file read back is not what was
                written.
        """
        if self._stacking is not None:
            for stack in self._unit.stacks:
                self._append(stack.name, self._stacking.blocks(stack))
            self._stacking.close()
        shards = list(self._writers)
        if len(shards) != len(self._unit.shards) or not all(writer.complete for writer in shards):
            raise ValueError(f"{self._unit.key}: not every tensor was written")
        if scales:
            self._write_scales(scales)
        with output_errors(self._out):
            files = [self._sealed(writer) for writer in self._writers]
            matched = self._plan.recipe.calibration.propagate == MATCHED
            comparison = Comparison(source.checkpoint, self._folds(scales), matched)
            snr_db, read = self._check(shards, comparison, workers)
            for writer in self._writers[len(shards) :]:
                writer.require_same(sha256_of(writer.temporary))
        announce(files)
        for writer in self._writers:
            writer.publish()
        return CommittedUnit(tuple(files), snr_db, read)

    def _sealed(self, writer: ShardWriter) -> ShardRecord:
        return replace(writer.seal(), name=str(writer.path.relative_to(self._out)))

    def _folds(self, scales: Mapping[str, Tensor]) -> Folds:
        layer = self._unit.layer
        return Folds.none() if layer is None else Folds.of(self._plan.architecture, layer, scales)

    def _open(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._writers.append(
            self._stack.enter_context(ShardWriter(path, specs, self._staged(path.name), self._plan.format.framework))
        )

    def _check(
        self, shards: Sequence[ShardWriter], comparison: Comparison, workers: Workers
    ) -> tuple[dict[str, float | None], str]:
        """Read the shards back from the disk, once, and compare every tensor with the source and every byte's checksum.

        This thread reads; the workers unpack and compare. Gives each quantized linear's signal to noise ratio, and the
        checksum of the source's tensors.
        """
        snr_db: dict[str, float | None] = {}
        checksums: list[tuple[str, int]] = []
        read, sizes = self._read_back(shards, comparison), (item.size for item in self._unit.items)
        with contextlib.closing(workers.map(partial(self._compare, comparison), read, sizes)) as compared:
            for name, snr, problem, found in compared:
                checksums += found
                if problem is not None:
                    raise VerificationError(
                        f"{self._unit.key}: what is on disk does not stand for the source: {problem}.",
                        hint="Nothing of this layer was kept. Check memory and disk; if they are sound, this is a bug.",
                    )
                if snr is not None:
                    # JSON knows no infinity: an exact weight (an expert of zeros) has no ratio.
                    snr_db[name] = round(snr, 3) if math.isfinite(snr) else None
        return snr_db, combined(checksums)

    def _read_back(self, shards: Sequence[ShardWriter], comparison: Comparison) -> Iterator[_ReadBack]:
        """The unit's items with their tensors; what must be a copy of the source is compared on the way.

        Items with tensors in stacks, which lie in all of these at once, come when every byte's checksum is known.
        """
        stacked = {spec.name for stack in self._unit.stacks for spec in stack.members}
        of_shard = {spec.name: writer for writer in shards for spec in writer.specs}
        writer, stream = shards[0], TensorStream(shards[0].temporary)
        later = {item.module.name for item in self._unit.items for spec in item.specs if spec.name in stacked}
        for item in self._unit.items:
            tensors, problem = {}, None
            for spec in item.specs:
                if spec.name in stacked:
                    continue
                if of_shard[spec.name] is not writer:
                    writer.require_same(stream.sha256())
                    writer = of_shard[spec.name]
                    stream = TensorStream(writer.temporary)
                if item.quantized or isinstance(item.module, CacheScales) or not comparison.is_copy(item.module):
                    tensors[spec.name] = stream.tensor(spec.name)
                elif not _is_copy(stream, spec.name, comparison.source):
                    problem = f"{spec.name}: differs from the source"
            if item.module.name not in later:
                yield _ReadBack(item, tensors, problem)
        for one in shards[shards.index(writer) :]:
            one.require_same(stream.sha256() if one is writer else sha256_of(one.temporary))
        entries = {name: one for shard in shards for name, one in read_header(shard.temporary).items()} if later else {}
        views = {one.name: one for stack in self._unit.stacks for one in stack.views(entries[stack.name])}
        for item in (item for item in self._unit.items if item.module.name in later):
            yield _ReadBack(item, {spec.name: map_tensor(views[spec.name]) for spec in item.specs}, None)

    def _compare(
        self, comparison: Comparison, read: _ReadBack
    ) -> tuple[str, float | None, str | None, list[tuple[str, int]]]:
        """A module's name, its signal to noise ratio if it is quantized, what is wrong or None, and what was read.

        Raises:
            RecipeError: the format cannot hold a weight's scales.
        """
        module, snr, problem = read.item.module, None, read.problem
        if isinstance(module, CacheScales):  # of no tensor of the source
            return module.name, None, problem, []
        for name, _ in module.tensors():
            found = None
            if read.item.quantized and isinstance(module, Linear) and name == module.weight:
                shape = (module.out_features, module.in_features)
                assert read.item.scheme is not None
                grid, method = read.item.scheme.grid, read.item.scheme.method
                weight = self._plan.format.unpack(module.name, shape, read.tensors.__getitem__, grid)
                snr, found = comparison.weight(module, weight, compensated=rounding_of(method) is not None)
                if found is not None:
                    require_storable(comparison.source, self._plan.architecture, module, weight)
            elif name in read.tensors:
                found = comparison.folded(module, name, read.tensors[name])
            problem = problem or found
        return module.name, snr, problem, [(name, comparison.source.crc32(name)) for name, _ in module.tensors()]

    def _write_scales(self, scales: Mapping[str, Tensor]) -> None:
        assert self._unit.layer is not None
        path = scales_path(self._out, self._unit.layer.index)
        with output_errors(path):
            path.parent.mkdir(exist_ok=True)
        specs = [TensorSpec(f"{name}{SCALE_SUFFIX}", scale.dtype, tuple(scale.shape)) for name, scale in scales.items()]
        self._open(path, specs)
        for spec, scale in zip(specs, scales.values(), strict=True):
            self._writers[-1].write(spec.name, scale)


@dataclass(frozen=True, slots=True)
class _ReadBack:
    """An item with the tensors that remain to be compared, and what was already found wrong."""

    item: Item
    tensors: dict[str, Tensor]
    problem: str | None


def _is_copy(stream: TensorStream, name: str, source: Tensors) -> bool:
    """Whether the stream's next tensor equals the source's bit for bit; read block by block."""
    scalar = not stream.begin(name).shape
    # Every block is read even after a difference: the stream must stay in step.
    return all([same_bits(stream.rows(1 if scalar else len(block)), block) for block in source.blocks(name)])
