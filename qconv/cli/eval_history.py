"""``qconv eval history``: the runs so far, and which of them later ones are judged against."""

from __future__ import annotations

from pathlib import Path

import click

from qconv.cli.console import print_json, print_table, stdout
from qconv.cli.examples import examples
from qconv.cli.numbers import COUNT, IDENTIFIER
from qconv.cli.options import json_option


@click.command(
    short_help="List runs, add one, or accept one as the baseline.",
    epilog=examples(
        "qconv eval history HISTORY",
        "qconv eval history HISTORY --add RUN",
    ),
)
@click.argument("history", type=click.Path(file_okay=False, path_type=Path))
@click.option("--add", "added", type=click.Path(exists=True, path_type=Path), metavar="RUN", help="Add a finished run.")
@click.option("--accept", type=IDENTIFIER, metavar="ID", help="Let this run be the baseline of later ones.")
@click.option("--reject", type=IDENTIFIER, metavar="ID", help="Let it no longer be.")
@click.option("--name", help="Only what is followed under this name; with --add: follow the build under it.")
@click.option("--suite", help="Only runs of this suite.")
@click.option("--limit", type=COUNT, default=20, show_default=True, help="The newest so many.")
@json_option
def command(
    history: Path,
    added: Path | None,
    accept: int | None,
    reject: int | None,
    name: str | None,
    suite: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show the runs in the folder HISTORY, newest first."""
    from qconv.evaluation.history import History, as_values
    from qconv.evaluation.record import folder_of, read_run

    with History.open(history, create=added is not None) as opened:
        if added is not None:
            folder = folder_of(added)
            opened.add(folder, read_run(folder), name=name)
        for id, accepted in ((accept, True), (reject, False)):
            if id is not None:
                opened.accept(id, accepted)
        entries = opened.runs(name=name, suite=suite, limit=limit)
    if as_json:
        print_json([as_values(entry) for entry in entries])
        return
    rows = [
        (
            str(entry.id),
            entry.run.started[:16].replace("T", " "),
            entry.name,
            entry.run.suite,
            entry.run.verdict.outcome,
            ", ".join(one.name for one in entry.run.unmeasured),
            "yes" if entry.accepted else "",
            entry.run.build.sha256[:12],
        )
        for entry in entries
    ]
    print_table(
        stdout(), ("id", "started (UTC)", "name", "suite", "outcome", "not measured", "baseline", "weights"), rows
    )
