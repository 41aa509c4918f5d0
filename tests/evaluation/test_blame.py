"""Blame: a damaged part of a build is found, in every coordinate system that a build may have folded itself into."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from qconv.artifacts.build import Build
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.core.architecture import Layer
from qconv.evaluation import variants
from qconv.evaluation.blame import Blame, Suspect, find_blame
from qconv.evaluation.blaming import suspect
from qconv.models.folding import Folds
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.runtime.files import open_files
from tests.conftest import build, random_model, save_model, small_recipe

SEQUENCES = [torch.randint(3, 2048, (48,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def change(folder: Path, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    """Replace one tensor of a checkpoint."""
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            metadata, names = file.metadata(), set(file.keys())
        if name in names:
            tensors = load_file(shard)
            tensors[name] = edit(tensors[name]).contiguous()
            save_file(tensors, shard, metadata)
            return
    raise AssertionError(f"no tensor {name}")


def put(new: Tensor, old: Tensor) -> Tensor:
    """An edit: another tensor altogether."""
    return new.to(old.dtype)


def blame(model: Path, made: Path, baseline: Path | None = None) -> Blame:
    opened = Build.open(made)

    def folds(layer: Layer) -> Folds:
        return Folds.of(opened.architecture, layer, opened.fold_scales(layer))

    with tempfile.TemporaryDirectory() as scratch:
        return find_blame(
            open_files(model),
            Suspect(open_files(made), folds),
            SEQUENCES,
            Path(scratch),
            baseline=None if baseline is None else suspect(baseline),
            worst_layers=1,
            progress=lambda *_: None,
        )


@pytest.fixture(params=["rtn_build", "awq_build"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A build to be damaged: with nothing folded, and with AWQ's scales folded."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "build"))


def test_a_damaged_expert_is_named(moe: Path, made: Path) -> None:
    scales = "weight_scale" if Build.open(made).format.name == "w4a16" else "scales"
    change(made, f"model.layers.0.mlp.experts.3.down_proj.{scales}", lambda scale: -scale)
    found = blame(moe, made)
    assert found.layers[0].part.name == "model.layers.0"
    assert found.parts[0].part.name == "model.layers.0.mlp.experts.3"
    assert found.parts[0].kld > 2 * found.parts[1].kld
    assert found.whole.kld >= 0.5 * found.layers[0].kld


def test_a_damaged_layer_is_named(moe: Path, tmp_path: Path) -> None:
    # At 8 bits, where either layer's rounding costs little.
    made = build(moe, tmp_path / "build", small_recipe(grid={"bits": 8})).out
    healthy = blame(moe, made).layers[0].part.layer
    other = 1 - int(healthy or 0)
    change(made, f"model.layers.{other}.mlp.experts.3.down_proj.weight_scale", torch.zeros_like)
    found = blame(moe, made)
    assert found.layers[0].part.name == f"model.layers.{other}"
    assert found.parts[0].part.name == f"model.layers.{other}.mlp.experts.3"


def test_a_permuted_router_is_named(moe: Path, made: Path) -> None:
    change(made, "model.layers.0.mlp.gate.weight", lambda weight: weight.roll(1, 0))
    found = blame(moe, made)
    assert found.layers[0].part.name == "model.layers.0"
    assert found.parts[0].part.name == "model.layers.0.mlp.gate"


def test_beside_a_baseline_sound_rounding_hides_nothing(moe: Path, made: Path, tmp_path: Path) -> None:
    """An eighth of one expert's scales is off by a little: by itself that is less than what other parts cost anyway."""
    before = Path(shutil.copytree(made, tmp_path / "before"))
    scales = "weight_scale" if Build.open(made).format.name == "w4a16" else "scales"

    def nudge(scale: Tensor) -> Tensor:
        changed = scale.clone()
        changed.view(-1)[::8] *= 1.25
        return changed

    change(made, f"model.layers.1.mlp.experts.2.down_proj.{scales}", nudge)
    alone, beside = blame(moe, made), blame(moe, made, before)
    assert alone.parts[0].part.name != "model.layers.1.mlp.experts.2", "or this shows nothing"
    assert beside.layers[0].part.name == "model.layers.1"
    assert beside.parts[0].part.name == "model.layers.1.mlp.experts.2"
    others = [one.kld for one in (*beside.layers, *beside.parts) if "layers.1.mlp.experts.2" not in one.part.name]
    assert max(others[1:]) < 0.01 * beside.parts[0].kld, "what did not change costs nothing more"


def test_the_dearest_part_is_measured_the_other_way_round_too(moe: Path, made: Path) -> None:
    change(made, "model.layers.0.mlp.gate.weight", lambda weight: weight.roll(1, 0))
    found = blame(moe, made)
    layer, router = found.layers[0], found.parts[0]
    assert router.without is not None
    assert router.without < 0.5 * layer.kld, "without the damaged part the layer is cheaper"
    assert sum(one.without is not None for one in found.parts) == 5


