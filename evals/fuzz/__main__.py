"""``python -m evals.fuzz``: mutants of every parser's input; a table, and exit code 1 if one was met badly."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from evals.fuzz.harness import MEMORY, SECONDS, score
from evals.fuzz.inputs import STORE
from evals.fuzz.targets import TARGETS

IMPORTED = (
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.qwen2.tokenization_qwen2",
    "qconv.calibration.run",
    "qconv.evaluation.run",
    "qconv.evaluation.history",
    "qconv.building.gguf_pipeline",
    "qconv.building.pipeline",
    "qconv.conversion.pipeline",
    "qconv.artifacts.subject",
    "qconv.planning.engines",
    "qconv.nightly.run",
    "qconv.runtime.loading",
    "qconv.runtime.generation",
    *(
        f"qconv.cli.{name}"
        for name in ("plan", "quantize", "imatrix", "inspect", "verify", "check", "convert", "generate", "eval")
    ),
)
"""By the process that all mutants' are forked from."""


@click.command(help=__doc__)
@click.option("--mutants", type=click.IntRange(min=1), default=150, show_default=True, help="Of each parser's input.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first mutant.")
@click.option("--only", multiple=True, metavar="NAME", help="Parsers whose name holds this; repeatable.")
@click.option(
    "--kept",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/fuzz"),
    help="For inputs with faults.",
)
def main(mutants: int, seed: int, only: Sequence[str], kept: Path) -> None:
    """Run, print, exit."""
    for name in IMPORTED:
        importlib.import_module(name)
    table = Table("parser", "mutants", "exit codes", "slowest", "memory", "faults")
    faults, ran = 0, 0
    try:
        for target in TARGETS:
            if only and not any(part in target.name for part in only):
                continue
            found = score(target, mutants, seed, kept.resolve())
            codes = ", ".join(f"{code}: {count}" for code, count in sorted(found.codes.items()))
            row = (target.name, str(found.mutants), codes, f"{found.slowest:.1f} s", f"{found.largest / 2**30:.2f} GiB")
            table.add_row(*row, str(len(found.faults)))
            click.echo(" | ".join((*row, f"{len(found.faults)} faults")))
            for fault in found.faults[:5]:
                click.echo(f"    {fault}")
            faults += len(found.faults)
            ran += found.mutants
    finally:
        shutil.rmtree(STORE, ignore_errors=True)
    Console().print(table)
    click.echo(
        f"{ran:,} mutants, {faults} met with a traceback, a signal, another exit code, "
        f"more than {SECONDS:.0f} s or {MEMORY / 2**30:.0f} GiB"
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
