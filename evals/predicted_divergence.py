"""Whether the divergence that ``qconv plan --target-bits`` predicts is the one that builds have.

Eight builds of one size, within half a percent, whose types are chosen in ways that are as far apart as that size
allows, and eight of as many sizes, chosen by sensitivity: rank correlation (Spearman) of predicted and measured mean KL
divergence of whole files on held-out text, and their ratio. Exits with 1 if a correlation is below 0.9, a ratio outside
of 1 to 3, or a size off.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import torch
import yaml

from evals.options import model_option, outliers_option, results_option, work_option
from evals.quality import CALIBRATION, WINDOW
from evals.target_sizes import Text, measured_once, measured_sensitivity, quantize, variant, with_outliers_once
from qconv.artifacts.source import Source
from qconv.errors import QconvError
from qconv.executors.threads import Threads
from qconv.planning.allocation import Choice, choose
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.sensitivity.allocating import Target, read_sensitivity
from qconv.sensitivity.errors import Errors, divergence
from qconv.sensitivity.gguf_types import GgufTypes
from qconv.sensitivity.palette import Unit
from qconv.sensitivity.sweep import OUTPUTS

BITS = 4.25
"""Per weight of the eight builds of one size."""
SIZES = (2.9, 3.3, 3.7, 4.2, 4.7, 5.3, 6.0, 7.0)
"""Bits per weight of the eight builds by sensitivity."""
WITHIN = 0.005
CORRELATION, RATIOS = 0.9, (1.0, 3.0)
"""What is asked for: the least rank correlation, and the range of measured over predicted divergence."""

Choices: TypeAlias = Mapping[str, Sequence[Choice[str]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One build: divergences in nats a token, bits per weight, bytes of the file."""

    build: str
    predicted: float
    kl: float
    standard_error: float
    bits_per_weight: float
    size: int


@click.command(help=__doc__)
@model_option
@outliers_option
@click.option("--tokens", type=click.IntRange(min=WINDOW), default=16384, show_default=True, help="Held-out tokens.")
@click.option("--calibration", type=click.IntRange(min=WINDOW), default=CALIBRATION.tokens, show_default=True)
@work_option("build/predicted-divergence")
@results_option("predicted-divergence.json")
def main(model: Path, outliers: bool, tokens: int, calibration: int, work: Path, results: Path) -> None:
    torch.set_num_threads(1)
    name, work = variant(model, outliers, work)
    try:
        model = with_outliers_once(model, work) if outliers else model
        text = Text.of(model, calibration, tokens)
        found = run(model, text, work)
    except QconvError as error:
        click.echo(f"predicted_divergence.py: {error}", err=True)
        sys.exit(error.exit_code)
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept[name] = {
        "tokens": sum(ids.shape[1] - 1 for ids in text.held_out),
        "calibration_tokens": calibration,
        **{series: {"builds": list(map(asdict, rows)), **summary(rows)} for series, rows in found.items()},
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(kept, indent=2) + "\n")
    problems = [f"{series}: {problem}" for series, rows in found.items() for problem in shortfalls(rows)]
    sizes = [row.size for row in found["one size"]]
    if max(sizes) > (1.0 + WITHIN) * min(sizes):
        problems.append(f"one size: {min(sizes):,} to {max(sizes):,} bytes")
    for series, rows in found.items():
        click.echo(f"{series}: {summary(rows)}")
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(1 if problems else 0)


