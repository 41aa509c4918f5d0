"""Builds of a size: whatever is asked for, of whatever model, they come within half a percent of it, never above."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.core.architecture import HEAD, Architecture
from qconv.executors.threads import Threads
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import parse_recipe
from qconv.sensitivity.allocating import Target, allocate, require_reachable
from qconv.sensitivity.errors import Errors
from qconv.sensitivity.palette import Palette
from qconv.sensitivity.palettes import AnyRecipe, palette_of
from qconv.sensitivity.sweep import INPUTS, OUTPUTS, SEEN
from tests.conftest import random_model, save_model

# Layers enough that no single tensor is much more than the half percent that a build may stay below its target.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": (
        "qwen3_moe",
        {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_experts": 4, "norm_topk_prob": True},
    ),
    "dense": ("llama", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}),
    # As SmolLM2: 576 is no multiple of 256, and the head is the embedding.
    "rows of 576": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
}
GGUF = GgufRecipe(type="Q4_K_M")
W4A16 = parse_recipe({"format": "w4a16", "method": "gptq"})
BUILDS: dict[str, tuple[AnyRecipe, tuple[str, ...], float]] = {
    "gguf": (GGUF, (), 0.995),
    "gguf, no IQ types": (GGUF, ("IQ*",), 0.995),
    "w4a16": (W4A16, (), 0.995),
}
"""What is built, without which types, and the least share of the size that is used."""


def invented(model: Architecture, seed: int) -> dict[str, Tensor]:
    """Statistics as a pass over a model gives them, of layers that count very differently."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()

    def some(size: int) -> Tensor:
        return torch.rand(size, generator=generator) + 0.01

    for linear in (one for layer in model.layers for one in layer.linears()):
        found[f"{linear.name}.{OUTPUTS}"] = some(linear.out_features) * some(1) ** 4
        found[f"{linear.name}.{INPUTS}"], found[f"{linear.name}.{SEEN}"] = some(linear.in_features), torch.tensor([9])
    rows, columns = model.embedding.out_features, model.embedding.in_features
    found[f"{model.embedding.name}.{OUTPUTS}"], found[f"{model.embedding.name}.{SEEN}"] = some(columns), some(rows)
    found[f"{HEAD}.{OUTPUTS}"], found[f"{HEAD}.{INPUTS}"] = some(rows), some(columns)
    return found


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_just_below_the_target(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, sizes = MODELS[name]
    layers = 16 if kind == "w4a16" and name == "experts" else 6  # there a layer's experts are one unit of four schemes
    source = Source.open(save_model(random_model(family, num_hidden_layers=layers, **sizes), tmp_path / "model", "5GB"))
    recipe, excluded, share = BUILDS[kind]
    if kind == "w4a16" and name == "rows of 576":
        share = 0.99  # three schemes, and nothing between 4.5 bits and 8.1: near the largest no combination is nearer
    palette: Palette[Any] = palette_of(source, recipe, excluded)
    statistics, chance = invented(source.architecture, 0), random.Random(1)
    smallest = palette.extent(require_reachable(palette, Target(bits=32.0)))
    largest = palette.extent(
        {unit.name: max(palette.names(unit), key=partial(palette.size, unit)) for unit in palette.units}
    )
    with Threads(2) as workers:
        choices = Errors(source, statistics).of(palette, workers)
        monkeypatch.setattr(Errors, "of", lambda *_: choices)
        for _ in range(25):
            size = chance.randint(smallest.files, largest.files)
            found = allocate(source, statistics, palette, Target(size=size), workers).extent
            assert share * size <= found.files <= size
            bits = chance.uniform(smallest.bits, largest.bits)
            found = allocate(source, statistics, palette, Target(bits=bits), workers).extent
            assert share * bits <= found.bits <= bits
