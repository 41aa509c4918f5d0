"""``qconv eval compare``: two runs side by side."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import click

from qconv.cli.console import print_json, print_table, say, stdout
from qconv.cli.eval_options import check_device, engine_of, engine_options, located, suite_of, suite_options
from qconv.cli.eval_run import number
from qconv.cli.examples import examples
from qconv.cli.options import json_option
from qconv.cli.progress import reporting


@click.command(
    short_help="Compare two runs, or two builds, on the same units.",
    epilog=examples(
        "qconv eval compare RUN OTHER",
        "qconv eval compare BUILD OTHER --reference MODEL --suite smoke",
    ),
)
@click.argument("first")
@click.argument("second")
@click.option("--reference", metavar="MODEL", help="Against which builds are measured; runs bring their own numbers.")
@engine_options
@suite_options
@json_option
def command(
    first: str,
    second: str,
    reference: str | None,
    engine: str,
    stream: bool,
    suite: str,
    dtype: str | None,
    device: str,
    seed: int | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Compare SECOND with FIRST, each a run's folder or a build.

    Differences are paired over documents or problems; a positive one means that SECOND diverges more, or solves more.
    """
    with reporting(quiet=as_json) as reporter, tempfile.TemporaryDirectory(prefix="qconv-compare-") as folder:
        from qconv.evaluation.artifacts import locate
        from qconv.evaluation.cache import Cache, default_folder
        from qconv.evaluation.compare import compare, not_compared
        from qconv.evaluation.record import RUN_NAME, Run, read_run
        from qconv.evaluation.run import Request, evaluate

        def run_of(name: str, number: int) -> Run:
            if (Path(name) / RUN_NAME).exists() or Path(name).name == RUN_NAME:
                return read_run(Path(name))
            check_device(device)
            request = Request(
                build=located(name, engine),
                reference=None if reference is None else locate(reference),
                suite=suite_of(suite, dtype, seed),
                suite_name=suite,
                engine=engine_of(engine, stream),
                device=device,
                out=Path(folder) / str(number),
                cache=Cache(cache or default_folder()),
            )
            return evaluate(request, progress=reporter.progress, log=reporter.log)

        runs = run_of(first, 1), run_of(second, 2)
        found = compare(*runs)
    if as_json:
        rows = [dataclasses.asdict(one) | {"verdict": one.word} for one in found]
        names = {"first": runs[0].build.name, "second": runs[1].build.name}
        print_json(names | {"differences": rows, "not_compared": not_compared(*runs)})
        return
    console = stdout()
    say(console, f"{second} against {first}")
    header = ("task", "metric", "first", "second", "difference", "95 % interval", "p (Holm)", "detectable", "units")
    table = [
        (
            one.task,
            one.metric,
            number(one.first),
            number(one.second),
            number(one.value),
            f"{number(one.low)} to {number(one.high)}",
            number(one.p_value),
            number(one.detectable),
            f"{one.units:,}",
        )
        for one in found
    ]
    print_table(console, header, table)
    for name, why in not_compared(*runs).items():
        say(console, f"{name}: not compared: {why}")
    for one in found:
        say(console, f"{one.task}, {one.metric}: {one.word}")
        if one.lost or one.gained:
            say(console, f"  lost {', '.join(one.lost) or 'none'}; gained {', '.join(one.gained) or 'none'}")
