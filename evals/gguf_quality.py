"""What an importance matrix is worth in a GGUF file, and qconv's encoders beside ggml's on the same one.

Quantizes the model without an imatrix and with one collected on 64 x 512 tokens, and lets ggml's own quantizers encode
the same tensors to the same types: without, with the matrix as llama.cpp's program takes it (mean squares, nothing
shrunk, ones for an expert without tokens), and with the importance that qconv makes of it. Each file is decoded and
runs in transformers in float32 beside the source, on text that calibration has not seen: what is measured is the
weights' error alone.

Documents are the units: differences are paired over them, intervals are percentile bootstraps. They say nothing of
luck in rounding, so calibration is repeated with other seeds (``--seeds``), and so are the files made with it. Exits
with 1 if the imatrix does not lower the divergence, or a file of ggml's has a lower one than qconv's, by the 95 %
interval of the mean over seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evals.ggml_speed import Ggml, installed_library
from evals.options import REPOSITORY, model_option, work_option
from evals.quality import (
    CALIBRATION,
    WINDOW,
    Difference,
    Measured,
    compare,
    difference,
    held_out_text,
    load,
    log_probabilities,
    measure,
    perplexity,
)
from qconv.artifacts.gguf_tensors import Importance, encoded, importance_of, parts, uniform
from qconv.artifacts.source import Source
from qconv.core.settings import CalibrationSettings
from qconv.errors import QconvError, UsageError
from qconv.formats.gguf.container import GgufWriter
from qconv.formats.gguf.imatrix import Imatrix, read_imatrix
from qconv.formats.gguf.mixture import FILE_TYPES
from qconv.formats.gguf.names import GgufTensor
from qconv.grids.ggml import GgmlType
from qconv.planning.gguf_plan import plan_gguf
from qconv.planning.gguf_recipe import ImatrixSettings

PLAIN, WITH = "qconv", "qconv, imatrix"
GGML_PLAIN, GGML_WITH, GGML_SAME = "ggml", "ggml, imatrix", "ggml, qconv's importance"
PAIRS = ((WITH, PLAIN), (PLAIN, GGML_PLAIN), (WITH, GGML_WITH), (WITH, GGML_SAME))
"""Which are compared on the same documents; the second is the baseline."""
DIRECT = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@dataclass(frozen=True, slots=True)
class Row:
    """One file. KL in nats a token, size in bytes."""

    file: str
    kl: float
    kl_standard_error: float
    perplexity: float
    top1_agreement: float
    size: int

    @classmethod
    def of(cls, name: str, path: Path, measured: Measured) -> Row:
        """From what was measured."""
        return cls(
            name,
            measured.mean(measured.kl),
            measured.standard_error(measured.kl),
            perplexity(measured),
            measured.mean(measured.agree),
            path.stat().st_size,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """The files of one type, and paired differences between them."""

    files: list[Row]
    differences: list[Difference]


@click.command(help=__doc__)
@model_option
@click.option("--type", "file_types", multiple=True, default=("Q4_K_M",), show_default=True, help="Repeatable.")
@click.option("--tokens", type=click.IntRange(min=WINDOW), default=32768, show_default=True, help="Held-out tokens.")
@click.option("--seeds", type=click.IntRange(min=1), default=4, show_default=True, help="Of the calibration text.")
@click.option("--library", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="libggml-base.so.")
@work_option("build/gguf")
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path, resolve_path=True),
    default=REPOSITORY / "evals/results/gguf-quality.json",
    show_default=True,
)
def main(
    model: Path, file_types: tuple[str, ...], tokens: int, seeds: int, library: Path | None, work: Path, results: Path
) -> None:
    torch.set_num_threads(1)
    try:
        unknown = [name for name in file_types if name not in FILE_TYPES]
        if unknown:
            raise UsageError(f"--type: {unknown[0]} is no GGUF file type.")
        peer = Ggml(library or installed_library())
        texts = [CALIBRATION.model_copy(update={"seed": seed}) for seed in range(seeds)]
        held_out = held_out_text(model, tokens, texts)
        source = log_probabilities(load(model), held_out)
        matrices = [collect(model, text, work / f"imatrix-{text.seed}") for text in texts]
        found = {name: run_type(model, name, matrices, peer, work / name, source, held_out) for name in file_types}
    except QconvError as error:
        click.echo(f"gguf_quality.py: {error}", err=True)
        sys.exit(error.exit_code)
    facts = {
        "model": model.name,
        "documents": len(held_out),
        "tokens": sum(ids.shape[1] - 1 for ids in held_out),
        "source_perplexity": perplexity(compare(source, source, held_out)),
        "calibration": CALIBRATION.model_dump(include={"corpus", "tokens", "sequence_length"}),
        "seeds": seeds,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(
        json.dumps({**facts, "types": {name: asdict(one) for name, one in found.items()}}, indent=2) + "\n"
    )
    show(found)
    problems = [problem for name, one in found.items() for problem in shortfalls(name, one.differences)]
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(1 if problems else 0)


def run_type(
    model: Path,
    file_type: str,
    matrices: Sequence[Path],
    peer: Ggml,
    work: Path,
    source: Sequence[Tensor],
    held_out: Sequence[Tensor],
) -> Result:
    """All files of a type measured; those with an imatrix are means over the matrices."""
    files = {
        PLAIN: [quantize(model, file_type, work / "plain")],
        WITH: [quantize(model, file_type, work / one.parent.name, "--imatrix", str(one)) for one in matrices],
        GGML_PLAIN: [write_with_ggml(model, file_type, peer, None, work / "ggml")],
    }
    for name, importance, folder in ((GGML_WITH, as_llama_cpp, "ggml-imatrix"), (GGML_SAME, as_qconv, "ggml-same")):
        files[name] = [
            write_with_ggml(model, file_type, peer, importance(read_imatrix(one)), work / folder / one.parent.name)
            for one in matrices
        ]
    measured = {name: mean([measure(source, path, held_out) for path in paths]) for name, paths in files.items()}
    rows = [Row.of(name, files[name][0], one) for name, one in measured.items()]
    return Result(rows, [difference(pair, measured) for pair in PAIRS])


def mean(repeated: Sequence[Measured]) -> Measured:
    """The mean of several files on the same documents."""
    kl, nll, agree = (np.mean([getattr(one, name) for one in repeated], axis=0) for name in ("kl", "nll", "agree"))
    return Measured(repeated[0].tokens, kl, nll, agree)


def shortfalls(file_type: str, gaps: Sequence[Difference]) -> list[str]:
    """What the differences say against qconv."""
    problems = []
    for gap in gaps:
        interval = f"{gap.low:+.6f} to {gap.high:+.6f}"
        if (gap.build, gap.baseline) == (WITH, PLAIN) and gap.high >= 0.0:
            problems.append(f"{file_type}: the imatrix does not lower the divergence: {interval}")
        elif gap.low > 0.0:
            problems.append(f"{file_type}: {gap.build} is worse than {gap.baseline}: {interval}")
    return problems


def collect(model: Path, text: CalibrationSettings, out: Path) -> Path:
    """An importance matrix through the command line."""
    options = ("--calib", text.named, "--tokens", str(text.tokens), "--seed", str(text.seed))
    run("imatrix", str(model), *options, "-o", str(out))
    return out / "imatrix.gguf"


def quantize(model: Path, file_type: str, out: Path, *options: str) -> Path:
    """A file through the command line, as a user would."""
    run("quantize", str(model), "--fmt", f"gguf:{file_type}", *options, "-o", str(out))
    return out / f"{model.name}-{file_type}.gguf"


def run(*arguments: str) -> None:
    """Run qconv, anew."""
    command = [sys.executable, "-m", "qconv", *arguments, "--restart", "--json"]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def as_qconv(matrix: Imatrix) -> Importance:
    """The importance that qconv makes of a matrix."""
    settings = ImatrixSettings()
    return importance_of(matrix, float(settings.shrinkage_tokens), settings.exponent)


def as_llama_cpp(matrix: Imatrix) -> Importance:
    """The importance as llama.cpp's program takes it: an expert's own mean squares, or ones where it saw nothing."""

    def of(tensor: GgufTensor, part: int) -> Tensor | None:
        entry = matrix.entry(tensor.name, len(tensor.sources), tensor.columns)
        if entry is None:
            return None
        count = float(entry.counts[part])
        return entry.sums[part] / count if count else torch.ones(tensor.columns)

    return of


def write_with_ggml(model: Path, file_type: str, peer: Ggml, importance: Importance | None, out: Path) -> Path:
    """The same tensors in the same types, encoded by ggml's quantizers."""
    source = Source.open(model)
    plan = plan_gguf(source, file_type, model.name, importance=importance is not None)
    (layout,) = plan.files
    out.mkdir(parents=True, exist_ok=True)

    def blocks(tensor: GgufTensor, type: GGMLQuantizationType) -> Iterator[Tensor]:
        for part, rows in enumerate(parts(source, tensor)):
            weight = torch.cat(list(rows)).float().contiguous()
            columns = None if importance is None else importance(tensor, part)
            yield peer.encode(weight, GgmlType(type), None if columns is None else columns.float().contiguous())

    with GgufWriter(out, layout) as writer:
        for info in layout.tensors:
            tensor = plan.tensors[info.name]
            ours = encoded(source, tensor, info.type, uniform)
            writer.write_blocks(info.name, ours if info.type in DIRECT else blocks(tensor, info.type))
        writer.commit()
    return out / layout.name


def show(found: Mapping[str, Result]) -> None:
    """Print the tables."""
    files = Table("type", "file", "KL divergence", "perplexity", "top-1 agreement")
    gaps = Table("type", "KL of", "less that of", "difference", "95 % interval")
    for name, result in found.items():
        for row in result.files:
            kl = f"{row.kl:.5f} ± {row.kl_standard_error:.5f}"
            files.add_row(name, row.file, kl, f"{row.perplexity:.3f}", f"{100 * row.top1_agreement:.2f} %")
        for gap in result.differences:
            gaps.add_row(name, gap.build, gap.baseline, f"{gap.kl:+.6f}", f"{gap.low:+.6f} to {gap.high:+.6f}")
    console = Console()
    console.print(files)
    console.print(gaps)


if __name__ == "__main__":
    main()
