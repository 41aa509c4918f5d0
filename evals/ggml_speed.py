"""Speed and error of qconv's encoders of ggml block types beside ggml's own, in one process and on the same weights.

Both work through the same blocks of rows on the same number of threads, in turns of about the same length, and the best
turn of each counts: what else the machine does can only make a turn longer. Beside wall time the processor time of one
thread is compared, which hardly depends on other processes. Weights are normal, importance spans a few orders of
magnitude as an imatrix does. The error is ``sum importance * (w - w')^2`` (importance 1 without an imatrix), as the
gguf package decodes the bytes; below 1 qconv's is smaller.

Results are kept by type in evals/results/ggml-speed.json, so that types can be measured one at a time; ggml-speed.md is
made from it. Exits with 1 if a type is slower than it must be with an imatrix.

ggml is the shared library of libggml-python, from the environment of the interop tests or ``--library``.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from qconv import native
from qconv.errors import QconvError, UsageError
from qconv.executors.threads import Threads
from qconv.grids.ggml import GgmlType, compiled, encode

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "evals/results"
LIBRARY = "lib/python*/site-packages/libggml/lib64/libggml-base.so"
COLUMNS = 6144  # the 480B's hidden size
ROWS = 256
ROWS_A_TASK = 32

NUMBERS = ("F32", "F16", "BF16")
SIMPLE = (*NUMBERS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
TWICE = ("Q2_K", "Q4_K", "Q5_K")
"""At least twice as fast as ggml with an imatrix; the other types that search, as fast."""

Task = Callable[[int, int], object]
"""Encodes rows from one to the other."""
Pass = Callable[[], object]
"""Encodes all rows once."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Weights a second of both."""

    qconv: float
    ggml: float

    @property
    def ratio(self) -> float:
        """Above 1 qconv is faster."""
        return self.qconv / self.ggml


@dataclass(frozen=True, slots=True)
class Row:
    """One type, with or without an imatrix.

    Attributes:
        wall: By number of threads, as JSON has it.
        processor: Per second of one thread's processor time.
        error: Relative to ggml's.
        load: The machine's load average when this was measured, one process of which is this one.
        compiled: Whether qconv's encoders were the compiled ones.
    """

    type: str
    imatrix: bool
    wall: dict[str, Speed]
    processor: Speed
    error: float
    cores: int
    load: float
    compiled: bool

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Row:
        """From JSON."""
        wall = {threads: Speed(**speed) for threads, speed in values["wall"].items()}
        return cls(**values | {"wall": wall, "processor": Speed(**values["processor"])})

    @property
    def least_ratio(self) -> float:
        """What the ratio must be; 0 where it is only reported."""
        if not self.imatrix or self.type in SIMPLE:
            return 0.0
        return 2.0 if self.type in TWICE else 1.0

    @property
    def fast_enough(self) -> bool:
        """Whether the ratio is what it must be on every number of threads."""
        return all(speed.ratio >= self.least_ratio for speed in self.wall.values())


@click.command(help=__doc__)
@click.option(
    "--type", "names", multiple=True, type=click.Choice([type.name for type in GgmlType]), help="Default: all."
)
@click.option("--threads", multiple=True, type=click.IntRange(min=1), default=(1, 2), show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--seconds", type=float, default=0.2, show_default=True, help="Of a turn, or one pass if that is longer.")
@click.option("--library", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="libggml-base.so.")
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder of ggml-speed.json and ggml-speed.md.",
)
def main(
    names: tuple[str, ...],
    threads: tuple[int, ...],
    turns: int,
    seconds: float,
    library: Path | None,
    results: Path,
) -> None:
    try:
        peer = Ggml(library or installed_library())
    except QconvError as error:
        raise click.ClickException(str(error)) from None
    results.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    imatrix = torch.exp(1.5 * torch.randn(COLUMNS, generator=generator))
    failed = False
    for name in names or [type.name for type in GgmlType]:
        for importance in (None, imatrix):
            type = GgmlType[name]
            if importance is None and peer.requires_importance(type):
                continue
            row = measure(type, weight, importance, peer, threads, turns, seconds)
            failed |= not row.fast_enough
            store(results, row)
            click.echo(_line(row, sorted(row.wall, key=int)))
    sys.exit(1 if failed else 0)


