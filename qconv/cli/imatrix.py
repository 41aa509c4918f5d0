"""``qconv imatrix``: collect an importance matrix by itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qconv.cli.console import costs, print_costs, print_json, say, size, stdout
from qconv.cli.examples import examples
from qconv.cli.gguf import print_coverage
from qconv.cli.numbers import COUNT, SEED
from qconv.cli.options import calib_option, model_argument, out_option, text_settings
from qconv.cli.running import Running, restart_option, running_options


@click.command(
    short_help="Collect an importance matrix for GGUF.",
    epilog=examples(
        "qconv imatrix MODEL --tokens 131072 -o IMATRIX",
        "qconv quantize MODEL --fmt gguf:IQ3_XXS --imatrix IMATRIX/imatrix.gguf -o OUT",
    ),
)
@model_argument
@out_option("The folder that gets imatrix.gguf.")
@calib_option
@click.option("--tokens", type=COUNT, help="Calibration tokens.")
@click.option("--sequence-length", type=COUNT, help="Tokens of one sequence, a chunk of llama.cpp.")
@click.option("--seed", type=SEED, help="Seed of the calibration's samples.")
@restart_option
@running_options("Experts")
def command(
    model: str,
    out: Path,
    calib: Sequence[str],
    tokens: int | None,
    sequence_length: int | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Collect the importance matrix of MODEL, a folder or a Hub id, in llama.cpp's GGUF form.

    For llama.cpp's own programs, and for several builds of one model: give it to quantize by --imatrix. Works layer by
    layer; the same command continues an interrupted run.
    """
    running, text = Running.taken(options), text_settings(calib, tokens, sequence_length, seed)
    start = time.monotonic()
    with running.reading(model, out) as (folder, means):
        from qconv.building.imatrix_pipeline import write_model_imatrix

        outcome = write_model_imatrix(folder, out, text, **means)
    path = out / "imatrix.gguf"
    result = {
        "path": str(path),
        "already_complete": outcome.already_complete,
        "bytes": path.stat().st_size,
        "datasets": outcome.report["datasets"],
        "coverage": outcome.report["coverage"],
        **costs(start),
    }
    if running.as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: Mapping[str, Any]) -> None:
    console, coverage = stdout(), result["coverage"]
    say(console, f"{result['path']}: {'already complete; nothing to do' if result['already_complete'] else 'done'}")
    say(console, f"size         {size(result['bytes'])}, {coverage['covered']} weights in layers")
    say(console, f"text         {'; '.join(result['datasets'])}")
    print_coverage(coverage)
    print_costs(result)
