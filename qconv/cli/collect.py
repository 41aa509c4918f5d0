"""``qconv collect``: a build of the parts that several machines have made."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qconv.cli.console import costs, print_costs, print_json, say, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import THREADS
from qconv.cli.options import disk_budget_option, json_option
from qconv.cli.progress import reporting
from qconv.cli.quantize import print_values, values_of


@click.command(
    short_help="Make a build of the parts that several machines have made.",
    epilog=examples(
        "qconv quantize MODEL --fmt fp8 --part 3/16 -o OUT",
        "qconv collect OUT",
    ),
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The model, where it is not where the first part found it.")
@click.option("--threads", type=THREADS, help="Files whose checksums are computed at once.")
@disk_budget_option
@json_option
def command(out: Path, model: str | None, threads: int | None, disk_budget: int | None, as_json: bool) -> None:
    """Make the build OUT of the parts that lie beside it, in OUT.parts, from quantize --part K/N.

    Checks that all N are there, finished, and made from the same model, recipe and versions; moves their files,
    verifies the whole, and writes index, card, report and SHA256SUMS: the folder is that of a run without --part, to
    the byte. Interrupted, the same command goes on.
    """
    start = time.monotonic()
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        from qconv.building.collect_pipeline import collect
        from qconv.checkpoint.hub import model_folder

        if model is None:
            outcome = collect(out, threads=threads, progress=reporter.progress, log=reporter.log)
        else:
            with model_folder(model, disk_budget, reporter.log) as folder:
                outcome = collect(out, folder, threads=threads, progress=reporter.progress, log=reporter.log)
    if outcome is None:
        if as_json:
            print_json({"path": str(out), "already_complete": True} | costs(start))
        else:
            say(stdout(), f"complete     {out} is finished, and has no parts beside it")
        return
    result = values_of(outcome) | costs(start)
    if as_json:
        print_json(result)
        return
    print_values(result)
    print_costs(result)
