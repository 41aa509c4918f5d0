"""Folding changes nothing in full precision, on transformers' own models, and only with every consumer compensated."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.core.architecture import Architecture, Layer, Linear, Moe, Norm
from qconv.models import architecture
from qconv.models.folding import Folds, folded_vector, norm_scale, spread_heads
from tests.conftest import BUNDLED, random_model, save_model

IDS = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [0]}),
    "qwen2_moe": ("qwen2_moe", {}),  # biases of q, k and v; a shared expert
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
Forget = Callable[[Layer, Linear | Norm, str], bool]
"""Whether folding leaves a tensor of a module as it was."""


def random_scales(layer: Layer, generator: torch.Generator) -> dict[str, Tensor]:
    """Powers of two from 1/4 to 4 for everything that can be folded into, by module name."""

    def scale(size: int) -> Tensor:
        return torch.exp2(torch.randint(-2, 3, (size,), generator=generator).float())

    scales = {norm.name: scale(norm.size) for norm in (layer.input_norm, layer.post_attention_norm)}
    scales[layer.heads.v.name] = scale(layer.heads.v.out_features)
    return scales | {mlp.up.name: scale(mlp.up.out_features) for mlp in layer.mlps()}


def fold(model: Architecture, tensors: dict[str, Tensor], forget: Forget) -> dict[str, Tensor]:
    """A checkpoint's tensors with random scales folded into every layer."""
    generator = torch.Generator().manual_seed(2)
    folded = dict(tensors)
    for layer in model.layers:
        folds = Folds.of(model, layer, random_scales(layer, generator))
        modules: list[Linear | Norm] = [*layer.norms(), *layer.routers(), *layer.linears()]
        for module in modules:
            for name, _ in module.tensors():
                if not forget(layer, module, name):
                    folded[name] = folds.expected(module, name, tensors[name])
    return folded


def logits(folder: Path) -> Tensor:
    """transformers' own output in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output: Tensor = model.eval()(IDS).logits
    return output


def change(folder: Path, tmp_path: Path, forget: Forget) -> float:
    """How much folding changes the model's output, relative to its largest logit."""
    source = Source.open(folder)
    tensors = {name: source.read(name).clone() for name in source.checkpoint.entries}
    target = tmp_path / "folded"
    target.mkdir()
    save_file(fold(source.architecture, tensors, forget), target / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "config.json", target / "config.json")
    before, after = logits(folder), logits(target)
    return float((after - before).abs().max() / before.abs().max())


