"""MLX's layout: words, biases, names, and what has no place in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import mlx
from qconv.formats.base import Place
from qconv.formats.mlx import FORMAT
from tests.conftest import random_float_qtensor, random_qtensor

AFFINE = Grid(4, 64, False, torch.bfloat16, based=True)
MXFP4 = FORMAT.grid(GridSettings(bits=4, group_size=32), torch.bfloat16, "e2m1")
MXFP8 = FORMAT.grid(GridSettings(bits=8, group_size=32), torch.bfloat16, "e4m3")


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    rows=st.integers(1, 5),
    words=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_words_hold_codes_in_a_stream_of_bits(bits: int, rows: int, words: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 32 * words), generator=made, dtype=torch.uint8)
    found = mlx.pack_words(codes, bits)
    assert found.dtype is torch.uint32
    assert found.shape == (rows, words * bits)
    assert torch.equal(mlx.unpack_words(found, bits), codes)
    number = int.from_bytes(found[0].view(torch.uint8).numpy().tobytes(), "little")
    assert [(number >> (bits * place)) & ((1 << bits) - 1) for place in range(32 * words)] == codes[0].tolist()


def affine(grid: Grid, rows: int, columns: int, seed: int) -> QTensor:
    """Random codes with scales of either sign and biases of any size."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.levels, (rows, columns), generator=made, dtype=torch.uint8)
    scales, biases = (
        torch.randn(grid.scale_shape(rows, columns), generator=made).to(grid.scale_dtype) for _ in range(2)
    )
    return QTensor(grid, codes, scales, None, biases=biases)


