"""What two builds of one calibration cost beside one: time, processor time and peak memory, interleaved.

Runs ``qconv quantize`` as a child process for each of two formats alone, with ``--no-propagate``, and for both at once,
in turns, so that a machine whose load changes slows all of them alike; then checks that both folders have the bytes of
the builds that were made alone. The ratio is that of the medians: both at once over the dearer one alone. Exits with 1
if a byte differs or a ratio of processor time is not below the limit.

With ``--experts N`` the model is two layers of random weights of Qwen3-Coder-480B's true widths with so many experts,
of which each token takes all: attention is narrower, so that the experts decide, as they do with 160 of them. It is two
layers, since nobody needs the outputs of the last one, which are a large part of what builds share.
"""

# Only light imports here: a child's maximum resident set starts at that of the process that spawned it.
from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from evals.options import model_option, work_option

LIMIT = 1.6
PAIRS = (("gptq", "gguf:Q4_K_M"), ("awq", "w4a16"))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: seconds by the clock, seconds of processors, and bytes at the peak."""

    wall: float
    processor: float
    memory: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two formats alone and together; medians."""

    formats: tuple[str, str]
    alone: tuple[Cost, Cost]
    together: Cost

    @property
    def wall_ratio(self) -> float:
        """Together over the dearer one alone, by the clock."""
        return self.together.wall / max(one.wall for one in self.alone)

    @property
    def ratio(self) -> float:
        """The same in processor time, which a busy machine leaves as it is."""
        return self.together.processor / max(one.processor for one in self.alone)


@click.command(help=__doc__)
@model_option
@click.option("--pair", "pairs", multiple=True, metavar="A,B", help="Two formats; by default two pairs.")
@click.option("--tokens", type=click.IntRange(min=1), default=32768, show_default=True)
@click.option("--experts", type=click.IntRange(min=2), help="Take layers of true widths with so many experts.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--limit", type=float, default=LIMIT, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@work_option("build/several-targets")
def main(
    model: Path,
    pairs: Sequence[str],
    tokens: int,
    experts: int | None,
    rounds: int,
    limit: float,
    as_json: bool,
    work: Path,
) -> None:
    """Measure, compare, print."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if experts is not None:
        model = true_layers(work / "model", experts)
    chosen = [(first, second) for first, _, second in (pair.partition(",") for pair in pairs)] or list(PAIRS)
    problems: list[str] = []
    results = []
    for pair in chosen:
        result = measured(model, pair, tokens, rounds, work, problems)
        results.append(result)
        if not result.ratio < limit:
            problems.append(f"{' and '.join(pair)}: {result.ratio:.2f} times of one, the limit is {limit}")
        if not as_json:
            click.echo(shown(result))
    if as_json:
        ratios = ({"ratio": one.ratio, "wall_ratio": one.wall_ratio} for one in results)
        click.echo(json.dumps([asdict(one) | more for one, more in zip(results, ratios, strict=True)], indent=2))
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(1 if problems else 0)


def measured(
    model: Path, pair: tuple[str, str], tokens: int, rounds: int, work: Path, problems: list[str]
) -> Comparison:
    """Two formats alone and together, in turns; what differs between their bytes goes to ``problems``."""
    costs: dict[str, list[Cost]] = {"together": [], **{fmt: [] for fmt in pair}}
    text = ("--tokens", str(tokens), "--sequence-length", str(min(512, tokens)))
    for _ in range(rounds):
        for name, found in costs.items():
            formats = pair if name == "together" else (name,)
            out = work / folder_of(name)
            shutil.rmtree(out, ignore_errors=True)
            options = [part for fmt in formats for part in ("--fmt", fmt)]
            command = ["quantize", str(model), *options, *text, "--no-propagate", "--json", "-o", str(out)]
            found.append(run(command, work / "log.txt"))
    for fmt in pair:
        alone, together = work / folder_of(fmt), work / "together" / folder_of(fmt)
        problems += [f"{fmt}: {name} has other bytes" for name in different(alone, together)]
    first, second, both = (median(costs[name]) for name in (*pair, "together"))
    return Comparison(pair, (first, second), both)


def folder_of(fmt: str) -> str:
    """The folder of a format within a run's."""
    return fmt.replace(":", "-")


def run(arguments: Sequence[str], log: Path) -> Cost:
    """Run a command of qconv.

    Raises:
        click.ClickException: it failed.
    """
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-m", "qconv", *arguments], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"qconv {' '.join(arguments)} exited with {process.returncode}, see {log}")
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def median(costs: Sequence[Cost]) -> Cost:
    """Of each figure by itself; of memory the most."""
    wall, processor = (statistics.median(getattr(one, name) for one in costs) for name in ("wall", "processor"))
    return Cost(wall, processor, max(one.memory for one in costs))


def different(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same in both folders."""
    names = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    return sorted(str(name) for name in names if not is_same(one / name, other / name))


def is_same(one: Path, other: Path) -> bool:
    """Whether both are there and hold the same."""
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def true_layers(out: Path, experts: int) -> Path:
    """Two layers of random weights of true widths, narrow attention, a small vocabulary; made in a child process."""
    code = (
        "import sys; from pathlib import Path; from qconv.building.bench import SliceShape, write_slice\n"
        "shape = SliceShape(heads=16, kv_heads=2, vocab_size=2048, top_k=int(sys.argv[2]))\n"
        "write_slice(Path(sys.argv[1]), layers=2, experts=int(sys.argv[2]), shape=shape)"
    )
    subprocess.run([sys.executable, "-c", code, str(out), str(experts)], check=True)
    return out


def shown(result: Comparison) -> str:
    """A line for each run, and the ratios."""
    rows = [*zip(result.formats, result.alone, strict=True), (" + ".join(result.formats), result.together)]
    lines = [
        f"{name:24} {cost.wall:8.1f} s  {cost.processor:8.1f} s of processors  {cost.memory / 2**30:6.2f} GiB"
        for name, cost in rows
    ]
    ratio = f"together over the dearer one: {result.wall_ratio:.2f} by the clock, {result.ratio:.2f} in processor time"
    return "\n".join([*lines, ratio, ""])


if __name__ == "__main__":
    main()
