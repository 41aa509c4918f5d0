"""How far quantized builds are from their bf16 source, on text that calibration has not seen.

Without ``--builds``, quantizes the model by round-to-nearest, AWQ and GPTQ (64 x 512 calibration tokens) and to FP8,
and compares the methods on each grid. Each build's dequantized weights run in transformers in float32 beside the
source; what is measured is the weights' error, not a kernel's.

Documents are whole units: a file is either calibration or held-out text, and errors are over documents, since tokens of
one file are not independent. Standard errors are those of a ratio estimator; intervals are percentile bootstraps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from evals.options import REPOSITORY, json_option, model_option, work_option
from qconv.artifacts.build import Build
from qconv.calibration.corpus import build_tokens, load_tokenizer
from qconv.calibration.documents import STDLIB, documents
from qconv.core.settings import CalibrationSettings
from qconv.errors import QconvError, UsageError
from qconv.runtime.dense import write_dense

CASES = {
    "rtn awq": ("awq", "--method", "rtn"),
    "awq awq": ("awq", "--method", "awq"),
    "rtn w4a16": ("w4a16", "--method", "rtn"),
    "awq w4a16": ("w4a16", "--method", "awq"),
    "gptq w4a16": ("w4a16", "--method", "gptq", "--propagate", "true", "--refine", "0"),
    "rtn fp8": ("fp8", "--method", "rtn"),
    "rtn fp8-dynamic": ("fp8-dynamic", "--method", "rtn"),
}
"""Builds by name: format and options."""
PAIRS = (("awq awq", "rtn awq"), ("awq w4a16", "rtn w4a16"), ("gptq w4a16", "awq w4a16"))
"""Which of them are compared on the same documents, the second being the baseline."""
CALIBRATION = CalibrationSettings(corpus=STDLIB, tokens=64 * 512, sequence_length=512)
WINDOW = 512  # tokens of a document at most, so that no long one decides the mean
SHORTEST = 64  # tokens; in less than that there is hardly any context
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over each document's predicted tokens, float64 [documents] each."""

    tokens: NDArray[np.float64]
    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    agree: NDArray[np.float64]

    def mean(self, values: NDArray[np.float64]) -> float:
        """Per token."""
        return float(values.sum() / self.tokens.sum())

    def standard_error(self, values: NDArray[np.float64]) -> float:
        """Of :meth:`mean`, over documents: a ratio of two sums, linearized (Cochran 1977, section 6.3)."""
        count = len(self.tokens)
        residual = values - self.mean(values) * self.tokens
        return float(np.sqrt(count / (count - 1) * np.square(residual).sum()) / self.tokens.sum())


@dataclass(frozen=True, slots=True)
class Row:
    """One build's result. KL in nats a token, sizes in bytes."""

    build: str
    kl: float
    kl_standard_error: float
    perplexity: float
    top1_agreement: float
    bits_per_weight: float
    size: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean KL of ``build`` minus that of ``baseline`` on the same documents, and its 95 % interval."""

    build: str
    baseline: str
    kl: float
    low: float
    high: float


@click.command(help=__doc__)
@model_option
@click.option("--tokens", type=click.IntRange(min=WINDOW), default=16384, show_default=True, help="Held-out tokens.")
@click.option("--builds", multiple=True, metavar="NAME=PATH", help="Measure these; the first is the baseline.")
@work_option("build/quality")
@json_option
def main(model: Path, tokens: int, builds: tuple[str, ...], work: Path, as_json: bool) -> None:
    try:
        if builds:
            named = dict(_named(build) for build in builds)
            pairs = [(name, next(iter(named))) for name in list(named)[1:]]
        else:
            named = _quantize_all(model, work)
            pairs = list(PAIRS)
        # Matrices this small gain little from threads, and threads that wait for each other collapse on a busy machine.
        torch.set_num_threads(1)
        held_out = held_out_text(model, tokens)
        source = log_probabilities(load(model), held_out)
        measured = {name: measure(source, path, held_out) for name, path in named.items()}
    except QconvError as error:
        click.echo(f"quality.py: {error}", err=True)
        sys.exit(error.exit_code)
    rows = [_row(name, path, measured[name]) for name, path in named.items()]
    source_perplexity = perplexity(compare(source, source, held_out))
    differences = [difference(pair, measured) for pair in pairs]
    if as_json:
        facts = {"documents": len(held_out), "tokens": _predicted(held_out), "source_perplexity": source_perplexity}
        result = {**facts, "builds": list(map(asdict, rows)), "differences": list(map(asdict, differences))}
        click.echo(json.dumps(result, indent=2))
    else:
        _print(rows, differences, source_perplexity, held_out)


def held_out_text(
    model: Path, tokens: int, calibrations: Sequence[CalibrationSettings] = (CALIBRATION,)
) -> list[Tensor]:
    """At least ``tokens`` tokens of standard-library files that no calibration uses, int64 [1, length] each.

    Raises:
        UsageError: the library has too few other files.
    """
    used = {name for settings in calibrations for name in build_tokens(settings, model).documents}
    tokenizer = load_tokenizer(model)
    found: list[Tensor] = []
    count = 0
    for document in documents(CALIBRATION.named, CALIBRATION.seed):
        if document.name in used:
            continue
        ids = tokenizer(next(document.pieces(), ""), split_special_tokens=True, verbose=False).input_ids[:WINDOW]
        if len(ids) < SHORTEST:
            continue
        found.append(torch.tensor([ids]))
        count += len(ids)
        if count >= tokens:
            return found
    raise UsageError(f"only {count:,} held-out tokens in the standard library.", hint="Ask for fewer with --tokens.")


def measure(source: Sequence[Tensor], build: Path, held_out: Sequence[Tensor]) -> Measured:
    """A build's dequantized model against its source's log-probabilities."""
    with tempfile.TemporaryDirectory() as folder:
        write_dense(build, Path(folder), torch.float32)
        return compare(source, log_probabilities(load(Path(folder)), held_out), held_out)


@torch.inference_mode()
def log_probabilities(model: Any, held_out: Sequence[Tensor]) -> list[Tensor]:
    """Of every next token, float32 [length - 1, vocabulary] for each document; all of them stay in memory."""
    return [functional.log_softmax(model(ids).logits[0, :-1].double(), dim=-1).float() for ids in held_out]


def compare(source: Sequence[Tensor], other: Sequence[Tensor], held_out: Sequence[Tensor]) -> Measured:
    """KL divergence of ``other`` from ``source``, ``other``'s negative log-likelihood and top-1 agreement."""
    sums = []
    for p, q, ids in zip(source, other, held_out, strict=True):
        kl = functional.kl_div(q.double(), p.double(), reduction="sum", log_target=True)
        nll = functional.nll_loss(q.double(), ids[0, 1:], reduction="sum")
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        sums.append([len(p), kl.item(), nll.item(), agree.item()])
    return Measured(*np.array(sums, dtype=np.float64).T)