def test_parts_that_are_wrong_only_beside_others_are_told_apart(moe: Path, moe_copy: Path, tmp_path: Path) -> None:
    """Router and experts permuted alike compute the same: either alone is dear, and the layer is dearer without it."""
    files = open_files(moe)
    layer = files.architecture.layers[0]
    change(moe_copy, "model.layers.0.mlp.gate.weight", lambda weight: weight.roll(1, 0))
    for mlp, before in zip(layer.mlps(), (layer.mlps()[-1], *layer.mlps()[:-1]), strict=True):
        for linear, other in zip(mlp.linears(), before.linears(), strict=True):
            change(moe_copy, linear.weight, partial(put, files.weight(other).dequantize(torch.bfloat16)))
    found = find_blame(
        files,
        suspect(moe_copy),
        SEQUENCES,
        tmp_path,
        worst_layers=2,
        progress=lambda *_: None,
    )
    assert max(one.kld for one in found.layers) < 1e-6
    router = next(one for one in found.parts if one.part.name == "model.layers.0.mlp.gate")
    assert router.kld > 1e-4
    assert router.without is not None
    assert router.without > 1e-4, "no part of a layer that costs nothing is to blame"


def test_costs_are_those_of_transformers_with_the_weights_exchanged(moe: Path, rtn_build: Path) -> None:
    from transformers import AutoModelForCausalLM

    def log_probabilities(folder: Path) -> list[Tensor]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return [functional.log_softmax(model(one[None]).logits[0], dim=-1) for one in SEQUENCES]

    found = blame(moe, rtn_build)
    part = next(one for one in found.parts if ".experts." in one.part.name)
    opened = Build.open(rtn_build)
    exchanged = rtn_build.parent / "exchanged"
    shutil.copytree(moe, exchanged)
    for layer in opened.architecture.layers:
        for linear in layer.linears():
            if linear.name in part.part.modules:
                change(exchanged, linear.weight, partial(put, opened.qtensor(linear).dequantize()))
    pairs = zip(log_probabilities(exchanged), log_probabilities(moe), strict=True)
    sums = [float(functional.kl_div(one, other, reduction="sum", log_target=True)) for one, other in pairs]
    # The exchanged checkpoint is rounded to bfloat16, which is finer than its four bits.
    assert sum(sums) / found.tokens == pytest.approx(part.kld, rel=0.1)


@pytest.mark.parametrize(("name", "value"), [("SCRATCH_BYTES", 1), ("WINDOW_VALUES", 1000), ("LOGIT_BYTES", 9000)])
def test_costs_do_not_depend_on_how_much_is_done_at_once(
    moe: Path, rtn_build: Path, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = blame(moe, rtn_build)
    monkeypatch.setattr(variants, name, value)
    found = blame(moe, rtn_build)
    costs = {one.part.name: one.kld for one in (*found.layers, *found.parts)}
    # Other shapes round otherwise in float32.
    assert costs == pytest.approx(
        {one.part.name: one.kld for one in (*expected.layers, *expected.parts)}, rel=1e-3, abs=1e-7
    )


def test_a_part_costs_nothing_where_it_is_the_reference(moe: Path, made: Path) -> None:
    found = blame(moe, made)
    costs = {one.part.name: one.kld for one in found.parts}
    router = next(cost for name, cost in costs.items() if name.endswith("mlp.gate"))
    # Not quantized, and folding it by powers of two is exact: only float32's own rounding is left.
    assert abs(router) < 1e-5
    assert abs(costs[f"model.layers.{found.parts[0].part.layer} norms"]) < 1e-5
    outside = [one.kld for one in found.layers if one.part.layer is None]
    assert len(outside) == 2
    assert max(map(abs, outside)) < 1e-9
    assert found.whole.kld > 0.0
    assert found.tokens == 3 * 48


def test_the_reference_against_itself_costs_nothing(moe: Path, tmp_path: Path) -> None:
    files = open_files(moe)
    found = find_blame(files, suspect(moe), SEQUENCES, tmp_path, progress=lambda *_: None)
    assert found.whole.kld == 0.0
    assert {one.kld for one in (*found.layers, *found.parts)} == {0.0}


@pytest.mark.parametrize(("file_type", "tied"), [("BF16", True), ("Q8_0", False), ("Q8_0", True)])
def test_a_gguf_file_is_blamed_as_any_build(tmp_path: Path, file_type: str, tied: bool) -> None:
    changes = {"norm_topk_prob": True, "tie_word_embeddings": tied}
    model = save_model(random_model("qwen3_moe", **changes), tmp_path / "model")
    quiet: dict[str, Any] = {"threads": 1, "progress": lambda *_: None, "log": lambda _: None}
    made = Path(quantize_gguf(model, tmp_path / "out", GgufRecipe(type=file_type), **quiet).out)
    found = find_blame(
        open_files(model),
        suspect(made),
        SEQUENCES,
        tmp_path,
        worst_layers=1,
        progress=lambda *_: None,
    )
    costs = [one.kld for one in (found.whole, *found.layers, *found.parts)]
    if file_type == "BF16":  # the source's own numbers
        assert max(map(abs, costs)) < 1e-9
    else:
        embedding = next(one for one in found.layers if one.part.name == "model.embed_tokens")
        assert 1e-6 < embedding.kld < found.whole.kld < 0.1, "in GGUF the embedding is quantized too"
