"""``qconv eval gate``: judge a run that was measured before."""

from __future__ import annotations

from pathlib import Path

import click

from qconv.cli.console import print_json, say, stdout
from qconv.cli.eval_run import print_gates
from qconv.cli.examples import examples
from qconv.cli.options import json_option
from qconv.errors import UsageError


@click.command(
    short_help="Judge a run that was measured before.",
    epilog=examples(
        "qconv eval gate RUN",
        "qconv eval gate RUN --baseline ACCEPTED",
    ),
)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--baseline", type=click.Path(exists=True, path_type=Path), metavar="RUN", help="The last accepted build's run."
)
@click.option("--gates", metavar="NAME", help="Packaged gates' name or a YAML file; by default the run's own.")
@json_option
def command(run: Path, baseline: Path | None, gates: str | None, as_json: bool) -> int:
    """Judge RUN, a run's folder, by gates, without measuring anything; the record stays as it is.

    Exits as `eval run` does. What a failing gate is measured a second time for, this cannot do.
    """
    from qconv.evaluation.gates import class_of, load_gates, verdict
    from qconv.evaluation.judging import judge
    from qconv.evaluation.record import read_run

    found = read_run(run)
    if found.reference is None:
        raise UsageError(f"{run}: was measured without a reference.", hint="Run it again with --reference MODEL.")
    judges = load_gates(gates or found.gates_name or "default")
    kept = tuple(gate for gate in found.gates if gate.against == "integrity")
    before = None if baseline is None else read_run(baseline)
    judged = (*kept, *judge(found.tasks, class_of(judges, found.build), judges, before, found.unmeasured))
    outcome = verdict(judged, found.unmeasured)
    if as_json:
        print_json({"gates": [gate.model_dump(mode="json") for gate in judged], "verdict": outcome.model_dump()})
    else:
        print_gates(stdout(), judged)
        say(stdout(), "")
        say(stdout(), f"{run}: {outcome.sentence}", style="" if outcome.exit_code == 0 else "bold red")
    return outcome.exit_code
