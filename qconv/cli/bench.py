"""``qconv bench``: what scale can be tried on."""

from __future__ import annotations

from pathlib import Path

import click

from qconv.cli.console import print_json, say, size, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT, SEED
from qconv.cli.options import json_option, out_option
from qconv.cli.progress import reporting

_DEFAULT = "qwen3-coder-480b"


@click.group(short_help="Make checkpoints to try scale on.")
def command() -> None:
    """Try scale without the model."""


@command.command(
    "slice",
    short_help="Write a random checkpoint of a published model's shapes.",
    epilog=examples(
        "qconv bench slice --layers 1 --experts 16 -o SLICE",
        "qconv bench slice --like deepseek-v3 --layers 1 --experts 8 -o SLICE",
    ),
)
@click.option("--layers", type=COUNT, required=True, help="Decoder layers; the 480B has 62.")
@click.option("--experts", type=COUNT, required=True, help="Experts a layer; the 480B has 160.")
@out_option("A new or empty folder, or one that the same command began.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="The same seed, the same bytes.")
@click.option(
    "--like",
    type=click.Choice([_DEFAULT, "deepseek-v3", "glm-4.6", "gpt-oss-120b", "kimi-k2", "qwen3-next-80b"]),
    default=_DEFAULT,
    show_default=True,
    help="Whose shapes and storage.",
)
@json_option
def write(layers: int, experts: int, out: Path, seed: int, like: str, as_json: bool) -> None:
    """Write a random checkpoint with the true shapes and the storage of a published model, Qwen3-Coder-480B-A35B unless
    another is named, and fewer layers or experts.
    """
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        from qconv.building.bench import write_slice
        from qconv.building.bench_models import PUBLISHED

        shape = None if like == _DEFAULT else PUBLISHED[like]
        write_slice(out, layers=layers, experts=experts, seed=seed, shape=shape, progress=reporter.progress)
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        values = {"path": str(out), "like": like, "layers": layers, "experts": experts, "seed": seed, "bytes": nbytes}
        print_json(values)
    else:
        say(stdout(), f"{out}: {layers} layers of {experts} experts, {size(nbytes)}")
