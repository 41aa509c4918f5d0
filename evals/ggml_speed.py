"""Speed and error of qconv's encoders of ggml block types beside ggml's own, in one process and on the same weights.

Both work through the same blocks of rows on the same number of threads, in turns, and the best of each one's
repetitions counts. Weights are normal, importance spans a few orders of magnitude as an imatrix does. The error is
``sum importance * (w - w')^2`` (importance 1 without an imatrix), as the gguf package decodes the bytes; below 1
qconv's is smaller.

ggml is the shared library of libggml-python, from the environment of the interop tests or ``--library``.
"""

from __future__ import annotations

import ctypes
import json
import os
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
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qconv.errors import QconvError, UsageError
from qconv.ggml import GgmlType, encode
from qconv.parallel import Workers

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARY = "lib/python*/site-packages/libggml/lib64/libggml-base.so"
COLUMNS = 6144  # the 480B's hidden size
ROWS_A_TASK = 128

Task = Callable[[int, int], object]
"""Encodes rows from one to the other."""


@dataclass(frozen=True, slots=True)
class Row:
    """One type. Speeds in weights a second, by number of threads; the error is relative to ggml's."""

    type: str
    imatrix: bool
    qconv: dict[int, float]
    ggml: dict[int, float]
    error: float


@click.command(help=__doc__)
@click.option(
    "--type", "names", multiple=True, type=click.Choice([type.name for type in GgmlType]), help="Default: all."
)
@click.option("--threads", multiple=True, type=click.IntRange(min=1), default=(1, 2), show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=1024, show_default=True, help=f"Of {COLUMNS} weights each.")
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--library", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="libggml-base.so.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    names: tuple[str, ...],
    threads: tuple[int, ...],
    rows: int,
    repetitions: int,
    library: Path | None,
    as_json: bool,
) -> None:
    try:
        peer = Ggml(library or installed_library())
    except QconvError as error:
        raise click.ClickException(str(error)) from None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, COLUMNS, generator=generator) * 0.02
    imatrix = torch.exp(1.5 * torch.randn(COLUMNS, generator=generator))
    measured = [
        measure(GgmlType[name], weight, importance, peer, threads, repetitions)
        for name in names or [type.name for type in GgmlType]
        for importance in (None, imatrix)
    ]
    if as_json:
        click.echo(json.dumps({"cores": os.cpu_count(), "rows": list(map(asdict, measured))}, indent=2))
    else:
        show(measured, threads)


class Ggml:
    """``ggml_quantize_chunk`` of a shared library."""

    def __init__(self, library: Path) -> None:
        self._quantize: Any = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def encode(self, weight: Tensor, type: GgmlType, importance: Tensor | None) -> Tensor:
        """The counterpart of :func:`qconv.ggml.encode`; float32 only."""
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
    type: GgmlType, weight: Tensor, importance: Tensor | None, peer: Ggml, threads: Sequence[int], repetitions: int
) -> Row:
    """Time both on each number of threads."""

    def ours(start: int, stop: int) -> Tensor:
        return encode(weight[start:stop], type, importance)

    def theirs(start: int, stop: int) -> Tensor:
        return peer.encode(weight[start:stop], type, importance)

    error = squared_error(weight, ours(0, ROWS_A_TASK), type, importance)
    reference = squared_error(weight, theirs(0, ROWS_A_TASK), type, importance)
    best: dict[str, dict[int, float]] = {"qconv": {}, "ggml": {}}
    for count in threads:
        for _ in range(repetitions):
            for name, seconds in (
                ("qconv", time_qconv(ours, weight, count)),
                ("ggml", time_ggml(theirs, weight, count)),
            ):
                best[name][count] = max(best[name].get(count, 0.0), weight.numel() / seconds)
    return Row(type.name, importance is not None, best["qconv"], best["ggml"], error / reference if reference else 1.0)


def time_qconv(task: Task, weight: Tensor, threads: int) -> float:
    """Seconds of all rows in qconv's own workers."""
    with Workers(threads) as workers:
        began = time.perf_counter()
        for _ in workers.map(lambda rows: task(*rows), tasks(weight)):
            pass
        return time.perf_counter() - began


def time_ggml(task: Task, weight: Tensor, threads: int) -> float:
    """Seconds of all rows in plain threads; ctypes lets go of the interpreter while C runs."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for _ in pool.map(lambda rows: task(*rows), tasks(weight)):
            pass
        return time.perf_counter() - began


def tasks(weight: Tensor) -> list[tuple[int, int]]:
    """Blocks of rows."""
    return [(start, min(start + ROWS_A_TASK, len(weight))) for start in range(0, len(weight), ROWS_A_TASK)]


def squared_error(weight: Tensor, encoded: Tensor, type: GgmlType, importance: Tensor | None) -> float:
    """Of the first rows, as many as are encoded."""
    decoded = torch.from_numpy(np.ascontiguousarray(dequantize(encoded.numpy(), type.value)))
    error = (weight[: len(encoded)].double() - decoded.double()).square()
    return float((error if importance is None else error * importance).sum())


def show(measured: Sequence[Row], threads: Sequence[int]) -> None:
    """Print a table in million weights a second."""
    table = Table(title="million weights/s")
    for heading in ("type", "imatrix"):
        table.add_column(heading)
    for count in threads:
        for heading in (f"qconv, {count} thr.", f"ggml, {count} thr.", "ratio"):
            table.add_column(heading, justify="right")
    table.add_column("error / ggml's", justify="right")
    for row in measured:
        cells = [row.type, "yes" if row.imatrix else "no"]
        for count in threads:
            ours, theirs = row.qconv[count] / 1e6, row.ggml[count] / 1e6
            cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        table.add_row(*cells, f"{row.error:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