@given(
    bits=st.sampled_from(mlx.BITS),
    size=st.sampled_from(mlx.GROUPS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_a_weight_is_code_times_scale_plus_bias(bits: int, size: int, dtype: torch.dtype, seed: int) -> None:
    grid = Grid(bits, size, False, dtype, based=True)
    weight = affine(grid, 6, 256, seed)
    found = dict(FORMAT.pack("x", weight))
    assert {name: (one.dtype, tuple(one.shape)) for name, one in found.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in FORMAT.specs("x", 6, 256, grid)
    }
    groups = weight.codes.view(6, -1, size).float()
    by_hand = groups * found["x.scales"].float().unsqueeze(-1) + found["x.biases"].float().unsqueeze(-1)
    again = FORMAT.unpack("x", (6, 256), found.__getitem__, grid)
    assert torch.equal(again.dequantize(), by_hand.view(6, 256))
    assert torch.equal(again.codes, weight.codes)
    rows = weight.rows(2, 5)
    assert torch.equal(rows.dequantize(), weight.dequantize()[2:5])
    chosen = torch.tensor([True, False, True, True, False, False])
    other = affine(grid, 6, 256, seed + 1)
    mixed = weight.with_rows(chosen, other).dequantize()
    assert torch.equal(mixed, torch.where(chosen.unsqueeze(1), other.dequantize(), weight.dequantize()))


@given(bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), seed=st.integers(0, 2**31))
def test_zero_points_that_are_biases_come_back(bits: int, symmetric: bool, seed: int) -> None:
    weight = random_qtensor(Grid(bits, 32, symmetric, torch.float32), 4, 64, seed)
    few = (weight.scales * 64).round().clamp_(min=1.0) / 64  # of few bits, so that products are exact
    weight = QTensor(weight.grid, weight.codes, few, weight.zero_points)
    biased = QTensor(mlx.based(weight.grid), weight.codes, few, None, biases=mlx.biases_of(weight).float())
    again = mlx.with_zero_points(biased)
    assert again is not None
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.grid.symmetric or not symmetric
    if symmetric:
        found = FORMAT.unpack("x", weight.shape, dict(FORMAT.pack("x", weight)).__getitem__, weight.grid)
        assert found.zero_points is found.biases is None
        assert torch.equal(found.dequantize(), weight.dequantize())


def test_biases_that_are_no_zero_points_stay_what_they_are() -> None:
    weight = affine(AFFINE, 4, 128, 7)
    assert mlx.with_zero_points(weight) is None
    with pytest.raises(CheckpointError, match="are not the zero points"):
        FORMAT.unpack("x", (4, 128), dict(FORMAT.pack("x", weight)).__getitem__, Grid(4, 64, True, torch.bfloat16))


@pytest.mark.parametrize("grid", [MXFP4, MXFP8])
def test_floats_come_back(grid: Grid) -> None:
    if grid.number == "e4m3":
        weight = random_float_qtensor(grid, 6, 128, 3)
    else:
        codes = torch.arange(6 * 128, dtype=torch.uint8).view(6, 128) % 16
        scales = torch.randint(120, 130, (6, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
        weight = QTensor(grid, codes, scales, None)
    again = FORMAT.unpack("x", (6, 128), dict(FORMAT.pack("x", weight)).__getitem__, grid)
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_names() -> None:
    block = "model.layers.3.mlp"
    assert FORMAT.place(f"{block}.experts.5.up_proj.scales") == Place(f"{block}.switch_mlp.up_proj.scales", 5)
    assert mlx.called("model.layers.3.block_sparse_moe.experts.5.w2") == (
        "model.layers.3.block_sparse_moe.switch_mlp.down_proj"
    )
    for name in ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.shared_expert.up_proj.weight"):
        assert FORMAT.place(name) is None
        assert mlx.called(name) == name


def test_config_names_what_is_not_as_the_most() -> None:
    q, experts = "model.layers.0.self_attn.q_proj", [f"model.layers.0.mlp.experts.{one}.up_proj" for one in range(9)]
    eight = Grid(8, 64, False, torch.bfloat16, based=True)
    others = [f"model.layers.{one}.self_attn.o_proj" for one in range(3)]
    section = FORMAT.config({MXFP4: experts, eight: [q], AFFINE: others}, ["lm_head"])
    assert section == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.mlp.switch_mlp.up_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        q: {"group_size": 64, "bits": 8, "mode": "affine"},
    }
    assert FORMAT.keys(section) == {"quantization": section, "quantization_config": section}
    described = FORMAT.read_config({"quant_method": "mlx", **section, "lm_head": False}, torch.bfloat16)
    assert described.grids([q, experts[8], others[0], "lm_head"]) == {q: eight, experts[8]: MXFP4, others[0]: AFFINE}


def test_an_exception_that_names_no_mode_is_affine() -> None:
    """mlx-lm's routers: 8 bits in groups of 64 whatever the rest is."""
    section = {"quant_method": "mlx", "group_size": 32, "bits": 4, "mode": "mxfp4", "x": {"group_size": 64, "bits": 8}}
    assert FORMAT.read_config(section, torch.float16).grids(["x"])["x"] == Grid(8, 64, False, torch.float16, based=True)


@pytest.mark.parametrize(
    "change", [{"bits": 7}, {"group_size": 48}, {"mode": "nvfp4"}, {"mode": "mxfp4", "bits": 8}, {"bits": None}]
)
def test_modes_that_are_not_read_are_named(change: dict[str, Any]) -> None:
    common: dict[str, Any] = {"quant_method": "mlx", "group_size": 64, "bits": 4, "mode": "affine"}
    with pytest.raises(CheckpointError, match="quantization: mode"):
        FORMAT.read_config(common | change, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"quantization\.x: mode"):
        FORMAT.read_config(common | {"x": {"bits": 4, "group_size": 64} | change}, torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "number", "said"),
    [
        ({"bits": 7}, None, "no codes of 7 bits"),
        ({"group_size": 16}, None, "not of 16"),
        ({"group_size": -1}, None, "not of -1"),
        ({"bits": 8, "group_size": 128}, "e4m3", "no such floats"),
        ({"bits": 4, "group_size": 64}, "e2m1", "no such floats"),
    ],
)
def test_grids_that_it_has_not_are_refused(settings: dict[str, Any], number: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        FORMAT.grid(GridSettings(**settings), torch.bfloat16, number)
