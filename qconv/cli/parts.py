"""``--part K/N``, and what is printed of a share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconv.cli.console import costs, print_costs, print_json, say, stdout

if TYPE_CHECKING:
    from qconv.building.share import Share


def _part(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, _, count = value.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 100_000):
        raise click.BadParameter(f"{value!r} is not K/N with K from 1 to N.")
    return int(number), int(count)


part_option = click.option(
    "--part",
    metavar="K/N",
    callback=_part,
    help="Make the K-th of N shares, beside OUT; qconv collect OUT makes the build of them. Not of calibrated builds.",
)


def print_share(share: Share, folder: Path, out: Path, start: float, as_json: bool) -> None:
    """Print what one machine has made of a build."""
    result = {"path": str(folder), "part": [share.number, share.count], "units": sorted(share.keys)} | costs(start)
    if as_json:
        print_json(result)
        return
    console = stdout()
    say(console, f"part         {share.number} of {share.count}: {len(share.keys)} units in {folder}")
    say(console, f"next         qconv collect {out}, once all {share.count} are made")
    print_costs(result)
