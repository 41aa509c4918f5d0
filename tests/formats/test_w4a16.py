"""compressed-tensors' pack-quantized layout against its definition, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect
from qconv.formats.packed import pack_rows, unpack_rows
from qconv.formats.w4a16 import FORMAT
from tests.conftest import random_qtensor

GRID = Grid(4, 32, symmetric=True, scale_dtype=torch.bfloat16)


def field(word: int, position: int, bits: int) -> int:
    """Value number ``position`` of an int32, the lowest first."""
    return (word >> (bits * position)) & ((1 << bits) - 1)


def test_the_golden_words() -> None:
    # The reference's own example: [-8,-7,-6,-5,-4,-3,-2,7], stored plus 8, is 0xF6543210.
    codes = (torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]]) + 8).to(torch.uint8)
    assert pack_rows(codes, 4).tolist() == [[0xF6543210 - (1 << 32)]]
    assert pack_rows(torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8), 8).tolist() == [[0x76543210]]


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), words=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_every_value_is_where_the_definition_puts_it(bits: int, rows: int, words: int, seed: int) -> None:
    per_word = 32 // bits
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (rows, per_word * words), generator=generator).byte()
    packed = pack_rows(values, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (rows, words))
    for row in range(rows):
        for column in range(per_word * words):
            word = int(packed[row, column // per_word])
            assert field(word, column % per_word, bits) == int(values[row, column])
    assert torch.equal(unpack_rows(packed, bits), values)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6), st.sampled_from([4, 8]))
def test_any_word_survives_unpacking_and_packing(words: list[int], bits: int) -> None:
    packed = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack_rows(unpack_rows(packed, bits), bits), packed)


@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    width=st.sampled_from([8, 32, CHANNEL]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    out_words=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_a_reader_that_follows_the_definition_gets_our_weight(
    bits: int, symmetric: bool, width: int, dtype: torch.dtype, out_words: int, groups: int, seed: int
) -> None:
    per_word = 32 // bits
    n, k = per_word * out_words, groups * (8 if width == CHANNEL else width)
    grid = Grid(bits, width, symmetric, dtype)
    weight = random_qtensor(grid, n, k, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", n, k, grid)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert ("m.weight_zero_point" in tensors) is not symmetric
    assert tensors["m.weight_shape"].tolist() == [n, k]
    packed, scales = tensors["m.weight_packed"].tolist(), tensors["m.weight_scale"].tolist()
    dense, group_width = weight.dequantize(), k // grid.groups(k)
    half = 1 << (bits - 1)
    for row in range(n):
        for column in range(k):
            group = column // group_width
            value = field(packed[row][column // per_word], column % per_word, bits) - half
            zero = 0
            if not symmetric:
                # Zero points are packed along the rows, stored plus half like the values.
                words = tensors["m.weight_zero_point"].tolist()
                zero = field(words[row // per_word][group], row % per_word, bits) - half
            expected = torch.tensor(float(value - zero)) * scales[row][group]
            assert float(expected) == float(dense[row, column])
    back = FORMAT.unpack("m", (n, k), tensors.__getitem__, grid)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.dequantize(), dense)


@pytest.mark.parametrize("name", ["m.weight_packed", "m.weight_scale", "m.weight_zero_point", "m.weight_shape"])
@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_a_misshapen_tensor_is_named(name: str, fault: str) -> None:
    grid = Grid(4, 32, symmetric=False, scale_dtype=torch.bfloat16)
    tensors = dict(FORMAT.pack("m", random_qtensor(grid, 16, 64, 0)))
    tensors[name] = tensors[name][..., :-1] if fault == "shape" else tensors[name].to(torch.int16)
    with pytest.raises(CheckpointError, match=name):
        FORMAT.unpack("m", (16, 64), tensors.__getitem__, grid)


def test_a_weight_shape_that_lies_is_named() -> None:
    tensors = dict(FORMAT.pack("m", random_qtensor(GRID, 16, 64, 0)))
    tensors["m.weight_shape"] = torch.tensor([64, 16])
    with pytest.raises(CheckpointError, match=r"m\.weight_shape: \[64, 16\], not \[16, 64\]"):
        FORMAT.unpack("m", (16, 64), tensors.__getitem__, GRID)


@pytest.mark.parametrize("grid", [GRID, Grid(8, CHANNEL, symmetric=False, scale_dtype=torch.bfloat16)])
def test_the_config_round_trips_and_is_recognized(grid: Grid) -> None:
    skipped = ["model.layers.1.mlp.gate", "lm_head"]
    section = FORMAT.config({grid: []}, skipped)
    assert detect({"quantization_config": section}) is FORMAT
    described = FORMAT.read_config(section, torch.bfloat16)
    assert (described.grid, list(described.skipped)) == (grid, skipped)
    weights = section["config_groups"]["group_0"]["weights"]
    # Per channel and by group are two strategies there, and a channel's group size is null.
    assert (weights["strategy"], weights["group_size"]) == (
        ("channel", None) if grid.group_size == CHANNEL else ("group", 32)
    )


def test_skipping_matches_whole_names_or_expressions() -> None:
    assert FORMAT.is_skipped("model.layers.1.mlp.gate", ["model.layers.1.mlp.gate"])
    assert not FORMAT.is_skipped("model.layers.1.mlp.gate_proj", ["model.layers.1.mlp.gate"])
    assert not FORMAT.is_skipped("model.layers.11.mlp.gate", ["model.layers.1.mlp.gate"])
    assert FORMAT.is_skipped("model.layers.1.mlp.gate", ["re:.*mlp.gate$"])
    assert not FORMAT.is_skipped("model.layers.1.mlp.gate_proj", ["re:.*mlp.gate$"])


def test_the_grid_follows_the_recipe_and_the_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert FORMAT.grid(GridSettings(), dtype) == Grid(4, 128, symmetric=True, scale_dtype=dtype)
    assert not FORMAT.grid(GridSettings(symmetric=False), torch.bfloat16).symmetric
    for bits in (2, 3, 5, 6, 7):
        with pytest.raises(RecipeError, match=r"grid\.bits"):
            FORMAT.grid(GridSettings(bits=bits), torch.bfloat16)


def test_shapes_that_do_not_fit_are_explained() -> None:
    assert FORMAT.check(3, 64, GRID) is None
    assert "does not divide its 48 input" in str(FORMAT.check(16, 48, GRID))
    channel = Grid(4, CHANNEL, symmetric=True, scale_dtype=torch.bfloat16)
    assert "12 input features are not a multiple of 8" in str(FORMAT.check(16, 12, channel))
    asymmetric = Grid(4, 32, symmetric=False, scale_dtype=torch.bfloat16)
    assert "3 output features are not a multiple of 8" in str(FORMAT.check(3, 64, asymmetric))


BROKEN: list[dict[str, Any]] = [
    {"config_groups": {}},
    {"config_groups": None},
    {"config_groups": {"a": {"weights": None}}},
    {"config_groups": {"a": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}},
    {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 3, "strategy": "group", "group_size": 32}}}},
    {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 4, "strategy": "block", "group_size": 32}}}},
    {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}}},
    {"config_groups": {"a": 3}},
    {"ignore": 5},
    {"ignore": [5]},
]


@pytest.mark.parametrize("change", BROKEN)
def test_sections_that_are_not_ours_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FORMAT.read_config(FORMAT.config({GRID: []}, []) | change, torch.bfloat16)
