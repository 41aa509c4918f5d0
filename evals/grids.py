"""What calibrated rounding is worth on every grid, at the same size: mean KL divergence from the source.

Each build has all linears of the layers in one type; embeddings and head stay in 16 bits. The baseline is what rounding
by the type's own search makes of it with an importance matrix; beside it stand GPTQ on that grid, GPTQ with refinement,
and both with matched calibration. Files are decoded and run in transformers in float32, on text that calibration has
not seen; differences are paired over documents, with 95 % percentile bootstrap intervals.

NVFP4 and MXFP4 are builds of safetensors, in compressed-tensors' layout; their baseline is plain rounding.

``--outliers`` measures a copy of the model whose norms have some channels sixteen times larger, which the linears that
read them make up for exactly: the same function, harder to round.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from evals.options import REPOSITORY, json_option, model_option, outliers_option, work_option
from evals.quality import (
    CALIBRATION,
    Difference,
    Measured,
    difference,
    held_out_text,
    load,
    log_probabilities,
    measure,
)
from qconv.errors import QconvError

TYPES = ("Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
OWN = "imatrix"
METHODS = {
    OWN: ("--method", "rtn"),
    "gptq": ("--method", "gptq", "--refine", "0", "--propagate", "true"),
    "refined": ("--method", "gptq", "--refine", "2", "--propagate", "true"),
    "matched": ("--method", "gptq", "--refine", "1", "--propagate", "matched"),
}
SAFETENSORS = {"NVFP4": "nvfp4", "MXFP4": "mxfp4"}
"""Types that are a format by themselves, by what it is called."""
FACTOR = 16.0
"""Of the outliers: a power of two, so that dividing by it loses no bit of a bf16 weight."""
OUTLIERS = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One build: KL in nats a token, over the baseline's, and the paired difference."""

    type: str
    method: str
    kl: float
    standard_error: float
    ratio: float
    difference: Difference | None


@click.command(help=__doc__)
@model_option
@click.option("--type", "types", multiple=True, default=TYPES, show_default=True, help="Of ggml; repeatable.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), default=tuple(METHODS))
@click.option("--tokens", type=click.IntRange(min=512), default=16384, show_default=True, help="Held-out tokens.")
@outliers_option
@work_option("build/grids")
@json_option
def main(
    model: Path,
    types: Sequence[str],
    methods: Sequence[str],
    tokens: int,
    outliers: bool,
    work: Path,
    as_json: bool,
) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    if outliers:
        model = with_outliers(model, work / "outliers")
    try:
        held_out = held_out_text(model, tokens)
        source = log_probabilities(load(model), held_out)
        rows = []
        for type in types:
            measured = {}
            for method in dict.fromkeys((OWN, *methods)):
                measured[method] = measure(source, build(model, type, method, work), held_out)
                rows.append(row(type, method, measured))
                if not as_json:
                    click.echo(shown(rows[-1]))
    except QconvError as error:
        click.echo(f"grids.py: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in rows], indent=2))
    else:
        _print(rows)


def build(model: Path, type: str, method: str, work: Path) -> Path:
    """A build with all linears of the layers in a type, made through the command line: a folder, or a GGUF file."""
    out = work / f"{model.name}-{type}-{method}"
    kind = ["--fmt", SAFETENSORS.get(type, "gguf:BF16")]
    if type not in SAFETENSORS:
        kind += ["--tensor-type", rf"blk\.[0-9]+\.(attn|ffn)_.*={type}"]
    command = [sys.executable, "-m", "qconv", "quantize", str(model), *kind, *METHODS[method]]
    if type not in SAFETENSORS or method != OWN:
        command += ["--calib", CALIBRATION.named, "--tokens", str(CALIBRATION.tokens)]
    command += ["-o", str(out), "--restart"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise QconvError(f"{' '.join(command[1:])} failed:\n{finished.stderr.strip()}")
    if type in SAFETENSORS:
        return out
    return next(file for file in out.glob("*.gguf") if file.name != "imatrix.gguf")


def with_outliers(model: Path, out: Path) -> Path:
    """A copy of a model, the same function, with a few channels of each norm :data:`FACTOR` times larger."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(0)
    scales: dict[str, torch.Tensor] = {}
    files = sorted(out.glob("*.safetensors"))
    for path in files:
        for name, tensor in load_file(path).items():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                scale = torch.ones(len(tensor))
                scale[torch.randperm(len(tensor), generator=generator)[:OUTLIERS]] = FACTOR
                scales[name.removesuffix(".weight")] = scale
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": (
            "gate_proj",
            "up_proj",
            "mlp.gate",
            "block_sparse_moe.gate",
            "shared_expert_gate",
            "w1",
            "w3",
        ),
    }
    for path in files:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if module in scales:
                tensors[name] = (tensor.float() * scales[module]).to(tensor.dtype)
            for norm, suffixes in readers.items():
                layer = ".".join(module.split(".")[:3])
                if module.endswith(suffixes) and f"{layer}.{norm}" in scales and tensor.dim() == 2:
                    tensors[name] = (tensor.float() / scales[f"{layer}.{norm}"]).to(tensor.dtype)
        save_file(tensors, path, {"format": "pt"})
    return out


def row(type: str, method: str, measured: dict[str, Measured]) -> Row:
    """One build beside the baseline of its type."""
    one, own = measured[method], measured[OWN]
    gap = None if method == OWN else difference((method, OWN), measured)
    return Row(type, method, one.mean(one.kl), one.standard_error(one.kl), one.mean(one.kl) / own.mean(own.kl), gap)


def shown(one: Row) -> str:
    """In a line."""
    gap = "" if one.difference is None else f", {1e3 * one.difference.kl:+.3f}"
    if one.difference is not None:
        gap += f" [{1e3 * one.difference.low:+.3f}, {1e3 * one.difference.high:+.3f}]"
    return f"{one.type} {one.method}: {1e3 * one.kl:.3f} ± {1e3 * one.standard_error:.3f}, {one.ratio:.3f} of own{gap}"


def _print(rows: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(one.method for one in rows))
    table = Table("type", *methods, title="mean KL x 1000, and its part of the type's own rounding")
    for type in dict.fromkeys(one.type for one in rows):
        found = {one.method: one for one in rows if one.type == type}
        table.add_row(type, *(f"{1e3 * found[method].kl:.3f} ({found[method].ratio:.2f})" for method in methods))
    Console().print(table)


if __name__ == "__main__":
    main()
