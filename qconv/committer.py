"""The commit of a unit: its shards written, read back, checked against the source, and only then given their names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from qconv.build import scales_path
from qconv.checkpoint.header import TensorEntry, TensorSpec, read_header
from qconv.checkpoint.reader import Tensors
from qconv.checkpoint.writer import ShardRecord, ShardWriter, output_errors
from qconv.errors import VerificationError
from qconv.folding import SCALE_SUFFIX, Folds
from qconv.models.base import Linear
from qconv.parallel import Workers
from qconv.plan import BuildPlan, Unit
from qconv.qtensor import QTensor
from qconv.source import Source
from qconv.verify import Comparison


@dataclass(frozen=True, slots=True)
class CommittedUnit:
    """A published unit: its files, relative to the build, and each quantized linear's signal to noise in decibels."""

    files: tuple[ShardRecord, ...]
    snr_db: dict[str, float | None]


class UnitWriter:
    """Writes a unit's tensors in the order of the plan, shard after shard, and publishes all of them together.

    Use as a context manager: leaving it before :meth:`commit` removes every temporary file.
    """

    def __init__(self, out: Path, plan: BuildPlan, unit: Unit) -> None:
        self._out = out
        self._plan = plan
        self._unit = unit
        self._stack = contextlib.ExitStack()
        self._writers: list[ShardWriter] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the unit's next tensor, given as consecutive blocks of its rows.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        if not self._writers or self._writers[-1].complete:
            shard, specs = self._unit.shards[len(self._writers)]
            self._open(self._out / shard, specs)
        self._writers[-1].write_blocks(name, blocks)

    def commit(self, source: Source, scales: Mapping[str, Tensor], workers: Workers) -> CommittedUnit:
        """Check what is on disk against the source and publish it.

        Args:
            source: The source model.
            scales: What was folded into the layer, float32 by producer's module name.
            workers: Threads for the comparison.

        Raises:
            OutputError: the disk is full or a file cannot be written.
            VerificationError: a tensor on disk does not stand for the source's, or a file read back is not what was
                written.
        """
        shards = list(self._writers)
        if len(shards) != len(self._unit.shards) or not all(writer.complete for writer in shards):
            raise ValueError(f"{self._unit.key}: not every tensor was written")
        if scales:
            self._write_scales(scales)
        for writer in self._writers:
            writer.flush()
        # The disk is waited for beside the comparison; that what it stored is what was compared, checksums tell.
        with ThreadPoolExecutor(1, thread_name_prefix="finish") as background:
            records = background.submit(lambda: [writer.finish() for writer in self._writers])
            snr_db = self._check(shards, source, scales, workers)
            finished = records.result()
        for writer in self._writers:
            writer.publish()
        files = [
            replace(record, name=str(writer.path.relative_to(self._out)))
            for record, writer in zip(finished, self._writers, strict=True)
        ]
        return CommittedUnit(tuple(files), snr_db)

    def _open(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._writers.append(self._stack.enter_context(ShardWriter(path, specs)))

    def _check(
        self, shards: Sequence[ShardWriter], source: Source, scales: Mapping[str, Tensor], workers: Workers
    ) -> dict[str, float | None]:
        plan, layer = self._plan, self._unit.layer
        entries: dict[str, TensorEntry] = {}
        for writer in shards:
            entries |= read_header(writer.temporary)

        written = Tensors(entries)

        def unpack(linear: Linear) -> QTensor:
            return plan.format.unpack(linear.name, (linear.out_features, linear.in_features), written.read, plan.grid)

        folds = Folds.none() if layer is None else Folds.of(plan.architecture, layer, scales)
        comparison = Comparison(unpack, written, source.checkpoint, folds)
        items = [(item.module, item.quantized) for item in self._unit.items]
        snr_db: dict[str, float | None] = {}
        for name, snr, problem in workers.map(comparison.check, items):
            if problem is not None:
                raise VerificationError(
                    f"{self._unit.key}: what is on disk does not stand for the source: {problem}.",
                    hint="Nothing of this layer was kept. Check memory and disk; if they are sound, this is a bug.",
                )
            if snr is not None:
                # JSON knows no infinity: an exact weight (an expert of zeros) has no ratio.
                snr_db[name] = round(snr, 3) if math.isfinite(snr) else None
        return snr_db

    def _write_scales(self, scales: Mapping[str, Tensor]) -> None:
        assert self._unit.layer is not None
        path = scales_path(self._out, self._unit.layer.index)
        with output_errors(path):
            path.parent.mkdir(exist_ok=True)
        specs = [TensorSpec(f"{name}{SCALE_SUFFIX}", scale.dtype, tuple(scale.shape)) for name, scale in scales.items()]
        self._open(path, specs)
        for spec, scale in zip(specs, scales.values(), strict=True):
            self._writers[-1].write(spec.name, scale)
