"""Model types of transformers through the whole of qconv: quantized, verified, loaded, streamed; scales folded.

For each type a small random model is made of transformers' own config class and saved by transformers itself. It is
quantized by rounding, by GPTQ and by AWQ in groups of 32; each build is verified against its source, and its logits,
from the loaded and from the streamed build, are compared with those of transformers on the dequantized weights, in
float32: the largest difference, relative to the largest logit. "Folding" is the same for random scales folded wherever
they may be, with nothing rounded. "Faults" is how many were planted, one after the other, and found
(:mod:`evals.planted_faults`). Prints a Markdown table. Exits with 1 if a difference is above the bound, a build
does not verify, or a type that is listed does not work.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import qconv
from evals.model_types import save_random
from evals.options import TINY
from evals.planted_faults import Missed, planted
from qconv.artifacts.folded import FoldedSource
from qconv.artifacts.separation import dense_tensors
from qconv.artifacts.source import Source
from qconv.building.pipeline import quantize
from qconv.checkpoint.config import Config
from qconv.checkpoint.reader import read_json
from qconv.core.architecture import Mixer, Moe
from qconv.errors import QconvError
from qconv.models.folding import output_channels
from qconv.planning.recipe import parse_recipe
from qconv.runtime.dense import write_dense
from qconv.runtime.stream import stream_logits
from qconv.verification.build import verify

SPARSE = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "hunyuan_v1_moe",
    "hy_v3",
    "jamba",
    "laguna",
    "llama4_text",
    "mellum",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
)
DENSE = (
    "bamba",
    "cwm",
    "ernie4_5",
    "helium",
    "hunyuan_v1_dense",
    "internlm3",
    "iquestcoder",
    "llama",
    "ministral3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "seed_oss",
    "smollm3",
)
METHODS = {"rtn": "w4a16", "gptq": "w4a16", "awq": "awq"}
"""Formats by method."""
BOUND = 1e-4
"""A few sums in float32, in another order."""
VOCABULARY = Config(read_json(TINY / "config.json")).integer("vocab_size")
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, slots=True)
class Row:
    """A type: what mixes its tokens, what feeds them forward, and what was measured, by column."""

    model_type: str
    mixers: str
    mlps: str
    found: dict[str, float | str]
    faults: int | str

    @property
    def is_good(self) -> bool:
        """Whether everything worked, within the bound."""
        good = all(isinstance(one, float) and one <= BOUND for one in self.found.values())
        return good and isinstance(self.faults, int)

    def __str__(self) -> str:
        cells = [one if isinstance(one, str) else f"{one:.1e}" for one in self.found.values()]
        return f"| `{self.model_type}` | {self.mixers} | {self.mlps} | {' | '.join(cells)} | {self.faults} |"


def logits_of(folder: Path) -> Tensor:
    """transformers' own, float32 [sequences, tokens, vocabulary]."""
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value.

    Raises:
        ValueError: what is expected says nothing.
    """
    if not float(expected.std()) > 0.1:
        raise ValueError("logits that are all alike")
    return float((found - expected).abs().max() / expected.abs().max())


def built(model: Path, work: Path, method: str) -> float:
    """Quantize, verify, load and stream; the larger of both differences of logits.

    Args:
        model: A checkpoint.
        work: An empty folder.
        method: One of :data:`METHODS`.

    Raises:
        QconvError: it does not work.
        ValueError: verification finds something.
    """
    recipe = parse_recipe(
        {
            "format": METHODS[method],
            "method": method,
            "grid": {"group_size": 32},
            "clip": {"steps": 2},
            "awq": {"search_tokens": 16},
            "calibration": {"tokens": 128, "sequence_length": 32, "shrinkage_tokens": 16},
        }
    )
    made = quantize(model, work / "build", recipe, threads=2, progress=lambda *_: None, log=lambda _: None).out
    report = verify(made, against=model)
    if report.problems or report.not_checked:
        raise ValueError(f"verify: {[*report.problems, *report.not_checked][0]}")
    write_dense(made, work / "dense", torch.float32)
    expected = logits_of(work / "dense")
    with torch.no_grad():
        loaded = relative(qconv.load(made, dtype="float32")(IDS).logits, expected)
    return max(loaded, relative(torch.stack(list(stream_logits(made, list(IDS), dtype="float32"))), expected))


def folded(model: Path, work: Path) -> float:
    """The difference that random powers of two make that are folded wherever scales may be.

    Args:
        model: A checkpoint in float32; in bf16 a norm that adds one to its weight would round.
        work: An empty folder.

    Raises:
        QconvError: the model cannot be read.
        ValueError: nothing was folded.
    """
    source = Source.open(model)
    generator = torch.Generator().manual_seed(0)
    scales = {
        name: torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).float())
        for layer in source.architecture.layers
        for name, channels in output_channels(layer).items()
    }
    weights = FoldedSource.of(source, scales)
    names = [name for name, _ in source.architecture.tensors()]
    if sum(bool((weights.read(name).float() != source.read(name).float()).any()) for name in names) < 10:
        raise ValueError("hardly anything was folded")
    tensors = {
        tensor.name: torch.cat([*tensor.blocks(lambda name: weights.read(name).float())]).contiguous()
        for group in dense_tensors(source.architecture)
        for tensor in group
    }
    work.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, work / name)
    save_file(tensors, work / "model.safetensors", {"format": "pt"})
    return relative(logits_of(work), logits_of(model))


def measured(model_type: str, work: Path) -> Row:
    """All columns of a type."""
    model = save_random(model_type, work / "model", torch.bfloat16, VOCABULARY)
    exact = save_random(model_type, work / "exact", torch.float32, VOCABULARY)
    layers = Source.open(model).architecture.layers
    mixers = {layer.attention.name.rpartition(".")[2]: isinstance(layer.attention, Mixer) for layer in layers}
    named = [f"{name} ({'as found' if found else 'q, k, v, o'})" for name, found in mixers.items()]
    mlps = sorted({"experts" if isinstance(layer.mlp, Moe) else "dense" for layer in layers})
    found: dict[str, float | str] = {}
    for column in (*METHODS, "folding"):
        try:
            found[column] = folded(exact, work / column) if column == "folding" else built(model, work / column, column)
        except (QconvError, ValueError) as error:
            found[column] = f"no: {error}"
    try:
        faults: int | str = planted(model, work / "faults")
    except (QconvError, Missed) as error:
        faults = f"no: {error}"
    return Row(model_type, ", ".join(named), " and ".join(mlps), found, faults)


def rows(types: tuple[str, ...]) -> Iterator[Row]:
    """Each type's, in a folder that is removed again."""
    for model_type in types:
        with tempfile.TemporaryDirectory() as folder:
            yield measured(model_type, Path(folder))


@click.command()
@click.argument("types", nargs=-1)
def main(types: tuple[str, ...]) -> None:
    """Measure TYPES, by default all that are listed."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers does not type it
    print(f"| Type | Mixers | Layers | {' | '.join(METHODS)} | folding | faults |")
    print(f"|---|---|---|{'---|' * (len(METHODS) + 2)}")
    good = True
    for row in rows(types or (*SPARSE, *DENSE)):
        print(row, flush=True)
        good = good and row.is_good
    sys.exit(not good)


if __name__ == "__main__":
    main()
