"""``qconv eval blame``: which layers and experts of a measured build cost most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconv.cli.console import print_json, print_table, say, stdout
from qconv.cli.eval_options import check_device
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT
from qconv.cli.options import json_option, one_device_option
from qconv.cli.progress import reporting

if TYPE_CHECKING:
    from qconv.evaluation.blame import Blame, Cost


@click.command(
    short_help="Name the layers and experts that cost most.",
    epilog=examples(
        "qconv eval blame RUN",
        "qconv eval blame RUN --baseline ACCEPTED",
    ),
)
@click.argument("run", type=click.Path(exists=True, path_type=Path), metavar="RUN")
@click.option("--tokens", type=click.IntRange(64, COUNT.max), default=2048, show_default=True, help="Tokens to score.")
@click.option("--layers", type=COUNT, default=2, show_default=True, help="Layers to look into.")
@click.option(
    "--baseline",
    type=click.Path(exists=True, path_type=Path),
    metavar="RUN",
    help="Tell how much more each part costs than in the build of this run.",
)
@one_device_option("cpu", "Where to compute: cpu, cuda, cuda:1 or auto.")
@json_option
def command(run: Path, tokens: int, layers: int, baseline: Path | None, device: str, as_json: bool) -> None:
    """Put single parts of the build of a finished RUN into its reference and measure what each one costs.

    Works layer by layer, so that neither model need fit into memory; activations lie in the run's folder meanwhile. The
    result stays there, and `eval report` shows it.
    """
    check_device(device)
    with reporting(quiet=as_json, remedy="Run the same command again.") as reporter:
        from qconv.evaluation.blaming import blame_run
        from qconv.evaluation.record import folder_of

        found = blame_run(
            folder_of(run),
            tokens=tokens,
            worst_layers=layers,
            baseline=None if baseline is None else folder_of(baseline),
            device=device,
            progress=reporter.progress,
            log=reporter.log,
        )
    if as_json:
        print_json(found.as_values())
        return
    console = stdout()
    more = "" if baseline is None else f", how much more than of {baseline}"
    say(console, f"{found.tokens:,} tokens; KL divergence from the reference{more}: nats a token, its standard error")
    say(console, f"the whole build: {_cost(found.whole)}")
    say(console, "")
    print_table(console, ("layer", "KL divergence", "+-"), [_row(one) for one in found.layers[:10]])
    say(console, "")
    header = ("part", "KL divergence", "+-", "its layer without it")
    print_table(console, header, [(*_row(one), _without(one)) for one in found.parts[:15]])
    say(console, "")
    say(console, f"dearest: {_sentence(found)}")


def _sentence(found: Blame) -> str:
    """The dearest part, and whether its layer gets cheaper without it."""
    worst = found.parts[0] if found.parts else found.layers[0]
    layer = next((one for one in found.layers if one.part.layer == worst.part.layer), worst)
    if worst.without is None:
        return f"{worst.part.name}, {_cost(worst)}"
    named = f"{worst.part.name}, {_cost(worst)}; its layer costs {layer.kld:.3g}, and {worst.without:.3g} without it"
    return named if worst.without < layer.kld else f"{named}: that part is wrong only beside the others"


def _cost(cost: Cost) -> str:
    return f"{cost.kld:.3g} +- {cost.error:.1g}"


def _row(cost: Cost) -> tuple[str, str, str]:
    return cost.part.name, f"{cost.kld:.3g}", f"{cost.error:.1g}"


def _without(cost: Cost) -> str:
    return "" if cost.without is None else f"{cost.without:.3g}"
