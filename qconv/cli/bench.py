"""``qconv bench``: what scale can be tried on."""

from __future__ import annotations

from pathlib import Path

import click

from qconv.cli.console import print_json, say, size, stdout
from qconv.cli.numbers import COUNT, SEED
from qconv.cli.options import json_option, out_option
from qconv.cli.progress import reporting


@click.group(short_help="Make checkpoints to try scale on.")
def command() -> None:
    """Try scale without the model."""


@command.command("slice", short_help="Write a random checkpoint of Qwen3-Coder-480B's shapes.")
@click.option("--layers", type=COUNT, required=True, help="Decoder layers; the whole model has 62.")
@click.option("--experts", type=COUNT, required=True, help="Experts a layer; the whole model has 160.")
@out_option("A new or empty folder, or one that the same command began.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="The same seed, the same bytes.")
@json_option
def write(layers: int, experts: int, out: Path, seed: int, as_json: bool) -> None:
    """Write a random bf16 checkpoint with the true shapes of Qwen3-Coder-480B-A35B and fewer layers or experts."""
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        from qconv.building.bench import write_slice

        write_slice(out, layers=layers, experts=experts, seed=seed, progress=reporter.progress)
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        print_json({"path": str(out), "layers": layers, "experts": experts, "seed": seed, "bytes": nbytes})
    else:
        say(stdout(), f"{out}: {layers} layers of {experts} experts, {size(nbytes)}")
