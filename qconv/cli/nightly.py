"""``qconv nightly``: make builds, measure them, judge them, remember; exits with the night's verdict."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconv.cli.console import print_json, print_table, say, stdout
from qconv.cli.examples import examples
from qconv.cli.options import json_option
from qconv.cli.progress import reporting
from qconv.errors import UsageError

if TYPE_CHECKING:
    from qconv.nightly.run import BuildNight


@click.command(
    short_help="Make, measure and judge builds, night after night.",
    epilog=examples(
        "qconv nightly evals/nightly.yaml",
    ),
)
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--date", metavar="YYYY-MM-DD", help="Which night; by default today, UTC. The same one continues.")
@json_option
def command(config: Path, date: str | None, as_json: bool) -> int:
    """Run the night that CONFIG describes (as evals/nightly.yaml does), or continue it."""
    night_date = _date(date)
    with reporting(quiet=as_json, remedy="Run the same command again to continue this night.") as reporter:
        from qconv.evaluation.history import History
        from qconv.evaluation.report.page import write_report
        from qconv.evaluation.report.view import summary, view
        from qconv.nightly.run import not_measured, require_any_run, run_night
        from qconv.nightly.settings import load_nightly

        plan = load_nightly(config)
        night = run_night(plan, night_date, progress=reporter.progress, log=reporter.log)
        require_any_run(night)
        with History.open(plan.history) as history:
            views = [view(folder, run, history, one.name) for one in night.builds for folder, run in one.runs.values()]
        absent = [(one.name, _why(one)) for one in night.builds if not one.runs]
        files = write_report(night.folder, views, absent=absent)
    if as_json:
        builds = {one.name: _values(one) for one in night.builds}
        verdict = night.verdict.model_dump(mode="json")
        print_json({"date": night_date, "verdict": verdict, "builds": builds, "report": [str(path) for path in files]})
    else:
        console = stdout()
        print_table(console, *summary(views))
        for one in night.builds:
            if _why(one):
                say(console, f"{one.name}: {_why(one)}")
        for told in not_measured(night):
            say(console, told)
        say(console, "")
        say(console, f"report: {files[0]}")
        say(console, night.verdict.sentence, style="" if night.verdict.exit_code == 0 else "bold red")
    return night.verdict.exit_code


def _date(text: str | None) -> str:
    """A night's name.

    Raises:
        UsageError: no date.
    """
    if text is None:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise UsageError(f"--date: {text!r} is no date.", hint="Write it as 2026-01-31.") from None


def _why(night: BuildNight) -> str:
    if night.problem is not None:
        return str(night.problem)
    told = [f"{suite}: not measured: {error}" for suite, error in night.unmeasured.items()]
    return "; ".join([*told, *(f"{suite}: {reason}" for suite, reason in night.skipped.items())])


def _values(night: BuildNight) -> dict[str, object]:
    return {
        "outcome": night.outcome,
        "runs": {suite: {"folder": str(folder), "digest": run.digest} for suite, (folder, run) in night.runs.items()},
        "not_measured": {
            **{suite: str(error) for suite, error in night.unmeasured.items()},
            **{
                f"{suite}: {one.name}": one.sentence for suite, (_, run) in night.runs.items() for one in run.unmeasured
            },
        },
        "skipped": night.skipped,
        "problem": None if night.problem is None else str(night.problem),
        "changes": list(night.changes),
    }
