"""Quantize to every format again and again with more threads than cores: no run may crash, and all give the same bytes.

Each run is a process forked from one that has only imported qconv, so that in each everything compiled, loaded or
tabulated is used for the first time, by all threads at once. Exits with 1 if a run fails or bytes differ.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from evals.recipes import general_recipes
from evals.small_model import save_small_model
from qconv.cli.main import qconv
from qconv.formats.gguf.mixture import FILE_TYPES
from qconv.planning.gguf_recipe import FORMAT as GGUF

TEXT = ("--tokens", "1024", "--sequence-length", "64")
"""Calibration of a size that keeps a run short; every thread still gets experts of its own."""


@click.command(help=__doc__)
@click.option("--runs", type=click.IntRange(min=1), default=50, show_default=True, help="Of each format.")
@click.option("--threads", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--fmt", "formats", multiple=True, help="Only these; repeatable.")
def main(runs: int, threads: int, formats: Sequence[str]) -> None:
    """Run, print a table, and exit."""
    chosen = list(formats) or [*general_recipes(), *(f"{GGUF}:{name}" for name in FILE_TYPES)]
    table = Table("format", "runs", "failed", "sets of bytes", "seconds a run")
    failures = 0
    with tempfile.TemporaryDirectory(prefix="qconv-threads-") as name:
        scratch = Path(name)
        # What is only imported need not be imported in every process.
        importlib.import_module("qconv.calibration.run")
        importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        model = scratch / "model"
        if forked_call(lambda: save_small_model(model, width=256, experts=8, head_dim=64)):
            raise click.ClickException("the model could not be made")
        imatrix = scratch / "imatrix"
        if any(fmt.startswith(GGUF) for fmt in chosen) and forked(["imatrix", str(model), "-o", str(imatrix), *TEXT]):
            raise click.ClickException("the importance matrix could not be made")
        for fmt in chosen:
            options = [*TEXT] if not fmt.startswith(GGUF) else ["--imatrix", str(next(imatrix.glob("*.gguf")))]
            started, failed, seen = time.monotonic(), 0, set()
            for _ in range(runs):
                out = scratch / "out"
                code = forked(
                    ["quantize", str(model), "--fmt", fmt, *options, "--threads", str(threads), "-o", str(out)]
                )
                failed += code != 0
                if code == 0:
                    seen.add(digest(out))
                shutil.rmtree(out, ignore_errors=True)
            failures += failed + (len(seen) != 1)
            seconds = (time.monotonic() - started) / runs
            table.add_row(fmt, str(runs), str(failed), str(len(seen)), f"{seconds:.2f}")
            click.echo(f"{fmt}: {runs} runs, {failed} failed, {len(seen)} set(s) of bytes, {seconds:.2f} s a run")
    Console().print(table)
    sys.exit(1 if failures else 0)


def forked(arguments: list[str]) -> int:
    """A command's exit code, in a process of its own; minus a signal's number where that ended it."""
    return forked_call(lambda: qconv.main(arguments, prog_name="qconv"))


def forked_call(function: Callable[[], object]) -> int:
    """The exit code of a process that calls the function and prints nothing."""
    child = os.fork()
    if child == 0:
        silent, code = os.open(os.devnull, os.O_WRONLY), 1
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            function()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(folder: Path) -> str:
    """Of names and contents of a build's files."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


if __name__ == "__main__":
    main()
