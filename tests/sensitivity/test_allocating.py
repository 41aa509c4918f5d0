"""From a sensitivity to a recipe: sizes are kept, types fit their tensors, and bits follow what is measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qconv.artifacts.source import Source
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.sensitivity_pipeline import measure_sensitivity
from qconv.cli.target import parse_size
from qconv.core.settings import TextSettings
from qconv.errors import CheckpointError, UsageError
from qconv.executors.threads import Threads
from qconv.models import architecture
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.recipe import parse_recipe
from qconv.sensitivity.allocating import SENSITIVITY_NAME, Allocation, Target, allocate, read_sensitivity
from qconv.sensitivity.errors import _drawn, divergence
from qconv.sensitivity.gguf_types import TYPES, GgufTypes
from qconv.sensitivity.palette import Palette
from qconv.sensitivity.palettes import AnyRecipe, palette_of
from qconv.sensitivity.sweep import OUTPUTS, SHARE
from tests.conftest import FAMILIES, SIZES, random_model, save_model

QUIET: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that every type fits."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_experts": 4}
    made = random_model("qwen3_moe", norm_topk_prob=True, **sizes)
    return save_model(made, tmp_path_factory.mktemp("allocating") / "model", "4MB")


@pytest.fixture(scope="module")
def statistics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model's sensitivity."""
    out = tmp_path_factory.mktemp("sensitivity") / "out"
    measure_sensitivity(model, out, TextSettings(tokens=256, sequence_length=32), **QUIET)
    return out


def allocated(
    model: Path, statistics: dict[str, torch.Tensor], *excluded: str, **target: Any
) -> Allocation[GgufRecipe]:
    source = Source.open(model)
    with Threads(2) as workers:
        types = GgufTypes(source, GgufRecipe(type="Q4_K_M"), excluded)
        return allocate(source, statistics, types, Target(**target), workers)


@pytest.mark.parametrize("bits", [3.5, 4.5, 6.0])
def test_the_build_is_as_large_as_was_asked(bits: float, model: Path, statistics: Path, tmp_path: Path) -> None:
    found = allocated(model, read_sensitivity(statistics), bits=bits)
    assert bits * 0.95 < found.extent.bits <= bits  # a handful of tensors, each a large step
    recipe = parse_gguf_recipe(yaml.safe_load(yaml.safe_dump(found.recipe.model_dump(mode="json"))))
    made = quantize_gguf(model, tmp_path / "out", recipe, **QUIET).report
    assert {name: one["type"] for name, one in made["tensors"].items() if name in found.chosen} == dict(found.chosen)
    assert made["bits_per_weight"] == pytest.approx(found.extent.bits, abs=1e-4)
    assert sum((tmp_path / "out" / name).stat().st_size for name in made["files"]) == found.extent.files


def test_a_size_in_bytes_holds_the_headers_too(model: Path, statistics: Path) -> None:
    size = allocated(model, read_sensitivity(statistics), bits=4.5).extent.files
    for target in (size, size + 1000, size - 1):
        assert allocated(model, read_sensitivity(statistics), size=target).extent.files <= target
    with pytest.raises(UsageError, match="the smallest build of these types has"):
        allocated(model, read_sensitivity(statistics), size=100_000)