def perplexity(measured: Measured) -> float:
    """Exponential of the mean negative log-likelihood."""
    return float(np.exp(measured.mean(measured.nll)))


def difference(pair: tuple[str, str], measured: dict[str, Measured]) -> Difference:
    """The paired difference of mean KL with a bootstrap interval: documents are drawn, both builds see the same."""
    build, baseline = (measured[name] for name in pair)
    delta = build.kl - baseline.kl
    draws = np.random.default_rng(0).integers(len(delta), size=(RESAMPLES, len(delta)))
    means = delta[draws].sum(axis=1) / build.tokens[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(*pair, build.mean(delta), float(low), float(high))


def _quantize_all(model: Path, work: Path) -> dict[str, Path]:
    """Every case through the command line, as a user would."""
    builds = {}
    for name, (fmt, *options) in CASES.items():
        out = work / name.replace(" ", "-")
        command = [sys.executable, "-m", "qconv", "quantize", str(model), "--fmt", fmt, *options]
        command += ["--calib", CALIBRATION.named, "--tokens", str(CALIBRATION.tokens), "-o", str(out), "--restart"]
        finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise QconvError(f"{' '.join(command[1:])} failed:\n{finished.stderr.strip()}")
        builds[name] = out
    return builds


def _named(build: str) -> tuple[str, Path]:
    name, equals, path = build.partition("=")
    if not equals or not Path(path).is_dir():
        raise UsageError(f"--builds {build}: not NAME=PATH of a folder.")
    return name, Path(path)


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval()


def _row(name: str, path: Path, measured: Measured) -> Row:
    build = Build.open(path)
    linears = [
        linear for layer in build.architecture.layers for linear in layer.linears() if build.is_quantized(linear)
    ]
    prefixes = {linear.name for linear in linears}
    stored = sum(
        entry.nbytes for entry in build.checkpoint.entries.values() if entry.name.rpartition(".")[0] in prefixes
    )
    return Row(
        build=name,
        kl=measured.mean(measured.kl),
        kl_standard_error=measured.standard_error(measured.kl),
        perplexity=perplexity(measured),
        top1_agreement=measured.mean(measured.agree),
        bits_per_weight=8 * stored / max(1, sum(linear.numel for linear in linears)),
        size=sum(file.stat().st_size for file in path.glob("*.safetensors")),
    )


def _predicted(held_out: Sequence[Tensor]) -> int:
    return sum(ids.shape[1] - 1 for ids in held_out)


def _print(rows: Sequence[Row], differences: Sequence[Difference], source: float, held_out: Sequence[Tensor]) -> None:
    title = f"{_predicted(held_out):,} held-out tokens of {len(held_out)} documents; source perplexity {source:.3f}"
    table = Table("build", "KL (nats/token)", "perplexity", "top-1", "bits/weight", "MB", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        kl = f"{row.kl:.5f} ± {row.kl_standard_error:.5f}"
        numbers = (f"{row.perplexity:.3f}", f"{row.top1_agreement:.2%}", f"{row.bits_per_weight:.3f}")
        table.add_row(row.build, kl, *numbers, f"{row.size / 1e6:.1f}")
    console = Console()
    console.print(table)
    for gap in differences:
        verdict = "lower" if gap.high < 0 else "higher" if gap.low > 0 else "not distinguishable"
        interval = f"95 % interval {gap.low:+.5f} to {gap.high:+.5f}"
        console.print(f"KL {gap.build} - {gap.baseline}: {gap.kl:+.5f}, {interval}: {verdict}", highlight=False)


if __name__ == "__main__":
    main()
