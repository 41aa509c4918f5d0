"""``qconv eval run``: measure a build and judge it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconv.cli.console import duration, print_json, print_table, say, stdout
from qconv.cli.eval_options import check_device, engine_of, engine_options, located, suite_of, suite_options
from qconv.cli.examples import examples
from qconv.cli.options import json_option, out_option
from qconv.cli.progress import reporting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from qconv.evaluation.record import Gate, Metric, Run, Task


@click.command(
    short_help="Measure a build and judge it.",
    epilog=examples(
        "qconv eval run BUILD --reference MODEL --suite smoke -o RUN",
        "qconv eval run BUILD --reference MODEL --stream --suite release -o RUN",
        "qconv eval run BUILD --reference MODEL --suite longcontext -o RUN",
        "qconv eval run served-name --engine openai:http://127.0.0.1:8000/v1 --suite smoke -o RUN",
    ),
)
@click.argument("build")
@click.option("--reference", metavar="MODEL", help="The unquantized model that the build is measured against.")
@click.option(
    "--baseline", type=click.Path(exists=True, path_type=Path), metavar="RUN", help="The last accepted build's run."
)
@click.option("--gates", metavar="NAME", help="Packaged gates' name or a YAML file, in place of the suite's.")
@click.option("--no-gate", is_flag=True, help="Only measure.")
@engine_options
@suite_options
@out_option("The run's folder.")
@click.option("--restart", is_flag=True, help="Discard the run that the folder holds, if qconv made all of it.")
@json_option
def command(
    build: str,
    reference: str | None,
    baseline: Path | None,
    gates: str | None,
    no_gate: bool,
    engine: str,
    stream: bool,
    suite: str,
    dtype: str | None,
    device: str,
    seed: int | None,
    cache: Path | None,
    out: Path,
    restart: bool,
    as_json: bool,
) -> int:
    """Measure BUILD, a folder, a Hub id or a GGUF file, on a suite, and judge it by gates.

    The same command continues a run that was interrupted, and shows one that is finished.

    Exits with 0 if every gate passes, 3 on a regression, 4 if the gates cannot tell, 5 if the build is corrupt.
    """
    with reporting(quiet=as_json, remedy=f"Run the same command again to continue {out}.") as reporter:
        from qconv.evaluation.artifacts import locate
        from qconv.evaluation.cache import Cache, default_folder
        from qconv.evaluation.record import read_run
        from qconv.evaluation.run import Request, evaluate, require_gatable
        from qconv.evaluation.standing import measured_before
        from qconv.evaluation.suites import gates_of

        chosen = suite_of(suite, dtype, seed)
        check_device(device)
        judged = None if no_gate else gates or gates_of(chosen, suite)
        require_gatable(reference, judged)
        request = Request(
            build=located(build, engine),
            reference=None if reference is None else locate(reference),
            suite=chosen,
            suite_name=suite,
            engine=engine_of(engine, stream),
            device=device,
            out=out,
            cache=Cache(cache or default_folder()),
            gates=judged,
            baseline=None if baseline is None else read_run(baseline),
            command=("qconv", *sys.argv[1:]),
        )
        known = None if restart else measured_before(request, reporter.progress)
        if known is not None:
            reporter.log(f"{out}: holds this very run; nothing is measured again")
        run = known or evaluate(request, restart=restart, progress=reporter.progress, log=reporter.log)
    if as_json:
        print_json(run.model_dump(mode="json", exclude={"tasks": {"__all__": {"items", "reference_items"}}}))
    else:
        print_run(stdout(), run, out)
    return run.verdict.exit_code


def print_run(console: Console, run: Run, folder: Path) -> None:
    """What was measured, the gates and the verdict."""
    bits = "" if run.build.bits_per_weight is None else f", {run.build.bits_per_weight:.2f} bits per weight"
    say(console, f"{run.build.path}: {run.build.format or run.build.kind}{bits}, suite {run.suite}")
    for task in run.tasks:
        say(console, "")
        say(console, f"{task.name}: {len(task.items)} {task.unit}s of {task.source}, {duration(task.seconds)}")
        print_table(console, ("metric", "value", "95 % interval", "unit"), _metric_rows(task))
    for one in run.unmeasured:
        say(console, "")
        say(console, f"{one.name}: not measured: {one.sentence}")
    print_gates(console, run.gates)
    say(console, "")
    say(console, f"{folder}: {run.verdict.sentence}", style="" if run.verdict.exit_code == 0 else "bold red")


def print_gates(console: Console, gates: Sequence[Gate]) -> None:
    """A row for each gate, with the least change that it would have found."""
    if gates:
        say(console, "")
        header = ("gate", "status", "value", "limit", "baseline", "noise", "p (Holm)", "detectable")
        print_table(console, header, [_gate_row(gate) for gate in gates])


def number(value: float | None) -> str:
    """Four significant digits; empty for none."""
    return "" if value is None else f"{value:.4g}"


def _metric_rows(task: Task) -> list[tuple[str, ...]]:
    return [(name, number(one.value), _interval(one), one.unit) for name, one in task.metrics.items()]


def _interval(metric: Metric) -> str:
    return "" if metric.low is None else f"{number(metric.low)} to {number(metric.high)}"


def _gate_row(gate: Gate) -> tuple[str, ...]:
    status = gate.status + (" (measured twice)" if gate.reruns else "")
    figures = (gate.value, gate.limit, gate.baseline, gate.noise, gate.adjusted_p_value, gate.detectable)
    return gate.name, status, *map(number, figures)
