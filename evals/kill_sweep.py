"""Kill every command that writes, again and again, and compare what it ends with to an undisturbed run's.

Half of the kills come at a random time, half before the n-th change to the file system, n drawn anew each time. Then
the same command goes on until it is through; a build must be the undisturbed one to the byte, an evaluation and a night
must have measured the same (equal digests of their runs). Exits with 1 if anything differs or was refused.
"""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import yaml
from rich.console import Console
from rich.table import Table

from evals import changes
from evals.kill_resume import differences, digests
from evals.options import work_option
from qconv.building.bench import SliceShape, write_slice

SHAPE = SliceShape(hidden_size=128, expert_width=128, heads=4, kv_heads=4, head_dim=32, vocab_size=512, top_k=2)
TEXT = ("--tokens", "1024", "--sequence-length", "64")
SUITE = {
    "seed": 0,
    "engine": {"dtype": "auto", "rows": 8},
    "noise": None,
    "gates": "default",
    "tasks": [
        {"kind": "text", "name": "stdlib", "corpus": "python-stdlib", "rule": "documents", "context": 64, "stride": 32}
        | {"tokens": 512, "document_tokens": 128}
    ],
}
NIGHT = "2026-01-01"
IMPORTED = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "qconv.calibration.run",
    "qconv.cli.eval_run",
    "qconv.cli.main",
    "qconv.evaluation.engines.local",
    "qconv.evaluation.run",
    "qconv.building.gguf_pipeline",
    "qconv.building.imatrix_pipeline",
    "qconv.building.sensitivity_pipeline",
    "qconv.building.sized_pipeline",
    "qconv.nightly.run",
    "qconv.building.pipeline",
    "qconv.building.several_pipeline",
    "qconv.conversion.pipeline",
)
MOST_RESUMES = 3
"""Runs that a folder may take after its last kill; one is enough where nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command that writes.

    Attributes:
        name: What the table calls it.
        arguments: By the folder that it writes to.
        result: What its folder must hold, by name.
        codes: Exit codes of a run that is through.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    result: Callable[[Path], dict[str, str]] = digests
    codes: tuple[int, ...] = (0,)


@dataclass(slots=True)
class Tally:
    """What became of a command."""

    timed: int = 0
    counted: int = 0
    folders: int = 0
    problems: list[str] = field(default_factory=list)


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=300, show_default=True, help="Over all commands.")
@click.option("--only", multiple=True, help="A command of the table; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
@work_option("build/kill-sweep")
def main(kills: int, only: Sequence[str], seed: int, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = work / "model"
    log = work / "log.txt"
    # In a process of its own as well: a fork of one whose OpenMP has started threads can hang.
    if changes.run(lambda: write_slice(model, layers=2, experts=4, shard_size=200_000, shape=SHAPE), work, log).code:
        raise click.ClickException(f"the model could not be made, see {log}")
    _import_all()
    listed = [one for one in commands(model, work) if not only or one.name in only]
    rows, console = [], Console()
    for number, one in enumerate(listed):
        share = kills // len(listed) + (number < kills % len(listed))
        tally = sweep(
            one, share, work / one.name.replace(":", "-").replace(" ", "-"), random.Random(f"{seed}/{one.name}")
        )
        rows.append((one.name, tally))
        console.print(f"{one.name}: {tally.timed + tally.counted} kills, {len(tally.problems)} problems")
    _print(console, rows)
    sys.exit(1 if any(tally.problems for _, tally in rows) else 0)


def commands(model: Path, work: Path) -> list[Command]:
    """All of them; what they read besides the model is made in ``work``."""
    suite = work / "suite.yaml"
    suite.write_text(yaml.safe_dump(SUITE))
    build, whole, blocks = work / "measured", work / "whole", work / "blocks"
    for folder, given in (
        (build, ("--fmt", "fp8")),
        (whole, ("--fmt", "w4a16", "--method", "rtn", "--group-size", "32", "--max-shard-size", "0.001")),
        (blocks, ("--fmt", "gguf:Q8_0")),
    ):
        made = run_qconv(["quantize", str(model), *given, "-o", str(folder)], work, work / "log.txt")
        if made.code:
            raise click.ClickException(f"quantize exited with {made.code}, see {work / 'log.txt'}")

    def quantize(fmt: str, *more: str) -> Command:
        return Command(fmt, lambda out: ["quantize", str(model), "--fmt", fmt, *more, "-o", str(out)])

    def evaluate(out: Path) -> list[str]:
        given = ["--reference", str(model), "--no-gate", "--suite", str(suite), "--cache", f"{out}-cache"]
        return ["eval", "run", str(build), *given, "-o", str(out)]

    def nightly(out: Path) -> list[str]:
        calibrated = {"format": "awq", "method": "awq", "grid": {"group_size": 32}}
        calibrated["calibration"] = {"tokens": 1024, "sequence_length": 64}
        builds = [
            {"name": "rounded", "reference": str(model), "recipe": "fp8"},
            {"name": "calibrated", "reference": str(model), "recipe": calibrated},
        ]
        config = out.with_suffix(".yaml")
        values = {"work": str(out / "nights"), "history": str(out / "history"), "suites": [str(suite)]}
        config.write_text(yaml.safe_dump(values | {"builds": builds}))
        return ["nightly", str(config), "--date", NIGHT]

    groups = ("--group-size", "32")

    def two_formats(out: Path) -> list[str]:
        formats = ("--fmt", "gptq", "--fmt", "gguf:Q4_0")
        return ["quantize", str(model), *formats, *TEXT, *groups, "--max-shard-size", "0.001", "-o", str(out)]

    def of_a_size(fmt: str, *more: str) -> Callable[[Path], list[str]]:
        wanted = ("--fmt", fmt, *more, "--target-bits", "7", *TEXT, "--max-shard-size", "0.001")
        return lambda out: ["quantize", str(model), *wanted, "-o", str(out)]

    return [
        quantize("awq", "--method", "awq", *TEXT, *groups),
        quantize("gptq", *TEXT, *groups),
        quantize("w4a16", *groups),
        quantize("w8a8", *TEXT, "--kv-cache", "fp8"),
        quantize("fp8"),
        quantize("fp8-dynamic"),
        quantize("fp8-static", *TEXT),
        quantize("gguf:Q8_0", "--max-shard-size", "0.001"),
        quantize("gguf:Q4_0", *TEXT, "--max-shard-size", "0.001"),
        Command("two formats", two_formats),
        Command("convert", lambda out: ["convert", str(build), "--to", "fp8-dynamic", "-o", str(out)]),
        Command("convert to GGUF", lambda out: ["convert", str(whole), "--to", "gguf", "-o", str(out)]),
        Command(
            "convert from GGUF", lambda out: ["convert", str(blocks), "--to", "compressed-tensors", "-o", str(out)]
        ),
        Command("imatrix", lambda out: ["imatrix", str(model), *TEXT, "-o", str(out)]),
        Command("chosen types", of_a_size("gguf")),
        Command("chosen grids", of_a_size("w4a16", *groups)),
        Command("sensitivity", lambda out: ["sensitivity", str(model), *TEXT, "-o", str(out)]),
        Command("eval run", evaluate, measured),
        # A night that says "regression" or "inconclusive" of these random weights is through all the same.
        Command("nightly", nightly, measured, codes=(0, 3, 4)),
    ]


def measured(out: Path) -> dict[str, str]:
    """The digests of the runs below a folder, and of the builds beside them."""
    from qconv.evaluation.history import History
    from qconv.evaluation.record import RUN_NAME, read_run

    found = {str(path.parent.relative_to(out)): read_run(path.parent).digest for path in out.rglob(RUN_NAME)}
    found |= {name: digest for name, digest in digests(out).items() if name.endswith((".safetensors", "SHA256SUMS"))}
    if (out / "history").is_dir():
        with History.open(out / "history") as history:
            counted = Counter(entry.run.digest for entry in history.runs())
        found |= {f"history {digest}": f"{count} times" for digest, count in counted.items()}
    return found


def sweep(command: Command, kills: int, work: Path, chance: random.Random) -> Tally:
    """Kill a command so often, in as many folders as that takes, and compare each with the undisturbed one."""
    tally = Tally()
    work.mkdir()
    log = work / "log.txt"
    reference = run_qconv(command.arguments(work / "reference"), work, log)
    if reference.code not in command.codes:
        tally.problems.append(f"undisturbed: exit {reference.code}, see {log}")
        return tally
    expected = command.result(work / "reference")
    while tally.timed + tally.counted < kills:
        tally.folders += 1
        out = work / f"round-{tally.folders}"
        arguments, left = command.arguments(out), 0
        while tally.timed + tally.counted < kills:
            if (tally.timed + tally.counted) % 2:
                ended = run_qconv(arguments, work, log, before=chance.randint(1, reference.changes))
                tally.counted += ended.killed
            else:
                ended = run_qconv(arguments, work, log, after=chance.uniform(0, reference.seconds))
                tally.timed += ended.killed
            if not ended.killed:
                left = 0
                break
            left = MOST_RESUMES
        while left:
            ended = run_qconv(arguments, work, log)
            left = 0 if ended.code in command.codes else left - 1
        if ended.code not in command.codes:
            tally.problems.append(f"{out.name}: exit {ended.code}, see {log}")
        else:
            found = differences(expected, command.result(out))
            tally.problems += [f"{out.name}: {problem}" for problem in found]
            if not found:
                shutil.rmtree(out)
    return tally


def run_qconv(
    arguments: Sequence[str], folder: Path, log: Path, *, before: int | None = None, after: float | None = None
) -> changes.Ended:
    """Run a command of qconv in a fork of this process."""

    def work() -> None:
        from qconv.cli.main import main

        print("$ qconv", *arguments, flush=True)
        sys.argv = ["qconv", *arguments]
        main()

    return changes.run(work, folder, log, before=before, after=after)


def _import_all() -> None:
    """What the commands import, so that their forks need not; nothing of it begins a thread."""
    for name in IMPORTED:
        importlib.import_module(name)


def _print(console: Console, rows: Sequence[tuple[str, Tally]]) -> None:
    table = Table("command", "kills by time", "by change", "folders", "problems", title="SIGKILL and resume")
    for name, tally in rows:
        counts = (tally.timed, tally.counted, tally.folders, len(tally.problems))
        table.add_row(name, *map(str, counts))
    console.print(table)
    for name, tally in rows:
        for problem in tally.problems:
            console.print(f"{name}: {problem}", highlight=False, style="red")
    total = sum(tally.timed + tally.counted for _, tally in rows)
    bad = any(tally.problems for _, tally in rows)
    console.print(f"{total} kills: {'DIFFERENT' if bad else 'every folder equals the undisturbed one'}")


if __name__ == "__main__":
    main()