def nothing(layer: Layer, module: Linear | Norm, name: str) -> bool:
    """Forgets nothing."""
    return False


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint of a family, made once."""

    @functools.cache
    def make(case: str) -> Path:
        model_type, changes = CASES[case]
        return save_model(random_model(model_type, **changes), tmp_path_factory.mktemp("fold") / "model")

    return make


@pytest.mark.parametrize("case", CASES)
def test_full_precision_is_unchanged(checkpoint: Callable[[str], Path], case: str, tmp_path: Path) -> None:
    # Scales that are powers of two move exponents alone: what differs is at most the order of magnitude of an epsilon.
    assert change(checkpoint(case), tmp_path, nothing) < 1e-6


def test_the_bundled_model_is_unchanged(tmp_path: Path) -> None:
    assert change(BUNDLED, tmp_path, nothing) < 1e-6


KINDS: dict[str, Forget] = {
    "router": lambda layer, module, name: module in layer.routers()[:1],
    "shared expert's gate": lambda layer, module, name: module in layer.routers()[1:],
    "input norm": lambda layer, module, name: module == layer.input_norm,
    "post-attention norm": lambda layer, module, name: module == layer.post_attention_norm,
    "q": lambda layer, module, name: module == layer.heads.q,
    "k": lambda layer, module, name: module == layer.heads.k,
    "v": lambda layer, module, name: module == layer.heads.v,
    "v's bias": lambda layer, module, name: name == f"{layer.heads.v.name}.bias",
    "o": lambda layer, module, name: module == layer.heads.o,
    "gates": lambda layer, module, name: module in [mlp.gate for mlp in layer.mlps()],
    "ups": lambda layer, module, name: module in [mlp.up for mlp in layer.mlps()],
    "up's bias": lambda layer, module, name: name in [f"{mlp.up.name}.bias" for mlp in layer.mlps()],
    "downs": lambda layer, module, name: module in [mlp.down for mlp in layer.mlps()],
    "the last expert": lambda layer, module, name: isinstance(module, Linear) and module in layer.mlps()[-1].linears(),
}


ONLY = {  # what not every family has
    "router": {"qwen3_moe", "qwen2_moe", "mixtral"},
    "shared expert's gate": {"qwen2_moe"},
    "v's bias": {"qwen3_moe", "qwen2_moe", "qwen3", "llama"},
    "up's bias": {"llama"},
}


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case in CASES for kind in KINDS if case in ONLY.get(kind, CASES)]
)
def test_leaving_out_any_one_consumer_breaks_the_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, case: str, kind: str
) -> None:
    # 1 % is ten thousand times what rounding explains; other tools' forgotten router changes a real model by 2 to 3 %.
    assert change(checkpoint(case), tmp_path, KINDS[kind]) > 1e-2


def test_the_table_of_producers_covers_every_linear_of_every_family() -> None:
    for model_type, changes in CASES.values():
        config = random_model(model_type, **changes).config.to_dict()
        model = architecture(config)
        assert any(isinstance(layer.mlp, Moe) for layer in model.layers) == ("moe" in model_type or "mix" in model_type)
        for layer in model.layers:
            folds = Folds.of(model, layer, random_scales(layer, torch.Generator().manual_seed(0)))
            for linear in (*layer.linears(), *layer.routers()):
                scale = folds.input_scale(linear)
                assert scale is not None, linear.name
                assert scale.shape == (linear.in_features,)
                assert folds.touches(linear)
            assert not any(folds.touches(norm) for norm in layer.heads.head_norms)


def test_heads_that_share_a_key_value_head_share_its_scale() -> None:
    # Two key-value heads of size 2, three query heads each: head h reads key-value head h // 3.
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert spread_heads(scale, 3, 2).tolist() == [1, 2, 1, 2, 1, 2, 4, 8, 4, 8, 4, 8]
    assert torch.equal(spread_heads(scale, 1, 2), scale)


def test_nothing_folded_is_nothing_changed() -> None:
    folds = Folds.none()
    linear, tensor = Linear("m", 2, 3), torch.ones(2, 3)
    assert not folds.touches(linear)
    assert folds.expected(linear, "m.weight", tensor) is tensor
    assert folds.input_scale(linear) is None
    assert folds.output_scale(linear) is None


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 10**6),
    spread=st.floats(0.0, 9.0),
)
def test_the_scale_of_a_norm_is_what_its_stored_weight_says(dtype: torch.dtype, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(16, generator=generator).to(dtype)
    norm[3] = 0.0
    wanted = torch.exp(spread * (torch.rand(16, generator=generator) - 0.5))
    scale = norm_scale(norm, wanted)
    stored = folded_vector(norm, scale)  # what the build will hold
    assert stored.dtype == dtype
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    assert float(scale[3]) == 1.0  # a channel that carries nothing
    # Dividing by the scale really gives the stored weight, to float32's own precision: the equivalence is exact.
    torch.testing.assert_close(stored.float() * scale, norm.float(), rtol=3e-7, atol=0.0)
    # And it is the wanted scale but for the stored dtype's rounding.
    ratio = (scale / wanted)[norm != 0]
    assert float((ratio - 1).abs().max()) < 2 * torch.finfo(dtype).eps + 1e-6


def test_a_norm_that_would_vanish_keeps_its_weight() -> None:
    norm = torch.tensor([6e-8, 1.0], dtype=torch.float16)  # the smallest float16 there is
    scale = norm_scale(norm, torch.tensor([1e4, 1.0]))
    assert scale.tolist() == [1.0, 1.0]
    assert torch.equal(folded_vector(norm, scale), norm)


def test_folding_leaves_its_input_alone(checkpoint: Callable[[str], Path]) -> None:
    source = Source.open(checkpoint("qwen2_moe"))
    tensors = {name: source.read(name) for name in source.checkpoint.entries}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    fold(source.architecture, tensors, nothing)
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)
