"""NVFP4 and MXFP4 in files: pairs of codes, global scales that divide or multiply, what config.json says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.qtensor import E2M1_VALUES, Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect, get_format
from qconv.formats.base import pack_pairs, unpack_pairs
from qconv.formats.float4 import MXFP4, NVFP4

LOCAL = replace(NVFP4, activations="local", activation_number="e2m1")
GRIDS = {"nvfp4": NVFP4, "nvfp4_w4a4": LOCAL, "nvfp4_modelopt": LOCAL, "mxfp4": MXFP4}


def random_fp4(grid: Grid, rows: int, columns: int, seed: int, global_scale: float = 0.25) -> QTensor:
    """Codes, and scales that are numbers other than 0, over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    most = 0x7F if grid.has_global_scale else 0xFF  # NaNs
    scales = torch.randint(1, most, grid.scale_shape(rows, columns), generator=generator, dtype=torch.uint8)
    inputs = torch.tensor(0.3, dtype=torch.float64) if grid.stores_inputs else None
    shared = global_scale if grid.has_global_scale else 1.0
    return QTensor(grid, codes, scales.view(grid.scale_dtype), None, input_scale=inputs, global_scale=shared)


def test_two_codes_are_a_byte_the_even_column_low() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    assert pack_pairs(codes).tolist() == [[0x10, 0x32, 0x54, 0x76], [0xEF, 0xCD, 0xAB, 0x89]]


@given(rows=st.integers(1, 9), pairs=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_pairs_unpack_to_what_was_packed(rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_pairs(pack_pairs(codes)), codes)


@pytest.mark.parametrize("name", GRIDS)
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), seed=st.integers(0, 10**6), power=st.integers(-100, 100))
def test_what_is_packed_comes_back(name: str, rows: int, groups: int, seed: int, power: int) -> None:
    grid, output_format = GRIDS[name], get_format(name)
    columns = groups * grid.group_size
    weight = random_fp4(grid, rows, columns, seed, 2.0**power)
    tensors = dict(output_format.pack("m", weight))
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()] == [
        (spec.name, spec.dtype, spec.shape) for spec in output_format.specs("m", rows, columns, grid)
    ]
    back = output_format.unpack("m", (rows, columns), tensors.__getitem__, grid)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales.view(torch.uint8), weight.scales.view(torch.uint8))
    assert (back.grid, back.global_scale) == (grid, weight.global_scale)
    # One float32 on either side of an inverse.
    assert back.input_scale is None or float(back.input_scale) == pytest.approx(0.3, rel=2.0**-23)


@given(divisor=st.floats(2.0**-100, 2.0**100, width=32), seed=st.integers(0, 10**6))
def test_a_divisor_and_a_multiplier_that_are_any_floats_mean_what_float32_makes_of_them(
    divisor: float, seed: int
) -> None:
    made = random_fp4(NVFP4, 3, 32, seed)
    by_name = {"nvfp4": "weight_global_scale", "nvfp4_modelopt": "weight_scale_2"}
    for name, leaf in by_name.items():
        output_format = get_format(name)
        tensors = dict(output_format.pack("m", made))
        tensors[f"m.{leaf}"].fill_(divisor)
        back = output_format.unpack("m", (3, 32), tensors.__getitem__, NVFP4)
        scales, given = made.scales.float(), torch.tensor(divisor)
        steps = scales / given if name == "nvfp4" else scales * given
        assert torch.equal(back.steps(), steps)
        values = torch.tensor(E2M1_VALUES)[made.codes.int()].view(3, 2, 16)
        assert torch.equal(back.dequantize(), (values * steps.unsqueeze(2)).view(3, 32))
        assert torch.equal(dict(output_format.pack("m", back))[f"m.{leaf}"], tensors[f"m.{leaf}"])


def test_the_two_layouts_of_nvfp4_hold_the_same_weight() -> None:
    weight = random_fp4(LOCAL, 5, 48, 3, 2.0**-13)
    ours, theirs = (dict(get_format(name).pack("m", weight)) for name in ("nvfp4_w4a4", "nvfp4_modelopt"))
    assert torch.equal(ours["m.weight_packed"], theirs["m.weight"])
    assert float(ours["m.weight_global_scale"]) == 2.0**13 == 1.0 / float(theirs["m.weight_scale_2"])
    assert float(ours["m.input_global_scale"]) == pytest.approx(1.0 / float(theirs["m.input_scale"]), rel=2.0**-23)


