"""Time and peak memory of quantizing layers of Qwen3-Coder-480B's true shapes.

Makes a random slice of the model (``qconv bench slice``), reads it once so that it lies in the page cache where memory
allows, and runs ``qconv quantize`` on it as a child process: round-to-nearest to w4a16, AWQ and GPTQ with 16,384
calibration tokens, and GGUF without an imatrix and with one collected on as many. Peak memory is the child's own
maximum resident set, mapped file pages included. Speed is quantized weights over the whole run's wall time, so it pays
for start-up, embeddings, head and verification too.

Results are kept by case in evals/results/scale.json, so that cases can be run one at a time; scale.md is made from it.
Exits with 1 if a case exceeds its limit.
"""

# Only light imports here: a child's maximum resident set starts at that of the process that spawned it.
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "evals/results"
INDEX = "model.safetensors.index.json"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Case:
    """What is run, and what it may use: peak memory in GiB, and weights a second with the source in the page cache."""

    arguments: tuple[str, ...]
    memory_limit: float
    speed_limit: float


CASES = {
    "rtn": Case(("--fmt", "w4a16", "--method", "rtn"), memory_limit=4, speed_limit=100e6),
    "awq": Case(("--fmt", "awq", "--method", "awq", "--tokens", "16384"), memory_limit=8, speed_limit=0),
    "gptq": Case(
        ("--fmt", "gptq", "--propagate", "true", "--refine", "0", "--tokens", "16384"), memory_limit=8, speed_limit=0
    ),
    "gguf": Case(("--fmt", "gguf:Q4_K_M"), memory_limit=4, speed_limit=0),
    "gguf-q8_0": Case(("--fmt", "gguf:Q8_0"), memory_limit=4, speed_limit=100e6),
    "gguf-q4_0": Case(("--fmt", "gguf:Q4_0"), memory_limit=4, speed_limit=100e6),
    "gguf-imatrix": Case(
        ("--fmt", "gguf:Q4_K_M", "--method", "rtn", "--tokens", "16384"), memory_limit=4, speed_limit=0
    ),
    "gguf-calibrated": Case(("--fmt", "gguf:Q4_K_M", "--tokens", "16384"), memory_limit=8, speed_limit=0),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Sizes in bytes; ``cached`` says whether source and process fit in the machine's memory together."""

    case: str
    layers: int
    experts: int
    seconds: float
    peak_memory: int
    weights: int
    source_size: int
    build_size: int
    cached: bool
    cores: int
    memory: int

    @property
    def speed(self) -> float:
        """Quantized weights a second."""
        return self.weights / self.seconds

    def problems(self) -> list[str]:
        """Limits that the run exceeded."""
        limits = CASES[self.case]
        found = []
        if self.peak_memory > limits.memory_limit * GIB:
            found.append(f"more than {limits.memory_limit:g} GiB")
        if self.cached and self.speed < limits.speed_limit:
            found.append(f"below {limits.speed_limit / 1e6:g} million weights/s")
        return found


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=list(CASES), show_default=True)
@click.option("--layers", multiple=True, type=click.IntRange(min=1), default=(1, 2), show_default=True)
@click.option("--experts", type=click.IntRange(min=1), default=160, show_default=True)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    default=REPOSITORY / "build/scale",
    help="Folder for slices and builds; needs about 45 GB for two layers.",
)
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    default=RESULTS,
    help="Folder of scale.json and scale.md.",
)
@click.option("--keep", is_flag=True, help="Keep the slices; builds are removed after measuring.")
def main(cases: tuple[str, ...], layers: tuple[int, ...], experts: int, work: Path, results: Path, keep: bool) -> None:
    results.mkdir(parents=True, exist_ok=True)
    failed = False
    for count in layers:
        source = make_slice(work, count, experts)
        for case in cases:
            result = measure(case, source, work / "build")
            failed |= bool(result.problems())
            store(results, result)
            click.echo(_line(result))
        if not keep:
            shutil.rmtree(source)
    sys.exit(1 if failed else 0)


