"""Whether the gates see damage, and nothing where there is none.

Damages a build of the model in three ways that leave every file well-formed, with checksums made anew: one expert's
down_proj zeroed, the scales of one layer shifted by one group, one layer's router with its rows permuted. Each must
end in a regression (exit code 3) against the sound build as baseline, and `qconv eval blame` must then name what was
damaged: the layer, and in it the expert or the router. An identical rebuild must pass. So must builds that are as good
as each other, calibrated by GPTQ on different samples and measured on different texts: the A/A runs, where every alarm
is false.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evals.options import REPOSITORY, json_option, model_option, work_option
from qconv.artifacts.build import Build
from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.writer import ShardWriter, sha256_of
from qconv.core.architecture import Layer, Linear, Moe
from qconv.core.qtensor import QTensor
from qconv.errors import QconvError, UsageError
from qconv.evaluation.blame import Blame, Cost
from qconv.evaluation.blaming import blame_run
from qconv.evaluation.cache import Cache
from qconv.evaluation.record import Run
from qconv.evaluation.run import Request, evaluate
from qconv.evaluation.suites import Suite
from qconv.folders.state import CHECKSUMS_NAME
from qconv.verification.checksums import build_files, render_checksums

SUITE = Suite.model_validate(
    {
        "noise": {"tokens": 2048},
        "tasks": [
            {"kind": "text", "name": "stdlib", "context": 512, "stride": 256, "tokens": 16384, "document_tokens": 512},
        ],
    }
)


BLAME_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Named:
    """What a part costs by blame, nats a token, with its 95 % interval."""

    part: str
    kld: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Blamed:
    """What was damaged, and what blame named first: of layers, and of the parts of the dearest."""

    damaged: str
    layers: tuple[Named, ...]
    parts: tuple[Named, ...]

    @property
    def right(self) -> bool:
        """Whether the damaged layer came first, and where one of its parts was damaged, that part."""
        layer, part = self.layers[0].part, self.parts[0].part
        return self.damaged == layer or (self.damaged == part and part.startswith(f"{layer}."))


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation: what of, what was expected and what came out; of damaged builds, what blame said."""

    case: str
    expected: int
    exit_code: int
    kld: float | None
    sentence: str
    blame: Blamed | None = None

    @property
    def right(self) -> bool:
        """Whether it came out as expected."""
        return self.exit_code == self.expected and (self.blame is None or self.blame.right)


