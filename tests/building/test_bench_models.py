"""Slices of published models: true shapes, the published storage, and qconv reads and quantizes what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qconv.artifacts.source import Source
from qconv.building.bench import SPECIAL_TOKENS, write_slice
from qconv.building.bench_models import PUBLISHED, PublishedModel
from qconv.core.architecture import Architecture, Mixer, Moe
from qconv.errors import UsageError
from qconv.models import architecture
from qconv.verification.build import verify
from tests.conftest import build, small_recipe

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": 300,
}
SIZES = {
    "deepseek-v3": (7168, 2048, 256, 671),
    "kimi-k2": (7168, 2048, 384, 1026),
    "qwen3-next-80b": (2048, 512, 512, 80),
    "glm-4.6": (5120, 1536, 160, 353),
    "gpt-oss-120b": (2880, 2880, 128, 116.8),
}
"""Hidden size, an expert's width, experts, and billions of parameters of the whole model."""
DENSE = {"deepseek-v3": 3, "kimi-k2": 1, "glm-4.6": 3}
"""How many layers have no experts."""


def small(name: str) -> PublishedModel:
    """The model with other widths."""
    published = PUBLISHED[name]
    values = published.values
    changes = {key: size for key, size in SMALL.items() if key in values}
    heads = min(values["num_key_value_heads"], 4) if "q_lora_rank" in values else 2
    return replace(published, values={**values, **changes, "num_key_value_heads": heads})


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str) -> None:
    published = PUBLISHED[name]
    hidden, width, experts, billions = SIZES[name]
    # Only the architecture is made: a layer of each kind tells what all of them have.
    layers = published.values.get("full_attention_interval", 1)
    model = architecture(published.config(layers, published.experts))
    assert published.experts == experts
    layer = model.layers[-1]
    assert isinstance(layer.mlp, Moe)
    assert len(layer.mlp.experts) == experts
    gate = layer.mlp.experts[-1].gate
    assert (gate.out_features, gate.in_features) == (width, hidden)
    # The first layers of some are dense, which a slice leaves out.
    dense = DENSE.get(name, 0)
    total = _mean(model) * (published.layers - dense) + 2 * model.embedding.numel
    if dense:
        config = published.config(1, published.experts) | {"first_k_dense_replace": 1}
        total += dense * _mean(architecture(config))
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def _mean(model: Architecture) -> float:
    """Parameters of a layer."""
    counts = [torch.Size(shape).numel() for layer in model.layers for _, shape in layer.tensors()]
    return sum(counts) / len(model.layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_one_is_read_and_quantized(name: str, tmp_path: Path) -> None:
    model = small(name)
    layers = 4 if "full_attention_interval" in model.values else 2
    write_slice(tmp_path / "slice", layers=layers, experts=16, shape=model, shard_size=400_000)
    source = Source.open(tmp_path / "slice")
    dtypes = set()
    for path in sorted((tmp_path / "slice").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            dtypes |= {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    stored = {"fp8": torch.float8_e4m3fn, "mxfp4": torch.uint8}.get(model.storage)
    assert stored is None or stored in dtypes
    down = source.read(source.architecture.layers[0].mlps()[0].down.weight).float()
    assert 0.01 < float(down.std()) < 0.04
    made = build(tmp_path / "slice", tmp_path / "build", small_recipe("gptq")).out
    assert not verify(made, against=tmp_path / "slice").problems


def test_mixers_are_of_the_kinds_that_are_published() -> None:
    model = architecture(small("qwen3-next-80b").config(4, 16))
    names = [layer.attention.name.rpartition(".")[2] for layer in model.layers]
    assert names == ["linear_attn"] * 3 + ["self_attn"]
    assert isinstance(architecture(small("deepseek-v3").config(1, 16)).layers[0].attention, Mixer)


@pytest.mark.parametrize(
    ("layers", "experts", "said"),
    [
        (62, 256, "62 layers cannot be made: 1 to 61"),
        (1, 257, "257 experts cannot be made: 8 to 256"),
        (1, 12, "they stand in 8 groups"),
    ],
)
def test_what_the_model_does_not_have_is_refused(layers: int, experts: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        write_slice(tmp_path / "slice", layers=layers, experts=experts, shape=PUBLISHED["deepseek-v3"])
    assert not (tmp_path / "slice").exists()
    assert len(SPECIAL_TOKENS) == 3