def run(model: Path, text: Text, work: Path) -> dict[str, list[Row]]:
    """Both series, made where they are not there yet, and measured."""
    statistics = read_sensitivity(measured_sensitivity(model, text, work))
    source = Source.open(model)
    calibration = text.calibration.model_dump(include={"corpus", "tokens"})
    palette = GgufTypes(source, parse_gguf_recipe({"format": "gguf", "type": "Q4_K_M", "calibration": calibration}))
    errors_alone = {name: one for name, one in statistics.items() if not name.endswith(f".{OUTPUTS}")}
    with Threads() as workers:
        choices = Errors(source, statistics).of(palette, workers)
        by_outputs = Errors(source, errors_alone).of(palette, workers)
    ways: dict[str, Choices] = {name: weighted(choices, palette.units, factor) for name, factor in FACTORS.items()} | {
        "by output errors alone": by_outputs,
        "no IQ types": {name: [one for one in of if not one.kind.startswith("IQ")] for name, of in choices.items()},
    }
    series: dict[str, dict[str, tuple[Choices, float]]] = {
        "one size": {name: (of, BITS) for name, of in ways.items()},
        "sizes": {f"{bits} bits": (choices, bits) for bits in SIZES},
    }

    def row(name: str, of: Choices, bits: float) -> Row:
        chosen = allocated(palette, of, Target(bits=bits))
        loss = sum(next(one.loss for one in choices[unit] if one.kind == kind) for unit, kind in chosen.items())
        recipe = work / f"{name.replace(' ', '-')}.yaml"
        recipe.write_text(yaml.safe_dump(palette.recipe_for(chosen).model_dump(mode="json", exclude_unset=True)))
        file, real = quantize(model, work / recipe.stem, "--recipe", str(recipe))
        measured = measured_once(text, file)
        made = Row(
            name,
            divergence(loss, source.architecture),
            measured.mean(measured.kl),
            measured.standard_error(measured.kl),
            real,
            file.stat().st_size,
        )
        click.echo(shown(made))
        return made

    return {name: [row(build, *how) for build, how in builds.items()] for name, builds in series.items()}


def allocated(palette: GgufTypes, choices: Choices, target: Target) -> dict[str, str]:
    """The types of a size, and of no more than that."""
    sizes = {name: {one.kind: one.size for one in of} for name, of in choices.items()}
    least = {name: min(of, key=lambda kind: of[kind]) for name, of in sizes.items()}
    budget = sum(sizes[name][kind] for name, kind in least.items()) - target.over(palette.extent(least))
    found = choose(choices, budget)
    if found is None:
        raise QconvError(f"no build of {target.bits} bits per weight.")
    return {name: one.kind for name, one in found.items()}


def weighted(choices: Choices, units: Sequence[Unit], factor: Callable[[Unit], float]) -> Choices:
    """The same with other losses, so that bits go elsewhere."""
    by_name = {unit.name: factor(unit) for unit in units}
    return {name: [Choice(one.kind, one.size, by_name[name] * one.loss) for one in of] for name, of in choices.items()}


def _random(seed: int, spread: float) -> Callable[[Unit], float]:
    """Log-normal; two thirds of them are within a factor of ``spread``."""

    def factor(unit: Unit) -> float:
        generator = np.random.default_rng([seed, zlib.crc32(unit.name.encode())])
        return math.exp(math.log(spread) * generator.standard_normal())

    return factor


FACTORS: dict[str, Callable[[Unit], float]] = {
    "by sensitivity": lambda unit: 1.0,
    "first layers": lambda unit: 1.0 if unit.layer is None else 4.0 ** (2 - unit.layer),
    "attention low": lambda unit: 1 / 64 if "attn" in unit.role else 1.0,
    "embeddings and head low": lambda unit: 1 / 64 if unit.layer is None else 1.0,
    "at random, 1": _random(1, 4.0),
    "at random, 2": _random(2, 16.0),
}
"""What a unit's loss counts when bits are given out, beside two ways that are not by sensitivity at all."""


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Rank correlation, and the range of measured over predicted."""
    ratios = [row.kl / row.predicted for row in rows]
    return {
        "spearman": spearman([row.predicted for row in rows], [row.kl for row in rows]),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of ranks; no two values are equal."""
    one, other = (np.argsort(np.argsort(values)) for values in (first, second))
    return float(np.corrcoef(one, other)[0, 1])


def shortfalls(rows: Sequence[Row]) -> list[str]:
    """What is asked for and does not hold."""
    found, problems = summary(rows), []
    if found["spearman"] < CORRELATION:
        problems.append(f"rank correlation {found['spearman']:.2f}")
    low, high = RATIOS
    for row in rows:
        if not low <= row.kl / row.predicted <= high:
            problems.append(f"{row.build}: measured over predicted is {row.kl / row.predicted:.2f}")
    return problems


def shown(row: Row) -> str:
    """In a line."""
    kl = f"{1e3 * row.kl:.3f} ± {1e3 * row.standard_error:.3f}"
    ratio = f"{row.kl / row.predicted:.2f} of the predicted {1e3 * row.predicted:.3f}"
    return f"{row.build}: {row.bits_per_weight:.3f} bits, KL x 1000 {kl}, {ratio}"


if __name__ == "__main__":
    main()
