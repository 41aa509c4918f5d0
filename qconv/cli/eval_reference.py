"""``qconv eval reference``: compute and keep a reference's logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from qconv.cli.console import print_json, say, size, stdout
from qconv.cli.eval_options import check_device, suite_of, suite_options
from qconv.cli.examples import examples
from qconv.cli.options import json_option, model_argument
from qconv.cli.progress import reporting


@click.command(
    short_help="Compute and keep a reference's logits.",
    epilog=examples(
        "qconv eval reference MODEL --suite smoke",
    ),
)
@model_argument
@suite_options
@json_option
def command(
    model: str, suite: str, dtype: str | None, device: str, seed: int | None, cache: Path | None, as_json: bool
) -> None:
    """Compute what a suite needs to know of MODEL, an unquantized checkpoint, and keep it for later runs.

    What is kept is found by content: weights, tokens, engine, dtype and versions. Interrupted, the same command
    continues. `eval run` does the same where it finds nothing.
    """
    with reporting(quiet=as_json, remedy="Run the same command again to continue.") as reporter:
        from qconv.evaluation.artifacts import locate
        from qconv.evaluation.cache import Cache, default_folder
        from qconv.evaluation.run import keep_reference

        check_device(device)
        kept = keep_reference(
            locate(model),
            suite_of(suite, dtype, seed),
            suite,
            Cache(cache or default_folder()),
            device=device,
            progress=reporter.progress,
            log=reporter.log,
        )
    if as_json:
        print_json({"model": model, "suite": suite, "tasks": [dataclasses.asdict(one) for one in kept]})
        return
    for task in kept:
        say(stdout(), f"{task.task}: {task.kept} of {task.tokens:,} tokens, {size(task.nbytes)}, {task.path}")
