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
from qconv.cli.numbers import COUNT, SEED, THREADS
from qconv.cli.options import (
    calib_option,
    corpus_of,
    devices_option,
    disk_budget_option,
    executor_option,
    json_option,
    model_argument,
    out_option,
)
from qconv.cli.progress import reporting
from qconv.core.settings import TextSettings
from qconv.planning.recipe import parse_as


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
@click.option("--restart", is_flag=True, help="Discard what the folder holds, if qconv made all of it.")
@click.option("--threads", type=THREADS, help="Experts worked on at once; the bytes do not depend on it.")
@disk_budget_option
@executor_option
@devices_option
@json_option
def command(
    model: str,
    out: Path,
    calib: Sequence[str],
    tokens: int | None,
    sequence_length: int | None,
    seed: int | None,
    restart: bool,
    threads: int | None,
    disk_budget: int | None,
    executor: str,
    devices: str,
    as_json: bool,
) -> None:
    """Collect the importance matrix of MODEL, a folder or a Hub id, in llama.cpp's GGUF form.

    For llama.cpp's own programs, and for several builds of one model: give it to quantize by --imatrix. Works layer by
    layer; the same command continues an interrupted run.
    """
    given = {"corpus": corpus_of(calib), "tokens": tokens, "sequence_length": sequence_length, "seed": seed}
    text = parse_as(TextSettings, {key: value for key, value in given.items() if value is not None}, "calibration")
    start = time.monotonic()
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        reporter.log(f"{model}: reading")
        from qconv.building.imatrix_pipeline import write_model_imatrix
        from qconv.checkpoint.hub import model_folder

        with model_folder(model, disk_budget, reporter.log) as folder:
            outcome = write_model_imatrix(
                folder,
                out,
                text,
                restart=restart,
                threads=threads,
                executor=executor,
                devices=devices,
                progress=reporter.progress,
                log=reporter.log,
            )
    path = out / "imatrix.gguf"
    result = {
        "path": str(path),
        "already_complete": outcome.already_complete,
        "bytes": path.stat().st_size,
        "datasets": outcome.report["datasets"],
        "coverage": outcome.report["coverage"],
        **costs(start),
    }
    if as_json:
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
