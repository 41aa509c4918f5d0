"""Scales of a cache: the largest keys and values that the quantized model gives to transformers' cache, over 448."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qconv
from qconv.artifacts.build import Build
from qconv.artifacts.source import Source
from qconv.calibration.corpus import build_tokens
from qconv.errors import RecipeError
from qconv.folders.state import CHECKSUMS_NAME
from qconv.formats import get_format
from qconv.planning.plan import plan_of
from qconv.planning.recipe import Recipe, load_recipe
from qconv.runtime.engine_rounding import cache_rounding, rounds_inputs
from qconv.runtime.files import open_files
from qconv.runtime.stream import stream_logits
from qconv.verification.build import verify
from tests.conftest import GRIDS, build, folder_bytes, random_model, save_model, small_recipe
from tests.gguf_families import saved

IDS = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(2))


def recipe(method: str = "rtn", output_format: str = "w4a16", **changes: Any) -> Recipe:
    return small_recipe(method, output_format, kv_cache="fp8", grid=GRIDS.get(output_format, {}), **changes)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sparse model whose rows hold every format's groups; do not write to it."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    return save_model(random_model("qwen3_moe", **sizes), tmp_path_factory.mktemp("cached") / "model")


def largest_cached(folder: Path, tokens: Tensor) -> list[tuple[float, float]]:
    """Of each layer, what the build's own weights give to transformers' cache."""
    model = qconv.load(folder, dtype=torch.float32, backend="reference")
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    return [(float(layer.keys.abs().max()), float(layer.values.abs().max())) for layer in cache.layers]


@pytest.mark.parametrize(
    ("method", "output_format"),
    [
        ("rtn", "w4a16"),
        ("gptq", "w4a16"),
        ("awq", "w4a16"),
        ("rtn", "fp8_static"),
        ("rtn", "w8a8"),
        ("rtn", "nvfp4_modelopt"),
    ],
)
def test_scales_are_what_the_cache_is_given(method: str, output_format: str, moe: Path, tmp_path: Path) -> None:
    made = build(moe, tmp_path / "out", recipe(method, output_format)).out
    assert verify(made, moe).problems == []
    section = json.loads((made / "config.json").read_text())["quantization_config"]
    naming = get_format(output_format).cache
    assert naming is not None
    assert naming.section.items() <= section.items()
    if output_format == "nvfp4_modelopt":
        beside = json.loads((made / "hf_quant_config.json").read_text())
        assert beside["quantization"]["kv_cache_quant_algo"] == "FP8"
    tokens = build_tokens(recipe().calibration, moe).ids.long()
    stored = Build.open(made).checkpoint
    for layer, found in enumerate(largest_cached(made, tokens)):
        specs = naming.specs(f"model.layers.{layer}.self_attn", torch.bfloat16)
        for spec, largest in zip(specs, found, strict=True):
            scale = stored.read(spec.name)
            assert (scale.dtype, tuple(scale.shape)) == (spec.dtype, spec.shape)
            # Activations lie in bf16 between layers: a relative 2**-8 a layer, and outliers carry it on.
            assert float(scale) * 448 == pytest.approx(largest, rel=0.03)


def test_folding_into_values_is_in_their_scale(moe: Path, tmp_path: Path) -> None:
    """AWQ divides rows of v: what is cached is smaller, and so is its scale."""
    made = build(moe, tmp_path / "out", recipe("awq", "w4a16")).out
    opened = Build.open(made)
    layer = opened.architecture.layers[0]
    assert layer.heads.v.name in opened.fold_scales(layer)


def test_weights_are_those_of_a_build_without(moe: Path, tmp_path: Path) -> None:
    plain = build(moe, tmp_path / "plain", small_recipe("rtn", "w4a16")).out
    made = build(moe, tmp_path / "out", recipe()).out
    ours, theirs = (
        {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        for folder in (made, plain)
    )
    added = ours.keys() - theirs.keys()
    assert added == {f"model.layers.{layer}.self_attn.{one}_scale" for layer in (0, 1) for one in "kv"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert json.loads((plain / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None


def test_stopped_in_each_layer_it_ends_with_the_same_bytes(moe: Path, tmp_path: Path) -> None:
    whole = folder_bytes(build(moe, tmp_path / "whole", recipe("gptq")).out)
    for layer in ("layer-00000", "layer-00001", "head"):

        def stop(key: str, done: int, total: int, layer: str = layer) -> None:
            if key == layer:
                raise KeyboardInterrupt

        out = tmp_path / layer
        with pytest.raises(KeyboardInterrupt):
            build(moe, out, recipe("gptq"), progress=stop)
        build(moe, out, recipe("gptq"))
        assert folder_bytes(out) == whole


def test_engines_rounding_is_emulated_whole_and_streamed(moe: Path, tmp_path: Path) -> None:
    made = build(moe, tmp_path / "out", recipe()).out
    files = open_files(made)
    assert rounds_inputs(files)
    rounding = cache_rounding(files, files.architecture.layers[1])
    assert rounding is not None
    assert float(rounding.keys.scale or 0) != float(rounding.values.scale or 0)
    options: dict[str, Any] = {"dtype": torch.float32, "backend": "reference"}
    with torch.inference_mode():
        exact, rounded = (
            qconv.load(made, round_inputs=one, **options)(input_ids=IDS).logits[0] for one in (False, True)
        )
        model = qconv.load(made, round_inputs=True, **options)
        cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=IDS[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    (streamed,) = stream_logits(made, [IDS[0]], round_inputs=True, **options)
    size = float(exact.abs().max())
    assert 1e-4 * size < float((rounded - exact).abs().max()) < 0.5 * size
    # A value that lies on a tie may be rounded the other way; all others agree to float32.
    assert float((streamed - rounded).abs().median()) < 1e-5 * size
    assert float((step - rounded[-1]).abs().median()) < 1e-5 * size
    keys = cache.layers[1].keys / rounding.keys.scale
    assert torch.equal(keys, keys.to(torch.float8_e4m3fn).float())


def test_a_scale_that_is_none_is_found(moe: Path, tmp_path: Path) -> None:
    made = build(moe, tmp_path / "out", recipe()).out
    (made / CHECKSUMS_NAME).unlink()
    name = "model.layers.1.self_attn.v_scale"
    for shard in made.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file(tensors | {name: torch.full_like(tensors[name], -1.0)}, shard)
    assert f"{name}: the scale of a cache is not finite and positive" in verify(made).problems


def test_who_has_no_place_for_them_says_so(moe: Path) -> None:
    for output_format in ("awq", "gptq", "fp8"):
        with pytest.raises(RecipeError, match=f"kv_cache: format {output_format} has no place") as refused:
            plan_of(Source.open(moe), recipe("rtn", output_format))
        assert "w4a16" in str(refused.value.hint)


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    _, folder = saved("deepseek_v3", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"kv_cache: model\.layers\.0\.self_attn is no attention"):
        plan_of(Source.open(folder), recipe())


def test_a_recipe_that_does_not_ask_is_the_one_that_it_was() -> None:
    assert "kv_cache" not in load_recipe("w4a16").model_dump()
    assert load_recipe("w4a16", {"kv_cache": "fp8"}).digest() != load_recipe("w4a16").digest()
