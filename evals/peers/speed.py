"""The speed of GPTQ on one expert of Qwen3-Coder-480B's shapes, by qconv and by its peers.

gate and up are [2560, 6144], down [6144, 2560], with 13,000 tokens; 4 bits, groups of 128, blocks of 128, damping 0.01.
What is timed is the accumulation of the second moments and the quantization, not loading or packing. Every run is a
process of its own in the environment of the code that it calls, with the same weights, inputs and number of threads;
tools take turns, so that none has the machine at its best moments alone.

qconv quantizes as its pipeline does, as many experts at a time as there are threads, each on one; its time is that of
all over their number, its memory that of all. The peers quantize one expert with all threads.

Times are wall times and, since other work on the machine disturbs these, the processor's, summed over threads. Errors
are those of the outputs of gate, up and down relative to the outputs' squares.

Run from the repository's root: ``python -m evals.peers.speed``.
"""

# Only light imports here: a child's maximum resident set starts at that of the process that spawned it.
from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from evals.peers import client
from qconv.errors import QconvError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Contestant:
    """Where the code runs, the client's name, and its arguments after the answer's path."""

    environment: str | None
    script: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """A client's answer; see ``clients/expert.py``."""

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    peak_memory: int
    error: dict[str, float]


BASELINE = "qconv"
CONTESTANTS = {
    BASELINE: Contestant(None, "qconv_expert", ("workers",)),
    "qconv, one expert at a time": Contestant(None, "qconv_expert", ("alone",)),
    "qconv, clipping search": Contestant(None, "qconv_expert", ("clipped",)),
    "llm-compressor": Contestant("llmcompressor", "llmcompressor_expert"),
    "GPTQModel": Contestant("gptqmodel", "gptqmodel_expert"),
}


@click.command(help=__doc__)
@click.option("--threads", type=click.IntRange(min=1), default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CONTESTANTS)), default=list(CONTESTANTS))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(threads: int, repeats: int, only: tuple[str, ...], as_json: bool) -> None:
    runs: dict[str, list[Run]] = {name: [] for name in only}
    try:
        for repeat in range(repeats):
            for name in only:
                runs[name].append(measure(CONTESTANTS[name], threads))
                click.echo(f"{repeat + 1}/{repeats} {name}: {runs[name][-1].seconds:.1f} s", err=True)
        profiled = measure(Contestant(None, "qconv_expert", ("profile",)), threads)
    except QconvError as error:
        click.echo(f"speed.py: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        rows = {name: [asdict(run) for run in found] for name, found in runs.items()}
        click.echo(json.dumps({"threads": threads, "runs": rows, "profile": asdict(profiled)}, indent=2))
    else:
        _print(runs, threads)
        _print_shares(profiled)


def measure(contestant: Contestant, threads: int) -> Run:
    """One run in a process of its own.

    Raises:
        QconvError: the client failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        client.run(contestant.environment, contestant.script, answer, *contestant.arguments, threads=threads)
        return Run(**json.loads(answer.read_text()))


def _print(runs: dict[str, list[Run]], threads: int) -> None:
    title = f"GPTQ of one expert, {threads} threads; seconds of {max(map(len, runs.values()))} runs"
    columns = ("best s", "median s", "ratio", "CPU s", "ratio", "moments s", "peak GiB", "output error")
    table = Table("", *columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    reference = runs.get(BASELINE, next(iter(runs.values())))
    seconds, cpu = min(run.seconds for run in reference), min(run.cpu_seconds for run in reference)
    for name, found in runs.items():
        best = min(found, key=lambda run: run.seconds)
        table.add_row(
            name,
            f"{best.seconds:.1f}",
            f"{statistics.median(run.seconds for run in found):.1f}",
            f"{best.seconds / seconds:.2f}",
            f"{min(run.cpu_seconds for run in found):.1f}",
            f"{min(run.cpu_seconds for run in found) / cpu:.2f}",
            f"{best.phases['second moments']:.1f}",
            f"{max(run.peak_memory for run in found) / GIB:.2f}",
            " ".join(f"{error:.2e}" for error in best.error.values()),
        )
    Console(width=140).print(table)


def _print_shares(profiled: Run) -> None:
    total = sum(profiled.phases.values())
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in profiled.phases.items())
    click.echo(f"qconv's time, one expert at a time: {shares} of {profiled.seconds:.1f} s")


if __name__ == "__main__":
    main()