def test_more_bits_are_predicted_to_cost_less(model: Path, statistics: Path) -> None:
    stats = read_sensitivity(statistics)
    losses = [allocated(model, stats, bits=bits).predicted for bits in (3.0, 4.0, 5.0, 7.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 10 * losses[-1]
    assert "IQ3_S" in allocated(model, stats, bits=4.0).chosen.values()
    assert set(allocated(model, stats, "iq*", "Q3*", bits=4.0).chosen.values()) <= {*TYPES} - {
        "IQ3_S",
        "IQ4_XS",
        "Q3_K",
    }


def test_routers_make_a_small_divergence_fall_slower_than_the_losses(model: Path, statistics: Path) -> None:
    found = allocated(model, read_sensitivity(statistics), bits=4.5)
    assert found.predicted == divergence(sum(found.losses.values()), Source.open(model).architecture)
    (low, dearest), *_, (high, least) = found.curve
    assert low < 4.5 < high
    assert dearest > found.predicted > least  # the curve is of whole builds, too
    moe, dense = (architecture(SIZES | FAMILIES[name] | {"model_type": name}) for name in ("qwen3_moe", "qwen3"))
    ratios = [divergence(loss, moe) / loss for loss in (1e-2, 1e-3, 1e-4)]
    # A hundredth of the error's square is a tenth of the error, and so many fewer tokens go to another expert.
    assert ratios[2] - 1.0 == pytest.approx(10.0 * (ratios[0] - 1.0))
    assert 1.0 < ratios[0] < ratios[1] < ratios[2]
    assert divergence(1e-4, dense) == 1e-4


def test_bits_follow_what_is_measured(model: Path, statistics: Path) -> None:
    """A layer that the output cares a thousand times as much about gets more of them."""
    stats = load_file(statistics / SENSITIVITY_NAME)
    for name in stats:
        if name.startswith("model.layers.1.") and name.endswith(OUTPUTS):
            stats[name] = stats[name] * 1000.0
    types = allocated(model, stats, bits=4.5).chosen
    order = list(TYPES)
    for role in ("attn_q", "ffn_down_exps"):
        low, high = (order.index(types[f"blk.{layer}.{role}.weight"]) for layer in (0, 1))
        assert high > low


def test_without_gradients_bits_follow_shares_of_the_residual_stream(model: Path, statistics: Path) -> None:
    stats = {name: one for name, one in load_file(statistics / SENSITIVITY_NAME).items() if not name.endswith(OUTPUTS)}
    plain = allocated(model, stats, bits=4.5)
    assert not plain.is_divergence
    assert "predicted_relative_error" in plain.values()
    for name in stats:
        if name.startswith("model.layers.1.") and name.endswith(SHARE):
            stats[name] = stats[name] * 1000.0
    types, order = allocated(model, stats, bits=4.5).chosen, list(TYPES)
    for role in ("attn_q", "ffn_down_exps"):
        low, high = (order.index(types[f"blk.{layer}.{role}.weight"]) for layer in (0, 1))
        assert high > low


def test_a_relative_error_is_of_a_scale_of_its_own(model: Path, statistics: Path, tmp_path: Path) -> None:
    """A linear that is larger by a power of two has the same codes, and loses the same share of its outputs."""
    stats = {name: one for name, one in load_file(statistics / SENSITIVITY_NAME).items() if not name.endswith(OUTPUTS)}
    shutil.copytree(model, tmp_path / "model")
    name = "model.layers.0.self_attn.o_proj.weight"
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, name: tensors[name] * 4.0}, file, {"format": "pt"})
    losses = [allocated(folder, stats, bits=4.5).losses for folder in (model, tmp_path / "model")]
    unit = "blk.0.attn_output.weight"
    assert losses[0][unit] == pytest.approx(losses[1][unit], rel=1e-3)
    assert losses[0][unit] > 0.0


def test_what_the_recipe_gives_stays_and_counts(model: Path, statistics: Path) -> None:
    types = parse_gguf_recipe({"type": "Q4_K_M", "tensor_types": {"ffn_down": "Q2_K"}})
    rules = parse_recipe(
        {"format": "w4a16", "method": "gptq", "rules": [{"match": "mlp.experts.*", "grid": "int4-g32"}]}
    )
    for recipe, unit, given in (
        (types, "blk.0.ffn_down_exps.weight", "Q2_K"),
        (rules, "model.layers.0.mlp.experts.*", "int4-g32"),
    ):
        source = Source.open(model)
        with Threads(2) as workers:
            palette: Palette[AnyRecipe] = palette_of(source, recipe, ())
            found = allocate(source, read_sensitivity(statistics), palette, Target(bits=5.5), workers)
        assert found.chosen[unit] == given
        assert found.losses[unit] > 0.0
        assert found.extent.bits <= 5.5
        made = found.recipe
        if isinstance(made, GgufRecipe):
            assert [pattern for pattern in made.tensor_types if "ffn_down" in pattern] == ["ffn_down"]
        else:
            assert [rule for rule in made.rules if rule.fits("model.layers.0.mlp.experts.1.up_proj")] == [
                rules.rules[0]
            ]


def test_what_cannot_be_used_is_said(model: Path, statistics: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no sensitivity"):
        read_sensitivity(tmp_path)
    stats = load_file(statistics / SENSITIVITY_NAME)
    save_file({name: one for name, one in stats.items() if ".layers.1." not in name}, tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="says nothing of"):
        allocated(model, read_sensitivity(tmp_path / "s.safetensors"), bits=4.0)


def test_drawn_parts_stand_for_all_on_average() -> None:
    weights = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.01
    values = weights * (1.0 + 0.1 * torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    estimate = sum(float(values[index]) * factor for index, factor in _drawn(weights, 8))
    assert estimate == pytest.approx(float(values.sum()), rel=0.05)
    assert _drawn(weights[:5], 8) == [(index, 1.0) for index in range(5)]


@pytest.mark.parametrize(
    ("text", "size"), [("240GB", 240 * 10**9), ("4.5 GiB", int(4.5 * 2**30)), ("12B", 12), ("1kB", 1000)]
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size
    for wrong in ("", "GB", "3", "3 Gb", "-1GB", "nanGB", "1e9GB", "1XiB"):
        with pytest.raises(UsageError, match="is no size"):
            parse_size(wrong)
