"""Kill a run at random moments, resume it each time, and compare the result with an undisturbed run's, byte for byte.

The delay before each SIGKILL is drawn uniformly over the undisturbed run's duration. When a build is finished before
its kill, the count goes on in a fresh folder. Exits with 1 if any file of any folder differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "evals/models/tiny-coder-moe"
JOURNAL = Path(".qconv/journal.jsonl")
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Kill:
    """What a kill left behind: which folder, seconds after the start, a finished build or how much of the journal."""

    round: int
    delay: float
    complete: bool
    units: int
    lines: int


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    default=TINY,
    show_default=True,
)
@click.option("--fmt", default="awq", show_default=True)
@click.option("--tokens", type=int, default=4096, show_default=True, help="Calibration tokens.")
@click.option("--max-shard-size", metavar="GB", help="Of a file of the build, so that small models have several.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the delays.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    default=REPOSITORY / "build/kill-resume",
)
def main(kills: int, model: Path, fmt: str, tokens: int, max_shard_size: str | None, seed: int, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log = work / "log.txt"
    command = [sys.executable, "-m", "qconv", "quantize", str(model), "--fmt", fmt, "--tokens", str(tokens)]
    command += [] if max_shard_size is None else ["--max-shard-size", max_shard_size]
    command.append("-o")

    reference = work / "reference"
    started = time.monotonic()
    run(command, reference, log)
    duration = time.monotonic() - started

    delays = random.Random(seed)
    done: list[Kill] = []
    finished: list[Path] = []
    while len(done) < kills:
        out = work / f"round-{len(finished) + 1}"
        while len(done) < kills and not complete(out):
            delay = delays.uniform(0, duration)
            if run(command, out, log, kill_after=delay):
                break
            done.append(Kill(len(finished) + 1, delay, complete(out), *journalled(out)))
        run(command, out, log)  # ends what the last kill interrupted; on a finished folder it has nothing to do
        finished.append(out)

    expected = digests(reference)
    problems = [f"{out.name}: {problem}" for out in finished for problem in differences(expected, digests(out))]
    _print(done, duration, len(expected), len(finished), problems)
    sys.exit(1 if problems else 0)


def run(command: Sequence[str], out: Path, log: Path, kill_after: float | None = None) -> bool:
    """Run the command on a folder, in a process group of its own; whether it finished before ``kill_after`` seconds.

    Raises:
        click.ClickException: it failed by itself.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, str(out)], cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True
        )
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise click.ClickException(f"{out.name}: quantize exited with {code}:\n{tail}")
    return True


def complete(out: Path) -> bool:
    """Whether a folder holds a finished build: its checksums are there and the journal is gone."""
    return (out / CHECKSUMS).exists() and not (out / JOURNAL).exists()


def journalled(out: Path) -> tuple[int, int]:
    """Committed units and whole lines in a folder's journal."""
    try:
        lines = (out / JOURNAL).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0, 0
    return sum(json.loads(line)["kind"] == "unit" for line in lines), len(lines)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is missing, added or different."""
    return (
        [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
        + [f"{name} is not in the undisturbed build" for name in sorted(found.keys() - expected.keys())]
        + [f"{name} differs" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    )


def _print(done: Sequence[Kill], duration: float, files: int, rounds: int, problems: Sequence[str]) -> None:
    console = Console()
    table = Table("kill", "folder", "after (s)", "units committed", "journal lines", title="SIGKILL and resume")
    for column in table.columns:
        column.justify = "right"
    for number, kill in enumerate(done, start=1):
        journal = ("all", "removed") if kill.complete else (str(kill.units), str(kill.lines))
        table.add_row(str(number), str(kill.round), f"{kill.delay:.2f}", *journal)
    console.print(table)
    console.print(
        f"undisturbed run: {duration:.1f} s; {len(done)} kills, {rounds} folders of {files} files", highlight=False
    )
    for problem in problems:
        console.print(problem, highlight=False, style="red")
    console.print(
        "DIFFERENT" if problems else "byte-identical: every file of every folder equals the undisturbed run's"
    )


if __name__ == "__main__":
    main()
