"""The best GGUF file of a size, by four ways to choose what each tensor gets; mean KL divergence of whole files.

For each size class the file of llama.cpp's name rounded with an importance matrix, the same mixture calibrated, qconv's
ready mixture of that class, and types chosen by what ``qconv sensitivity`` measured, at most as large as the calibrated
file. All are made through the command line from the same text. Each file is decoded and runs in transformers in
float32 beside the source on held-out text; ratios of mean divergences are paired over documents, with 95 % percentile
bootstrap intervals.

``--outliers`` measures a copy of the model whose norms have some channels sixteen times larger. Finished builds and
what was measured of them are kept in ``--work``; results of several models come together in one file, beside which the
table of docs/evidence/sizes.md is written. Exits with 1 if a ratio's interval reaches above its bar or a file is too
large.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from evals.grids import with_outliers
from evals.options import REPOSITORY, model_option, outliers_option, results_option, work_option
from evals.quality import (
    CALIBRATION,
    RESAMPLES,
    WINDOW,
    Measured,
    compare,
    held_out_text,
    load,
    log_probabilities,
    measure,
    perplexity,
)
from qconv.core.settings import CalibrationSettings
from qconv.errors import QconvError

READY_OF = {"Q4_K_M": "Q4_A", "Q3_K_M": "Q3_A", "Q2_K": "Q2_A"}
"""The ready mixture of the size class of a name of llama.cpp's."""
IMATRIX, MIXTURE, READY, CHOSEN = "imatrix", "mixture", "ready", "chosen"
BARS = {(CHOSEN, MIXTURE): 0.35, (CHOSEN, IMATRIX): 0.13, (READY, IMATRIX): 0.15}
"""The most that a build's divergence may be of another's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One file: KL in nats a token, size in bytes; the divergence that was predicted, of chosen types."""

    build: str
    kl: float
    standard_error: float
    bits_per_weight: float
    size: int
    predicted: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Mean KL of ``build`` over that of ``baseline`` on the same documents, and its 95 % interval."""

    build: str
    baseline: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Text:
    """What builds of a model are calibrated with and measured on."""

    calibration: CalibrationSettings
    held_out: Sequence[Tensor]
    source: Sequence[Tensor]

    @classmethod
    def of(cls, model: Path, calibration_tokens: int, tokens: int) -> Text:
        """The source's log-probabilities on held-out text, and how much text calibration gets."""
        held_out = held_out_text(model, tokens)
        calibration = CALIBRATION.model_copy(update={"tokens": calibration_tokens})
        return cls(calibration, held_out, log_probabilities(load(model), held_out))

    @property
    def options(self) -> tuple[str, ...]:
        """Of the command line, for calibration."""
        return ("--calib", self.calibration.named, "--tokens", str(self.calibration.tokens))


def variant(model: Path, outliers: bool, work: Path) -> tuple[str, Path]:
    """What the model is called in tables, and the folder within ``work`` for its builds."""
    name = f"{model.name}, outliers" if outliers else model.name
    return name, work / name.replace(", ", "-")


def with_outliers_once(model: Path, work: Path) -> Path:
    """The model's copy with outliers in ``work``, made unless it is there."""
    harder = work / model.name
    return harder if harder.exists() else with_outliers(model, harder)


@click.command(help=__doc__)
@model_option
@outliers_option
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(READY_OF)), default=tuple(READY_OF))
@click.option("--tokens", type=click.IntRange(min=WINDOW), default=16384, show_default=True, help="Held-out tokens.")
@click.option("--calibration", type=click.IntRange(min=WINDOW), default=CALIBRATION.tokens, show_default=True)
@work_option("build/target-sizes")
@results_option("target-sizes.json")
def main(
    model: Path, outliers: bool, sizes: tuple[str, ...], tokens: int, calibration: int, work: Path, results: Path
) -> None:
    torch.set_num_threads(1)
    name, work = variant(model, outliers, work)
    try:
        model = with_outliers_once(model, work) if outliers else model
        text = Text.of(model, calibration, tokens)
        found = {size: run_size(model, size, text, work) for size in sizes}
    except QconvError as error:
        click.echo(f"target_sizes.py: {error}", err=True)
        sys.exit(error.exit_code)
    facts = {
        "documents": len(text.held_out),
        "tokens": sum(ids.shape[1] - 1 for ids in text.held_out),
        "source_perplexity": perplexity(compare(text.source, text.source, text.held_out)),
        "calibration_tokens": calibration,
    }
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept[name] = {**facts, "sizes": found}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(kept, indent=2) + "\n")
    results.with_suffix(".md").write_text(table(kept))
    click.echo(table({name: kept[name]}))
    problems = [problem for size, one in found.items() for problem in shortfalls(size, one)]
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(1 if problems else 0)


