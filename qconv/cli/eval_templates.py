"""``qconv eval templates``: whether a build still asks its model what the source is asked."""

from __future__ import annotations

import dataclasses

import click

from qconv.cli.console import print_json, say, stdout
from qconv.cli.examples import examples
from qconv.cli.options import json_option
from qconv.cli.progress import reporting
from qconv.errors import VerificationError


@click.command(
    short_help="Compare a build's chat template, sampling and rope with its source's.",
    epilog=examples(
        "qconv eval templates BUILD --reference MODEL",
    ),
)
@click.argument("build")
@click.option("--reference", required=True, metavar="MODEL", help="What BUILD was made of, a folder or a Hub id.")
@json_option
def command(build: str, reference: str, as_json: bool) -> int:
    """Compare what lies around the weights of BUILD, a folder, a Hub id or a GGUF file, with its source's.

    Chat templates are compared on a fixed set of chats (tools, several calls, Unicode, thinking and others), and
    sampling, special tokens, rope and context length with them. No weight is read.

    Exits with 5 if anything differs.
    """
    with reporting(quiet=as_json):
        from qconv.evaluation.artifacts import locate
        from qconv.evaluation.packaging import compare_packaging

        result = compare_packaging(locate(build), locate(reference))
    if as_json:
        print_json({"path": build, "good": not result.differences, **dataclasses.asdict(result)})
    else:
        console = stdout()
        for text in result.checked:
            say(console, f"ok   {text}")
        say(console, f"ok   {len(result.rendered)} chats rendered alike, {len(result.refused)} refused by both")
        for text in result.differences:
            say(console, f"BAD  {text}", style="bold red")
        say(console, f"{build}: {f'{len(result.differences)} differences' if result.differences else 'good'}")
    return VerificationError.exit_code if result.differences else 0
