"""``qconv eval report``: runs as one offline HTML page, Markdown, JSON and JUnit."""

from __future__ import annotations

from pathlib import Path

import click

from qconv.cli.console import print_json, say, stdout
from qconv.cli.examples import examples
from qconv.cli.options import json_option

KINDS = ("html", "markdown", "json", "junit")


@click.command(
    short_help="Make the report of runs.",
    epilog=examples(
        "qconv eval report RUN OTHER -o REPORT",
    ),
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="RUN...")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: the first run's.")
@click.option("--history", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Show trends from it.")
@click.option("--name", help="What the build is followed under in the history, if not its own name.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS, show_default=True)
@json_option
def command(
    runs: tuple[Path, ...],
    out: Path | None,
    history: Path | None,
    name: str | None,
    kinds: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make one page of one or more finished RUNs; nothing in it is loaded from elsewhere."""
    from contextlib import ExitStack

    from qconv.evaluation.history import History
    from qconv.evaluation.record import folder_of, read_run
    from qconv.evaluation.report.page import write_report
    from qconv.evaluation.report.view import told_apart, view

    folders = [folder_of(path) for path in runs]
    with ExitStack() as stack:
        opened = None if history is None else stack.enter_context(History.open(history, create=False))
        views = [view(folder, read_run(folder), opened, name) for folder in folders]
    written = write_report(out or folders[0], told_apart(views), kinds)
    if as_json:
        print_json({"files": [str(path) for path in written], "verdicts": [one.run.verdict.outcome for one in views]})
        return
    for path in written:
        say(stdout(), str(path))