@pytest.mark.parametrize("name", GRIDS)
def test_a_tensor_that_is_misshapen_or_no_scale_is_named(name: str) -> None:
    grid, output_format = GRIDS[name], get_format(name)

    def tensors() -> dict[str, Tensor]:
        return dict(output_format.pack("m", random_fp4(grid, 4, 64, 0)))

    for leaf in tensors():
        broken = tensors()
        broken[leaf] = torch.cat([broken[leaf].view(-1)] * 2)
        with pytest.raises(CheckpointError, match=leaf):
            output_format.unpack("m", (4, 64), broken.__getitem__, grid)
    for leaf, tensor in tensors().items():
        if tensor.numel() == 1:
            for value in (0.0, -1.0, float("inf"), float("nan")):
                broken = tensors()
                broken[leaf].fill_(value)
                with pytest.raises(CheckpointError, match=rf"{leaf}: is not one positive number"):
                    output_format.unpack("m", (4, 64), broken.__getitem__, grid)


@pytest.mark.parametrize("name", GRIDS)
def test_the_config_round_trips(name: str) -> None:
    output_format = get_format(name)
    section = output_format.config({GRIDS[name]: []}, ["lm_head"])
    assert detect({"quantization_config": section}) is output_format
    described = output_format.read_config(section, torch.bfloat16)
    assert (described.grid, list(described.skipped)) == (GRIDS[name], ["lm_head"])


def test_the_words_are_compressed_tensors_presets() -> None:
    group = get_format("nvfp4_w4a4").config({LOCAL: []}, [])["config_groups"]["group_0"]
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    assert group["weights"] == weights
    assert group["input_activations"] == {**weights, "dynamic": "local"}
    assert group["format"] == "nvfp4-pack-quantized"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("weights", {"group_size": 32}, "group_size 32"),
    ("weights", {"strategy": "group"}, "strategy 'group'"),
    ("weights", {"num_bits": 6}, "num_bits 6"),
    ("input_activations", {"dynamic": False}, "input_activations"),
    ("input_activations", {"num_bits": 8}, "input_activations"),
]


@pytest.mark.parametrize(("part", "change", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_other_schemes_are_refused(part: str, change: dict[str, Any], message: str) -> None:
    output_format = get_format("nvfp4_w4a4")
    section = output_format.config({LOCAL: []}, [])
    section["config_groups"]["group_0"][part] |= change
    with pytest.raises(CheckpointError, match=message):
        output_format.read_config(section, torch.bfloat16)


def test_weights_and_inputs_in_mxfp4_are_read() -> None:
    grid = replace(MXFP4, activations="dynamic", activation_number="e2m1")
    section = get_format("mxfp4").config({grid: []}, [])
    assert section["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert get_format("mxfp4").read_config(section, torch.bfloat16).grid == grid


@pytest.mark.parametrize("name", GRIDS)
def test_recipes_can_ask_for_nothing_else(name: str) -> None:
    output_format, own = get_format(name), GRIDS[name]
    assert output_format.grid(GridSettings(bits=4, group_size=own.group_size), torch.float16) == own
    for settings, key in (
        (GridSettings(bits=8, group_size=own.group_size), "bits"),
        (GridSettings(bits=4, group_size=own.group_size, symmetric=False), "symmetric"),
        (GridSettings(bits=4, group_size=64), "group_size"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: "):
            output_format.grid(settings, torch.bfloat16)
    assert output_format.check(8, 64, own) is None
    assert output_format.check(8, 40, own) == f"groups of {own.group_size} do not divide its 40 input features"


def test_modelopt_says_it_twice() -> None:
    output_format = get_format("nvfp4_modelopt")
    section = output_format.config({LOCAL: []}, ["lm_head"])
    beside = output_format.beside(section)
    assert tuple(beside) == output_format.beside_names == ("hf_quant_config.json",)
    assert beside["hf_quant_config.json"]["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }


def test_modelopts_weights_alone_are_read_and_its_others_refused_by_name() -> None:
    output_format = get_format("nvfp4_modelopt")
    section = output_format.config({NVFP4: []}, ["lm_head", "model.layers.0.*", "*gate"])
    assert section["quant_algo"] == "W4A16_NVFP4"
    assert "input_activations" not in section["config_groups"]["group_0"]
    described = output_format.read_config(section, torch.bfloat16)
    assert described.grid == NVFP4
    for module, skipped in (
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.1.mlp.gate", True),
        ("model.layers.1.mlp.experts.0.gate_proj", False),
        ("lm_head", True),
        ("lm_head_2", False),
    ):
        assert output_format.is_skipped(module, described.skipped) is skipped, module
    for algorithm in ("MIXED_PRECISION", "FP8", "NVFP4_AWQ", None):
        with pytest.raises(CheckpointError, match=f"quant_algo is {algorithm!r}"):
            output_format.read_config(section | {"quant_algo": algorithm}, torch.bfloat16)
    section["config_groups"]["group_0"]["weights"]["group_size"] = 32
    with pytest.raises(CheckpointError, match="groups of 32"):
        output_format.read_config(section, torch.bfloat16)