def make_slice(work: Path, layers: int, experts: int) -> Path:
    """A slice of so many layers and experts, made now unless it is there already."""
    out = work / f"slice-{layers}x{experts}"
    if not (out / INDEX).exists():  # which is written last
        shutil.rmtree(out, ignore_errors=True)
        click.echo(f"making a slice of {layers} layers with {experts} experts")
        arguments = ["bench", "slice", "--layers", str(layers), "--experts", str(experts), "-o", str(out)]
        spawn(arguments)
    return out


def measure(case: str, source: Path, out: Path) -> Result:
    """Run one case with a warm page cache."""
    config = json.loads((source / "config.json").read_text())
    size = read_through(sorted(source.glob("*.safetensors")))
    memory = total_memory()
    started = time.monotonic()
    peak = spawn(["quantize", str(source), *CASES[case].arguments, "-o", str(out), "--restart"])
    seconds = time.monotonic() - started
    build_size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in out.glob(pattern))
    shutil.rmtree(out)
    return Result(
        case=case,
        layers=config["num_hidden_layers"],
        experts=config["num_experts"],
        seconds=seconds,
        peak_memory=peak,
        weights=quantized_weights(config),
        source_size=size,
        build_size=build_size,
        cached=size + peak < memory,
        cores=len(os.sched_getaffinity(0)),
        memory=memory,
    )


def spawn(arguments: Sequence[str]) -> int:
    """Run qconv and return its maximum resident set in bytes.

    Raises:
        click.ClickException: it failed.
    """
    process = subprocess.Popen([sys.executable, "-m", "qconv", *arguments], cwd=REPOSITORY)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"qconv {arguments[0]} exited with {process.returncode}")
    return usage.ru_maxrss * 1024  # Linux counts kibibytes


def read_through(files: Iterable[Path]) -> int:
    """Read files to their ends; their size in bytes."""
    size = 0
    buffer = bytearray(8 * 2**20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size


def quantized_weights(config: dict[str, int]) -> int:
    """Weights of q, k, v, o and of every expert's gate, up and down projection, over all layers."""
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    attention = 2 * hidden * queries + 2 * hidden * keys
    experts = config["num_experts"] * 3 * hidden * config["moe_intermediate_size"]
    return config["num_hidden_layers"] * (attention + experts)


def total_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def store(folder: Path, result: Result) -> None:
    """Put a result in place of the last one of its case, and rewrite the table."""
    path = folder / "scale.json"
    known = [Result(**row) for row in json.loads(path.read_text())] if path.exists() else []
    key = (result.case, result.layers, result.experts)
    kept = [row for row in known if (row.case, row.layers, row.experts) != key]
    rows = sorted([*kept, result], key=lambda row: (row.case, row.experts, row.layers))
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    (folder / "scale.md").write_text(table(rows))


def table(rows: Sequence[Result]) -> str:
    """The results as a markdown table."""
    header = (
        "| case | layers x experts | source GB | build GB | wall s | million weights/s | peak memory GiB |"
        " source in page cache | machine | limits |\n"
        "|---|---|--:|--:|--:|--:|--:|---|---|---|\n"
    )
    return header + "".join(_line(row) + "\n" for row in rows)


def _line(row: Result) -> str:
    cells = (
        " ".join(CASES[row.case].arguments),
        f"{row.layers} x {row.experts}",
        f"{row.source_size / 1e9:.1f}",
        f"{row.build_size / 1e9:.1f}",
        f"{row.seconds:.0f}",
        f"{row.speed / 1e6:.0f}",
        f"{row.peak_memory / GIB:.2f}",
        "yes" if row.cached else "no: larger than memory",
        f"{row.cores} cores, {row.memory / GIB:.0f} GiB",
        "; ".join(row.problems()) or "kept",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