class Ggml:
    """``ggml_quantize_chunk`` of a shared library."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._quantize: Any = loaded.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        self._requires: Any = loaded.ggml_quantize_requires_imatrix
        self._requires.restype = ctypes.c_bool

    def requires_importance(self, type: GgmlType) -> bool:
        """Whether ggml ends the process when asked for this type without an imatrix."""
        return bool(self._requires(type.id))

    def encode(self, weight: Tensor, type: GgmlType, importance: Tensor | None) -> Tensor:
        """The counterpart of :func:`qconv.grids.ggml.encode`; float32 only."""
        rows, columns = weight.shape
        encoded = torch.empty(rows, type.row_bytes(columns), dtype=torch.uint8)
        imatrix = None if importance is None else importance.data_ptr()
        self._quantize(type.id, weight.data_ptr(), encoded.data_ptr(), 0, rows, columns, imatrix)
        return encoded


def installed_library() -> Path:
    """The shared library in the environment of the interop tests.

    Raises:
        UsageError: there is none.
    """
    home = Path(os.environ.get("QCONV_INTEROP_HOME", REPOSITORY))
    found = next(iter(sorted((home / ".venv-ggml").glob(LIBRARY))), None)
    if found is None:
        raise UsageError("ggml's shared library is not there.", hint="Run `make interop` once, or give --library.")
    return found


def measure(
    type: GgmlType,
    weight: Tensor,
    importance: Tensor | None,
    peer: Ggml,
    threads: Sequence[int],
    turns: int,
    seconds: float,
) -> Row:
    """Time both on each number of threads."""

    def ours(start: int, stop: int) -> Tensor:
        return encode(weight[start:stop], type, importance)

    def theirs(start: int, stop: int) -> Tensor:
        return peer.encode(weight[start:stop], type, importance)

    error = squared_error(weight, ours(0, ROWS_A_TASK), type, importance)
    reference = squared_error(weight, theirs(0, ROWS_A_TASK), type, importance)
    wall = {}
    for count in threads:
        with Threads(count) as workers, ThreadPoolExecutor(count) as pool:
            passes = (_pass(workers.map, ours, weight), _pass(pool.map, theirs, weight))
            wall[str(count)] = in_turns(passes, weight.numel(), turns, seconds, time.perf_counter)
    with Threads(1):  # torch's own threads would count too
        passes = (_pass(map, ours, weight), _pass(map, theirs, weight))
        processor = in_turns(passes, weight.numel(), turns, seconds, time.thread_time)
    return Row(
        type=type.name,
        imatrix=importance is not None,
        wall=wall,
        processor=processor,
        error=error / reference if reference else 1.0,
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        compiled=native.load(compiled.LIBRARY) is not None,
    )


def in_turns(passes: tuple[Pass, Pass], weights: int, turns: int, seconds: float, clock: Callable[[], float]) -> Speed:
    """The speed of both in their best turn, of as many passes as fit into so many seconds."""
    repeats = [max(1, int(seconds / _timed(one, 1, time.perf_counter))) for one in passes]
    best = [float("inf"), float("inf")]
    for turn in range(turns):
        for side in (0, 1) if turn % 2 else (1, 0):  # neither always goes first
            best[side] = min(best[side], _timed(passes[side], repeats[side], clock))
    return Speed(weights / best[0], weights / best[1])


def _timed(one: Pass, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of one of several passes."""
    began = clock()
    for _ in range(repeats):
        one()
    return (clock() - began) / repeats


def _pass(map: Callable[..., Any], task: Task, weight: Tensor) -> Pass:
    def one() -> None:
        for _ in map(lambda rows: task(*rows), tasks(weight)):
            pass

    return one


def tasks(weight: Tensor) -> list[tuple[int, int]]:
    """Blocks of rows."""
    return [(start, min(start + ROWS_A_TASK, len(weight))) for start in range(0, len(weight), ROWS_A_TASK)]


def squared_error(weight: Tensor, encoded: Tensor, type: GgmlType, importance: Tensor | None) -> float:
    """Of the first rows, as many as are encoded."""
    decoded = torch.from_numpy(np.ascontiguousarray(dequantize(encoded.numpy(), type.value)))
    error = (weight[: len(encoded)].double() - decoded.double()).square()
    return float((error if importance is None else error * importance).sum())


def store(folder: Path, row: Row) -> None:
    """Put a row in place of the last one of its type, and rewrite the table."""
    path = folder / "ggml-speed.json"
    known = [Row.parse(values) for values in json.loads(path.read_text())] if path.exists() else []
    kept = [one for one in known if (one.type, one.imatrix) != (row.type, row.imatrix)]
    order = [type.name for type in GgmlType]
    rows = sorted([*kept, row], key=lambda one: (order.index(one.type), one.imatrix))
    path.write_text(json.dumps([asdict(one) for one in rows], indent=2) + "\n")
    (folder / "ggml-speed.md").write_text(table(rows))


def table(rows: Sequence[Row]) -> str:
    """The results as a Markdown table, in million weights a second."""
    threads = sorted({count for row in rows for count in row.wall}, key=int)
    headings = ["type", "imatrix"]
    for count in threads:
        headings += [f"qconv, {count} thr.", f"ggml, {count} thr.", "ratio"]
    headings += ["ratio of processor time", "must be", "error / ggml's", "cores", "load"]
    lines = [f"| {' | '.join(headings)} |", "|---|---|" + "--:|" * (len(headings) - 2)]
    return "".join(line + "\n" for line in lines + [_line(row, threads) for row in rows])


def _line(row: Row, threads: Sequence[str]) -> str:
    cells = [row.type + ("" if row.compiled else " (torch)"), "yes" if row.imatrix else "no"]
    for count in threads:
        speed = row.wall.get(count)
        if speed is None:
            cells += ["", "", ""]
        else:
            cells += [f"{speed.qconv / 1e6:.1f}", f"{speed.ggml / 1e6:.1f}", f"{speed.ratio:.2f}"]
    cells += [
        f"{row.processor.ratio:.2f}",
        f"{row.least_ratio:g}" if row.least_ratio else "",
        f"{row.error:.4f}",
        str(row.cores),
        f"{row.load:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