@click.command(help=__doc__)
@model_option
@click.option("--fmt", default="w4a16", show_default=True)
@click.option("--method", default="rtn", show_default=True)
@click.option("--rebuilds", type=click.IntRange(min=0), default=5, show_default=True, help="Builds of the A/A runs.")
@click.option("--samples", type=click.IntRange(min=0), default=4, show_default=True, help="Texts of the A/A runs.")
@work_option("build/sensitivity")
@json_option
def main(model: Path, fmt: str, method: str, rebuilds: int, samples: int, work: Path, as_json: bool) -> None:
    shutil.rmtree(work, ignore_errors=True)
    torch.set_num_threads(1)  # the model is so small that threads only wait for each other
    try:
        sound, again = (quantized(model, work / name, fmt, method) for name in ("sound", "again"))
        damaged = {name: damage(sound, work / name, one.change) for name, one in DAMAGES.items()}
        alike = [
            quantized(model, work / f"alike-{seed}", fmt, "gptq", "--seed", str(seed), "--tokens", "16384")
            for seed in range(rebuilds + 1 if rebuilds and samples else 0)
        ]
        bench = Bench(model, SUITE, work / "runs")
        results = [*trial(bench, sound, again, damaged), *a_a(bench, alike, range(1, samples + 1))]
    except QconvError as error:
        click.echo(f"sensitivity.py: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in results], indent=2))
    else:
        _print(results)
    sys.exit(0 if all(one.right for one in results) else 1)


@dataclass(frozen=True, slots=True)
class Bench:
    """Evaluates builds of a model on a suite, each run in a folder of ``work``."""

    model: Path
    suite: Suite
    work: Path

    def run(self, name: str, build: Path, baseline: Run | None, seed: int = 0) -> Run:
        """Measure and judge; ``seed`` chooses the text."""
        request = Request(
            build=build,
            reference=self.model,
            suite=self.suite.model_copy(update={"seed": seed}),
            suite_name="sensitivity",
            out=self.folder(name),
            cache=Cache(self.work / "cache"),
            gates="default",
            baseline=baseline,
        )
        return evaluate(request, progress=lambda *_: None, log=lambda _: None)

    def blame(self, name: str, tokens: int) -> Blame:
        """What costs most in the build of a run."""
        folder = self.folder(name)
        return blame_run(folder, tokens=tokens, worst_layers=1, progress=lambda *_: None, log=lambda _: None)

    def folder(self, name: str) -> Path:
        """A run's."""
        return self.work / name.replace(" ", "-")


def trial(
    bench: Bench, sound: Path, again: Path, damaged: Mapping[str, Path], blame_tokens: int = BLAME_TOKENS
) -> list[Result]:
    """The sound build, every damaged one with its blame, and the rebuild, against the sound build as baseline."""
    baseline = bench.run("sound", sound, None)
    results = [_result("sound build", 0, baseline)]
    for name, build in damaged.items():
        run = bench.run(name, build, baseline)
        found = bench.blame(name, blame_tokens)
        blamed = Blamed(DAMAGES[name].of(Build.open(build)), _named(found.layers), _named(found.parts))
        results.append(replace(_result(name, 3, run), blame=blamed))
    results.append(_result("identical rebuild", 0, bench.run("again", again, baseline)))
    return results


def a_a(bench: Bench, alike: Sequence[Path], seeds: Sequence[int]) -> list[Result]:
    """Every build but the first, against the first as baseline, on the text of every seed."""
    results: list[Result] = []
    for seed in seeds if len(alike) > 1 else ():
        baseline = bench.run(f"text {seed} baseline", alike[0], None, seed)
        for number, build in enumerate(alike[1:], start=1):
            run = bench.run(f"text {seed} build {number}", build, baseline, seed)
            results.append(_result(f"A/A, text {seed}, build {number}", 0, run))
    return results


def quantized(model: Path, out: Path, fmt: str, method: str, *options: str) -> Path:
    """A build, through the command line.

    Raises:
        QconvError: it failed.
    """
    command = [sys.executable, "-m", "qconv", "quantize", str(model), "--fmt", fmt, "--method", method, "-o", str(out)]
    command += options
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QconvError(f"{' '.join(command[1:])} failed:\n{done.stderr.strip()}")
    return out


def zeroed_expert(build: Build) -> dict[str, Tensor]:
    """The down_proj of the first expert in the middle layer, all weights zero."""
    down = _moe(build).experts[0].down
    weight = build.qtensor(down)
    zero = weight.grid.mid if weight.zero_points is None else 0
    zero_points = None if weight.zero_points is None else torch.zeros_like(weight.zero_points)
    return _packed(build, down, replace(weight, codes=torch.full_like(weight.codes, zero), zero_points=zero_points))


def shifted_scales(build: Build) -> dict[str, Tensor]:
    """Every linear of the middle layer with the scales of its groups moved on by one group."""
    tensors: dict[str, Tensor] = {}
    for linear in _middle(build).linears():
        if build.is_quantized(linear):
            weight = build.qtensor(linear)
            tensors |= _packed(build, linear, replace(weight, scales=weight.scales.roll(1, dims=1)))
    return tensors


def permuted_router(build: Build) -> dict[str, Tensor]:
    """The middle layer's router with each row in its neighbour's place: tokens go to wrong experts."""
    router = _moe(build).router
    return {router.weight: build.checkpoint.read(router.weight).roll(1, dims=0)}


@dataclass(frozen=True, slots=True)
class Damage:
    """What is done to a build: the tensors that are replaced, and the name of the layer or part that they are of."""

    change: Callable[[Build], dict[str, Tensor]]
    of: Callable[[Build], str]


DAMAGES: Mapping[str, Damage] = {
    "expert zeroed": Damage(zeroed_expert, lambda build: _moe(build).experts[0].down.name.rpartition(".")[0]),
    "scales shifted": Damage(shifted_scales, lambda build: _middle(build).name),
    "router permuted": Damage(permuted_router, lambda build: _moe(build).router.name),
}


def damage(build_path: Path, out: Path, change: Callable[[Build], dict[str, Tensor]]) -> Path:
    """A copy of a build with some tensors replaced and its checksums made anew."""
    shutil.copytree(build_path, out)
    build = Build.open(build_path)
    replaced = change(build)
    entries = build.checkpoint.entries
    for file in {entries[name].file for name in replaced}:
        inside = sorted((one for one in entries.values() if one.file == file), key=lambda one: one.offset)
        specs = [TensorSpec(one.name, one.dtype, one.shape) for one in inside]
        with ShardWriter(out / file.name, specs) as writer:
            for one in inside:
                tensor = replaced[one.name] if one.name in replaced else build.checkpoint.read(one.name)
                writer.write(one.name, tensor)
            writer.finish()
            writer.publish()
    sums = {name: sha256_of(out / name) for name in build_files(out)}
    (out / CHECKSUMS_NAME).write_text(render_checksums(sums))
    return out


def _middle(build: Build) -> Layer:
    return build.architecture.layers[len(build.architecture.layers) // 2]


def _moe(build: Build) -> Moe:
    mlp = _middle(build).mlp
    if not isinstance(mlp, Moe):
        raise UsageError(f"{build.path}: the middle layer has no experts.", hint="Give a mixture of experts.")
    return mlp


def _packed(build: Build, linear: Linear, weight: QTensor) -> dict[str, Tensor]:
    return dict(build.format.pack(linear.name, weight))


def _result(case: str, expected: int, run: Run) -> Result:
    kld = run.tasks[0].metrics["kld.mean"].value if run.tasks else None
    return Result(case, expected, run.verdict.exit_code, kld, run.verdict.sentence)


def _named(costs: Sequence[Cost]) -> tuple[Named, ...]:
    """The two dearest, with 1.96 standard errors on either side."""
    return tuple(
        Named(one.part.name, one.kld, one.kld - 1.96 * one.error, one.kld + 1.96 * one.error) for one in costs[:2]
    )


def _print(results: Sequence[Result]) -> None:
    table = Table("case", "expected", "exit code", "mean KLD", "verdict")
    for one in results:
        kld = "" if one.kld is None else f"{one.kld:.5f}"
        table.add_row(one.case, str(one.expected), str(one.exit_code), kld, one.sentence)
    blamed = Table("case", "damaged", "named first", "KLD (interval)", "next", "KLD (interval)")
    for one in results:
        if one.blame is not None:
            for costs in (one.blame.layers, one.blame.parts):
                cells = [cell for cost in costs for cell in (cost.part, _interval(cost))]
                blamed.add_row(one.case, one.blame.damaged, *cells)
    console = Console(width=200)
    console.print(table)
    console.print(blamed)
    console.print(f"{sum(one.right for one in results)} of {len(results)} as expected", highlight=False)


def _interval(cost: Named) -> str:
    return f"{cost.kld:.5f} ({cost.low:.5f} to {cost.high:.5f})"


if __name__ == "__main__":
    main()
