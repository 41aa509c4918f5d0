"""``qconv sensitivity``: how much a model's output cares about each of its linears."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from qconv.cli.console import costs, print_costs, print_json, say, size, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT, SEED
from qconv.cli.options import calib_option, model_argument, out_option, text_settings
from qconv.cli.running import Running, restart_option, running_options


@click.command(
    short_help="Measure how much the output cares about each linear.",
    epilog=examples(
        "qconv sensitivity MODEL -o S",
        "qconv plan MODEL --fmt gguf --sensitivity S --target-bits 4.5",
    ),
)
@model_argument
@out_option("The folder that gets sensitivity.safetensors.")
@calib_option
@click.option("--tokens", type=COUNT, help="Tokens of the text.")
@click.option("--sequence-length", type=COUNT, help="Tokens of one sequence.")
@click.option("--seed", type=SEED, help="Seed of the text's samples and of the labels.")
@click.option("--no-gradients", is_flag=True, help="One pass forward, no way back: what linears' inputs are like.")
@restart_option
@running_options("Experts")
def command(
    model: str,
    out: Path,
    calib: Sequence[str],
    tokens: int | None,
    sequence_length: int | None,
    seed: int | None,
    no_gradients: bool,
    **options: Any,
) -> None:
    """Measure, for every linear of MODEL, a folder or a Hub id, the squared gradients of its outputs.

    Labels are drawn from the model's own distribution: what comes of it is the diagonal of the Fisher information. One
    pass forward and one back, layer by layer, experts one by one; the same command continues an interrupted run. With
    --no-gradients what is chosen by it goes by the errors of each linear's outputs, relative to their mean square.
    """
    running, text = Running.taken(options), text_settings(calib, tokens, sequence_length, seed)
    start = time.monotonic()
    with running.reading(model, out) as (folder, means):
        from qconv.building.sensitivity_pipeline import measure_sensitivity
        from qconv.sensitivity.allocating import SENSITIVITY_NAME

        outcome = measure_sensitivity(folder, out, text, gradients=not no_gradients, **means)
    path = out / SENSITIVITY_NAME
    result: dict[str, Any] = {
        "path": str(path),
        "already_complete": outcome.already_complete,
        "bytes": path.stat().st_size,
        "tokens": outcome.report["tokens"],
        "text": outcome.report["text"],
        **costs(start),
    }
    if running.as_json:
        print_json(result)
        return
    console = stdout()
    say(console, f"{result['path']}: {'already complete; nothing to do' if result['already_complete'] else 'done'}")
    say(console, f"size         {size(result['bytes'])}")
    say(console, f"text         {result['text']}")
    print_costs(result)
