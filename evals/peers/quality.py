"""The quality of 4-bit GPTQ by qconv and by its peers, llm-compressor and GPTQModel, on the bundled model.

All are calibrated on the same 64 x 512 tokens and quantize the same linears, those of attention and of every expert,
symmetrically by groups of 128. Each peer runs in its own environment and writes a checkpoint, whose dequantized weights
``evals/quality.py`` measures beside those of qconv's builds; intervals are over documents, paired with the first build.

A peer's first row is made with its defaults. Its other rows differ from that in one thing each, which their names say;
the rows "at its best" in all that lowered the divergence, as measured on this very text. qconv's rows are its defaults.

Run from the repository's root: ``python -m evals.peers.quality``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from evals.options import TINY
from evals.peers import client
from evals.quality import CALIBRATION
from qconv.artifacts.build import Build
from qconv.calibration.corpus import build_tokens
from qconv.core.qtensor import Grid
from qconv.errors import QconvError

BITS, GROUP_SIZE = 4, 128


@dataclass(frozen=True, slots=True)
class Own:
    """A build of qconv: arguments of ``qconv quantize``."""

    arguments: tuple[str, ...]

    def make(self, model: Path, tokens: Path, out: Path) -> None:
        """Quantize; calibration is qconv's own reading of the same tokens.

        Raises:
            QconvError: qconv failed.
        """
        command = [sys.executable, "-m", "qconv", "quantize", str(model), "--fmt", "gptq", *self.arguments]
        command += ["--calib", CALIBRATION.named, "--tokens", str(CALIBRATION.tokens), "-o", str(out), "--restart"]
        finished = subprocess.run(command, cwd=client.REPOSITORY, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise QconvError(f"{' '.join(command[1:])} failed:\n{finished.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's build: the environment, the client's name and its options."""

    environment: str
    script: str
    options: dict[str, Any]

    def make(self, model: Path, tokens: Path, out: Path) -> None:
        """Quantize in the peer's environment.

        Raises:
            QconvError: the client failed.
        """
        shutil.rmtree(out, ignore_errors=True)
        # The model is so small that threads wait for each other longer than they compute.
        client.run(self.environment, self.script, model, tokens, out, json.dumps(self.options), threads=1)


def _llm_compressor(**options: Any) -> Peer:
    return Peer("llmcompressor", "llmcompressor_gptq", options)


def _gptqmodel(**options: Any) -> Peer:
    return Peer("gptqmodel", "gptqmodel_gptq", options)


CASES: dict[str, Own | Peer] = {
    "qconv gptq": Own(("--method", "gptq")),
    "qconv awq": Own(("--method", "awq")),
    "qconv rtn": Own(("--method", "rtn")),
    "llm-compressor": _llm_compressor(),
    "llm-compressor, no ordering": _llm_compressor(actorder=None),
    "llm-compressor, routed tokens only": _llm_compressor(moe_calibrate_all_experts=False),
    "llm-compressor, clipping search": _llm_compressor(observer="memoryless_mse"),
    "GPTQModel": _gptqmodel(),
    "GPTQModel, damping 0.01": _gptqmodel(damp_percent=0.01),
    "GPTQModel, no ordering": _gptqmodel(act_group_aware=False),
    "GPTQModel, clipping search": _gptqmodel(mse=2.0),
    "GPTQModel, all tokens to all experts": _gptqmodel(all_experts=True),
    "llm-compressor at its best": _llm_compressor(moe_calibrate_all_experts=False, observer="memoryless_mse"),
    "GPTQModel at its best": _gptqmodel(damp_percent=0.01, mse=2.0),
}


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    default=client.REPOSITORY / "build/peers",
)
@click.option("--reuse", is_flag=True, help="Take the peers' builds that lie in the work folder as they are.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(cases: tuple[str, ...], work: Path, reuse: bool, as_json: bool) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
        tokens = write_tokens(work / "tokens.safetensors")
        builds = {}
        for name in cases:
            case, builds[name] = CASES[name], work / name.replace(",", "").replace(" ", "-")
            if not (reuse and isinstance(case, Peer) and (builds[name] / "config.json").exists()):
                click.echo(f"making {name}", err=True)
                case.make(TINY, tokens, builds[name])
            check(builds[name])
        measured = measure(builds)
    except QconvError as error:
        click.echo(f"quality.py: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps(measured, indent=2))
    else:
        _print(measured)


def write_tokens(path: Path) -> Path:
    """The calibration tokens, int32 [sequences, length] as ``ids``, into a file that every client reads."""
    save_file({"ids": build_tokens(CALIBRATION, TINY).ids}, path)
    return path


def check(path: Path) -> None:
    """That a build holds every linear of every layer on the one grid, and nothing that is missing or superfluous.

    Raises:
        QconvError: it does not; builds of other linears or grids would not be comparable.
    """
    build = Build.open(path)
    linears = [linear for layer in build.architecture.layers for linear in layer.linears()]
    plain = [linear.name for linear in linears if linear.weight in build.checkpoint.entries]
    if plain:
        raise QconvError(f"{path}: {len(plain)} linears are not quantized, the first is {plain[0]}.")
    for grid in {build.grid_of(linear) for linear in linears}:
        if grid != Grid(BITS, GROUP_SIZE, symmetric=True, scale_dtype=grid.scale_dtype):
            raise QconvError(f"{path}: quantized on another grid: {grid}.")
    differing = {name for name, _ in build.expected_tensors()} ^ build.checkpoint.entries.keys()
    if differing:
        raise QconvError(f"{path}: tensors are missing or superfluous: {', '.join(sorted(differing)[:3])} ...")


def measure(builds: dict[str, Path]) -> dict[str, Any]:
    """What ``evals/quality.py`` says of builds, the first of which is the baseline.

    Raises:
        QconvError: it failed.
    """
    command = [sys.executable, str(client.REPOSITORY / "evals/quality.py"), "--model", str(TINY), "--json"]
    for name, path in builds.items():
        command += ["--builds", f"{name}={path}"]
    finished = subprocess.run(command, cwd=client.REPOSITORY, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise QconvError(finished.stderr.strip())
    measured: dict[str, Any] = json.loads(finished.stdout)
    return measured


def _print(measured: dict[str, Any]) -> None:
    builds: Sequence[dict[str, Any]] = measured["builds"]
    baseline, differences = builds[0]["build"], {row["build"]: row for row in measured["differences"]}
    title = (
        f"{measured['tokens']:,} held-out tokens of {measured['documents']} documents;"
        f" source perplexity {measured['source_perplexity']:.3f}"
    )
    table = Table("build", "KL (nats/token)", f"less {baseline}", "95 % interval", "perplexity", "top-1", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in builds:
        gap = differences.get(row["build"])
        interval = ("", "") if gap is None else (f"{gap['kl']:+.5f}", f"{gap['low']:+.5f} to {gap['high']:+.5f}")
        kl = f"{row['kl']:.5f} ± {row['kl_standard_error']:.5f}"
        table.add_row(row["build"], kl, *interval, f"{row['perplexity']:.3f}", f"{row['top1_agreement']:.2%}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
