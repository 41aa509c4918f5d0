"""AutoAWQ's GEMM layout against its definition, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import Grid
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect, get_format
from qconv.formats.awq import FORMAT, pack_words, unpack_words
from tests.conftest import random_qtensor

# Nibble i of a word holds column ORDER[i] of its eight: AutoAWQ's own AWQ_ORDER.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
GRID = Grid(4, 32, symmetric=False, scale_dtype=torch.float16)


def nibble(word: int, position: int) -> int:
    """Bits ``4 * position`` and up of an int32."""
    return (word >> (4 * position)) & 15


def test_the_golden_word() -> None:
    # Columns 0..7 hold 0..7, so the nibbles from the lowest are the order itself: 0x75316420.
    assert pack_words(torch.arange(8, dtype=torch.uint8).view(1, 8)).tolist() == [[0x75316420]]
    # Column 7 is the highest nibble, and the word is signed.
    assert pack_words(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)).tolist() == [[-(1 << 28)]]


@given(rows=st.integers(1, 5), words=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_every_nibble_is_where_the_definition_puts_it(rows: int, words: int, seed: int) -> None:
    values = torch.randint(0, 16, (rows, 8 * words), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack_words(values)
    assert (packed.dtype, packed.shape) == (torch.int32, (rows, words))
    for row in range(rows):
        for word in range(words):
            found = [nibble(int(packed[row, word]), position) for position in range(8)]
            assert found == [int(values[row, 8 * word + column]) for column in ORDER]
    assert torch.equal(unpack_words(packed), values)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6))
def test_any_word_survives_unpacking_and_packing(words: list[int]) -> None:
    packed = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack_words(unpack_words(packed)), packed)


@given(
    out_words=st.integers(1, 3), groups=st.integers(1, 3), width=st.sampled_from([8, 32]), seed=st.integers(0, 10**6)
)
def test_a_reader_that_follows_the_definition_gets_our_weight(
    out_words: int, groups: int, width: int, seed: int
) -> None:
    n, k = 8 * out_words, groups * width
    grid = Grid(4, width, symmetric=False, scale_dtype=torch.float16)
    weight = random_qtensor(grid, n, k, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert list(tensors) == ["m.qweight", "m.qzeros", "m.scales"]
    specs = FORMAT.specs("m", n, k, grid)
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    qweight, qzeros, scales = (tensor.tolist() for tensor in tensors.values())
    dense = weight.dequantize()
    for column in range(n):
        word, position = column // 8, ORDER.index(column % 8)
        for row in range(k):
            code = nibble(qweight[row][word], position)
            zero = nibble(qzeros[row // width][word], position)
            # W is stored transposed; code - zero and a float16 scale multiply exactly in float32.
            assert (code - zero) * scales[row // width][column] == float(dense[column, row])
    back = FORMAT.unpack("m", (n, k), tensors.__getitem__, grid)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.zero_points is not None
    assert weight.zero_points is not None
    assert torch.equal(back.zero_points, weight.zero_points)


@pytest.mark.parametrize("name", ["m.qweight", "m.qzeros", "m.scales"])
@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_a_misshapen_tensor_is_named(name: str, fault: str) -> None:
    tensors = dict(FORMAT.pack("m", random_qtensor(GRID, 16, 64, 0)))
    tensors[name] = tensors[name][:, :-1] if fault == "shape" else tensors[name].to(torch.int16)
    with pytest.raises(CheckpointError, match=name):
        FORMAT.unpack("m", (16, 64), tensors.__getitem__, GRID)


def settings(**values: Any) -> GridSettings:
    """Grid settings of a recipe."""
    return GridSettings.model_validate({"bits": 4, "group_size": 128, **values})


def test_the_grid_is_asymmetric_with_float16_scales_whatever_the_weights_are() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert FORMAT.grid(settings(), dtype) == Grid(4, 128, symmetric=False, scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("values", "key"),
    [({"bits": 8}, "grid.bits"), ({"symmetric": True}, "grid.symmetric"), ({"group_size": -1}, "grid.group_size")],
)
def test_a_grid_that_the_layout_cannot_hold_is_refused_by_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        FORMAT.grid(settings(**values), torch.bfloat16)


def test_shapes_that_do_not_fit_are_explained() -> None:
    assert FORMAT.check(16, 64, GRID) is None
    assert "32 does not divide its 48 input" in str(FORMAT.check(16, 48, GRID))
    assert "12 output features" in str(FORMAT.check(12, 64, GRID))


QUANTIZED = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.3.gate_proj",
    "model.layers.1.mlp.gate_proj",  # a dense layer's: the relative name of a router is part of it
]
SKIPPED = ["model.layers.0.mlp.gate", "model.layers.10.mlp.shared_expert_gate", "lm_head"]


def test_the_config_skips_what_is_skipped_and_nothing_else() -> None:
    section = FORMAT.config({GRID: QUANTIZED}, SKIPPED)
    assert {key: section[key] for key in ("quant_method", "bits", "group_size", "zero_point", "version")} == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    assert detect({"quantization_config": section}) is FORMAT
    described = FORMAT.read_config(section, torch.bfloat16)
    grid, skipped = described.grid, described.skipped
    assert grid == GRID
    assert [name for name in (*QUANTIZED, *SKIPPED) if FORMAT.is_skipped(name, skipped)] == SKIPPED


def test_relative_names_are_listed_for_autoawq_where_that_is_safe() -> None:
    # AutoAWQ matches names relative to a layer; "mlp.gate" is safe only where no dense layer has an "mlp.gate_proj".
    assert "mlp.gate" in FORMAT.config({GRID: QUANTIZED[:2]}, SKIPPED)["modules_to_not_convert"]
    assert "mlp.gate" not in FORMAT.config({GRID: QUANTIZED}, SKIPPED)["modules_to_not_convert"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": "gemv"},
        {"bits": 8},
        {"group_size": None},
        {"group_size": 0},
        {"modules_to_not_convert": 5},
    ],
)
def test_other_variants_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FORMAT.read_config(FORMAT.config({GRID: []}, []) | change, torch.bfloat16)


def test_the_registry_knows_it() -> None:
    assert get_format("awq") is FORMAT
    with pytest.raises(RecipeError, match="unknown format 'base'"):
        get_format("base")
    assert detect({}) is None
    assert detect({"quantization_config": {"quant_method": "bitsandbytes"}}) is None