def run_size(model: Path, size: str, text: Text, work: Path) -> dict[str, Any]:
    """The four files of a size class, made where they are not there yet, and measured."""
    files, bits, predicted = {}, {}, None
    files[IMATRIX], bits[IMATRIX] = quantize(
        model, work / f"{size}-{IMATRIX}", "--fmt", f"gguf:{size}", "--method", "rtn", *text.options
    )
    files[MIXTURE], bits[MIXTURE] = quantize(model, work / f"{size}-{MIXTURE}", "--fmt", f"gguf:{size}", *text.options)
    files[READY], bits[READY] = quantize(
        model, work / f"{size}-{READY}", "--fmt", f"gguf:{READY_OF[size]}", *text.options
    )
    recipe = work / f"{size}-{CHOSEN}.yaml"
    limit = f"{files[MIXTURE].stat().st_size}B"
    sensitivity = measured_sensitivity(model, text, work)
    plan = ("plan", str(model), "--fmt", "gguf", *text.options, "--sensitivity", str(sensitivity))
    predicted = qconv(*plan, "--target-size", limit, "--save", str(recipe))["predicted_kld"]
    files[CHOSEN], bits[CHOSEN] = quantize(model, work / f"{size}-{CHOSEN}", "--recipe", str(recipe))
    measured = {name: measured_once(text, file) for name, file in files.items()}
    rows = [
        Row(
            name,
            one.mean(one.kl),
            one.standard_error(one.kl),
            bits[name],
            files[name].stat().st_size,
            predicted if name == CHOSEN else None,
        )
        for name, one in measured.items()
    ]
    return {
        "builds": [asdict(row) for row in rows],
        "ratios": [asdict(ratio(pair, measured)) for pair in (*BARS, (READY, MIXTURE), (CHOSEN, READY))],
    }


def measured_sensitivity(model: Path, text: Text, work: Path) -> Path:
    """What ``qconv sensitivity`` makes of the calibration text."""
    out = work / "sensitivity"
    qconv("sensitivity", str(model), *text.options, "-o", str(out))
    return out


def quantize(model: Path, out: Path, *options: str) -> tuple[Path, float]:
    """A file through the command line, as a user would; its bits per weight."""
    bits: float = qconv("quantize", str(model), *options, "-o", str(out))["bits_per_weight"]
    return next(file for file in out.glob("*.gguf") if file.name != "imatrix.gguf"), bits


def qconv(*arguments: str) -> dict[str, Any]:
    """What a command answers; one that was interrupted goes on, a finished build stays.

    Raises:
        QconvError: it failed.
    """
    command = [sys.executable, "-m", "qconv", *arguments, "--json"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise QconvError(f"{' '.join(command[1:])} failed:\n{finished.stdout}{finished.stderr}")
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def measured_once(text: Text, file: Path) -> Measured:
    """A file against its source; kept beside the build, for the same held-out text."""
    count = sum(ids.numel() for ids in text.held_out)
    kept = file.parent.with_name(f"{file.parent.name}-{count}.json")
    if kept.exists() and kept.stat().st_mtime_ns > file.stat().st_mtime_ns:
        return Measured(**{name: np.array(values) for name, values in json.loads(kept.read_text()).items()})
    found = measure(text.source, file, text.held_out)
    kept.write_text(json.dumps({name: getattr(found, name).tolist() for name in ("tokens", "kl", "nll", "agree")}))
    return found


def ratio(pair: tuple[str, str], measured: Mapping[str, Measured]) -> Ratio:
    """The paired ratio of mean KL with a bootstrap interval: documents are drawn, both builds see the same."""
    build, baseline = (measured[name].kl for name in pair)
    draws = np.random.default_rng(0).integers(len(build), size=(RESAMPLES, len(build)))
    low, high = np.percentile(build[draws].sum(axis=1) / baseline[draws].sum(axis=1), [2.5, 97.5])
    return Ratio(*pair, float(build.sum() / baseline.sum()), float(low), float(high))


def shortfalls(size: str, found: Mapping[str, Any]) -> list[str]:
    """Bars that are not kept."""
    problems = []
    ratios = {(one["build"], one["baseline"]): one for one in found["ratios"]}
    for pair, bar in BARS.items():
        one = ratios[pair]
        if one["high"] > bar:
            interval = f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            problems.append(f"{size}: {pair[0]} has {interval} of {pair[1]}'s divergence; at most {bar} is the bar")
    sizes = {row["build"]: row["size"] for row in found["builds"]}
    for name in (READY, CHOSEN):
        if sizes[name] > sizes[MIXTURE]:
            problems.append(f"{size}: {name} has {sizes[name]:,} bytes, {MIXTURE} {sizes[MIXTURE]:,}")
    return problems


def table(results: Mapping[str, Any]) -> str:
    """The table of docs/evidence/sizes.md: mean KL divergence x 1000, and chosen and ready files' share of others'."""
    head = ("model, size", IMATRIX, MIXTURE, READY, f"of {IMATRIX}", CHOSEN, f"of {MIXTURE}", f"of {IMATRIX}")
    lines = [" | ".join(("", *head, "")).strip(), "| --- " * len(head) + "|"]
    for model, of_model in results.items():
        for size, found in of_model["sizes"].items():
            rows = {row["build"]: row for row in found["builds"]}
            ratios = {(one["build"], one["baseline"]): one for one in found["ratios"]}
            cells = [
                f"{model}, {size}",
                _kl(rows[IMATRIX]),
                f"{_kl(rows[MIXTURE])}, {rows[MIXTURE]['bits_per_weight']:.2f} bits",
                f"{_kl(rows[READY])}, {rows[READY]['bits_per_weight']:.2f} bits",
                _shown(ratios[READY, IMATRIX]),
                f"{_kl(rows[CHOSEN])}, {rows[CHOSEN]['bits_per_weight']:.2f} bits",
                _shown(ratios[CHOSEN, MIXTURE]),
                _shown(ratios[CHOSEN, IMATRIX]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kl(row: Mapping[str, Any]) -> str:
    return f"{1e3 * row['kl']:.2f} ± {1e3 * row['standard_error']:.2f}"


def _shown(one: Mapping[str, Any]) -> str:
    return f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


if __name__ == "__main__":
    main()
