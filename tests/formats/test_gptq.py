"""GPTQ's layout against its definition, element by element."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv import __version__
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect, get_format
from qconv.formats.gptq import BITS, FORMAT, pack_words, unpack_words, values_per_pack
from qconv.planning.recipe import load_recipe

GRID = Grid(4, 32, symmetric=True, scale_dtype=torch.float16)
ASYMMETRIC = Grid(4, 32, symmetric=False, scale_dtype=torch.float16)


def random_qtensor(grid: Grid, out_features: int, in_features: int, seed: int) -> QTensor:
    """Random codes, scales and zero points over their whole range."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, grid.levels, shape, generator=generator, dtype=torch.uint8)

    groups = grid.groups(in_features)
    scales = (0.01 + torch.rand(out_features, groups, generator=generator)).to(grid.scale_dtype)
    zero_points = None if grid.symmetric else codes(out_features, groups)
    group_index = None
    if grid.act_order:
        shuffled = torch.randperm(in_features, generator=generator)
        group_index = (shuffled // grid.width(in_features)).to(torch.int32)
    return QTensor(grid, codes(out_features, in_features), scales, zero_points, group_index)


def field(words: list[int], position: int, bits: int) -> int:
    """Value number ``position`` of consecutive int32 words, which are one stream of bits, the lowest first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * number) for number, word in enumerate(words))
    return (stream >> (bits * position)) & ((1 << bits) - 1)


def signed(word: int) -> int:
    """A 32-bit word as int32 holds it."""
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize(
    ("bits", "symmetric", "word"),
    [
        (4, True, 0x77777777),
        (4, False, 0x88888888),
        (8, True, 0x7F7F7F7F),
        (8, False, 0x80808080),
        (2, True, 0x55555555),
        (2, False, 0xAAAAAAAA),
    ],
)
def test_the_golden_words_of_a_zero_point_in_the_middle(bits: int, symmetric: bool, word: int) -> None:
    # Symmetric builds are v1, which stores the zero point less one; asymmetric ones are v2, which stores it as it is.
    grid = Grid(bits, 32, symmetric, torch.float16)
    zero_points = None if symmetric else torch.full((32, 2), grid.mid, dtype=torch.uint8)
    weight = QTensor(grid, torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2).half(), zero_points)
    qzeros = dict(FORMAT.pack("m", weight))["m.qzeros"]
    assert torch.equal(qzeros, torch.full((2, bits), signed(word), dtype=torch.int32))


def test_the_first_value_lies_in_the_lowest_bits() -> None:
    assert pack_words(torch.arange(8, dtype=torch.uint8).view(1, 8), 4).tolist() == [[0x76543210]]
    assert pack_words(torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8), 8).tolist() == [[0x76543210]]
    quads = torch.tensor([[0, 1, 2, 3] * 4], dtype=torch.uint8)
    assert pack_words(quads, 2).tolist() == [[signed(0xE4E4E4E4)]]


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), packs=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_every_value_is_where_the_definition_puts_it(bits: int, rows: int, packs: int, seed: int) -> None:
    columns = values_per_pack(bits) * packs
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (rows, columns), generator=generator).byte()
    packed = pack_words(values, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (rows, columns * bits // 32))
    for row in range(rows):
        assert [field(packed[row].tolist(), column, bits) for column in range(columns)] == values[row].tolist()
    assert torch.equal(unpack_words(packed, bits), values)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6), st.sampled_from(BITS))
def test_any_word_survives_unpacking_and_packing(words: list[int], bits: int) -> None:
    packed = torch.tensor([words * (3 if bits == 3 else 1)], dtype=torch.int32)
    assert torch.equal(pack_words(unpack_words(packed, bits), bits), packed)


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    width=st.sampled_from([8, 32, CHANNEL]),
    act_order=st.booleans(),
    out_packs=st.integers(1, 2),
    in_packs=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_a_reader_that_follows_the_definition_gets_our_weight(
    bits: int, symmetric: bool, width: int, act_order: bool, out_packs: int, in_packs: int, seed: int
) -> None:
    n, k = values_per_pack(bits) * out_packs, 32 * in_packs
    grid = Grid(bits, width, symmetric, torch.float16, act_order=act_order)
    weight = random_qtensor(grid, n, k, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", n, k, grid)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    qweight, qzeros, scales, g_idx = (tensor.tolist() for tensor in tensors.values())
    if not act_order:
        assert g_idx == [column // (k if width == CHANNEL else width) for column in range(k)]
    dense = weight.dequantize()
    for row in range(n):
        down = [words[row] for words in qweight]
        for column in range(k):
            group = g_idx[column]
            code = field(down, column, bits)
            zero = field(qzeros[group], row, bits) + symmetric
            expected = torch.tensor(float(code - zero)) * scales[group][row]
            assert float(expected) == float(dense[row, column])
    back = FORMAT.unpack("m", (n, k), tensors.__getitem__, grid)
    assert back.grid == grid
    assert torch.equal(back.codes, weight.codes)
    assert (back.zero_points is None) is symmetric
    assert torch.equal(back.dequantize(), dense)


def section(grid: Grid, **changes: Any) -> dict[str, Any]:
    return FORMAT.config({grid: []}, []) | changes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_other_version_of_the_zero_points_is_read_too(bits: int, symmetric: bool) -> None:
    own = Grid(bits, 32, symmetric, torch.float16)
    weight = random_qtensor(own, 32, 64, seed=1)
    if weight.zero_points is not None:
        weight.zero_points.clamp_(min=1)  # v1 cannot hold 0
    tensors = dict(FORMAT.pack("m", weight))
    stored = unpack_words(tensors["m.qzeros"], bits)
    tensors["m.qzeros"] = pack_words(stored + 1 if symmetric else stored - 1, bits)
    layout = "gptq_v2" if symmetric else "gptq"
    grid = FORMAT.read_config(section(own, checkpoint_format=layout), torch.bfloat16).grid
    back = FORMAT.unpack("m", (32, 64), tensors.__getitem__, grid)
    assert back.grid == own
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_a_zero_point_that_v1_cannot_tell_from_another_is_refused() -> None:
    weight = random_qtensor(ASYMMETRIC, 32, 64, seed=1)
    assert weight.zero_points is not None
    tensors = dict(FORMAT.pack("m", weight))
    stored = weight.zero_points.clamp(min=1) - 1
    stored[3, 1] = 15
    tensors["m.qzeros"] = pack_words(stored.t(), 4)
    grid = FORMAT.read_config(section(ASYMMETRIC, checkpoint_format="gptq"), torch.bfloat16).grid
    with pytest.raises(CheckpointError, match=r"m\.qzeros: a zero point is 0 or 16"):
        FORMAT.unpack("m", (32, 64), tensors.__getitem__, grid)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_zero_points_of_the_wrong_version_are_refused(layout: str) -> None:
    # What engines load without a word and compute garbage from: raw zeros in a file that says v1, and the reverse.
    tensors = dict(FORMAT.pack("m", random_qtensor(GRID, 32, 64, 0)))
    wrong = 0x88888888 if layout == "gptq" else 0x77777777
    tensors["m.qzeros"] = torch.full_like(tensors["m.qzeros"], signed(wrong))
    grid = FORMAT.read_config(section(GRID, checkpoint_format=layout), torch.bfloat16).grid
    with pytest.raises(CheckpointError, match=r"m\.qzeros: holds the zero point [79], not 8.*checkpoint_format"):
        FORMAT.unpack("m", (32, 64), tensors.__getitem__, grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [("out of order", "though config.json says desc_act false"), ("negative", "group -1"), ("too large", "group 2")],
)
def test_inputs_of_no_group_or_out_of_order_are_named(change: str, message: str) -> None:
    tensors = dict(FORMAT.pack("m", random_qtensor(GRID, 16, 64, 0)))
    g_idx = tensors["m.g_idx"].clone()
    g_idx[[5, 40]] = g_idx[[40, 5]]
    tensors["m.g_idx"] = {"out of order": g_idx, "negative": g_idx - 1, "too large": g_idx + 2}[change]
    with pytest.raises(CheckpointError, match=rf"m\.g_idx: .*{message}"):
        FORMAT.unpack("m", (16, 64), tensors.__getitem__, GRID)


@pytest.mark.parametrize("name", ["m.qweight", "m.qzeros", "m.scales", "m.g_idx"])
@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_a_misshapen_tensor_is_named(name: str, fault: str) -> None:
    tensors = dict(FORMAT.pack("m", random_qtensor(GRID, 16, 64, 0)))
    tensors[name] = tensors[name][..., :-1] if fault == "shape" else tensors[name].to(torch.int16)
    with pytest.raises(CheckpointError, match=name):
        FORMAT.unpack("m", (16, 64), tensors.__getitem__, GRID)


def settings(**values: Any) -> GridSettings:
    """Grid settings of a recipe."""
    return GridSettings.model_validate({"bits": 4, "group_size": 128, **values})


def test_the_grid_is_symmetric_by_default_with_float16_scales() -> None:
    assert FORMAT.grid(settings(), torch.bfloat16) == Grid(4, 128, symmetric=True, scale_dtype=torch.float16)
    asymmetric = settings(bits=8, symmetric=False, group_size=-1)
    assert FORMAT.grid(asymmetric, torch.bfloat16) == Grid(8, CHANNEL, symmetric=False, scale_dtype=torch.float16)
    for bits in (5, 6, 7):
        with pytest.raises(RecipeError, match=r"grid\.bits"):
            FORMAT.grid(settings(bits=bits), torch.bfloat16)


def test_shapes_that_do_not_fit_are_explained() -> None:
    assert FORMAT.check(16, 64, GRID) is None
    assert "32 does not divide its 48 input" in str(FORMAT.check(16, 48, GRID))
    assert "12 output features are not a multiple of 8" in str(FORMAT.check(12, 64, GRID))
    assert "36 input features are not a multiple of 8" in str(
        FORMAT.check(16, 36, Grid(4, CHANNEL, True, GRID.scale_dtype))
    )
    assert FORMAT.check(12, 36, Grid(8, CHANNEL, True, GRID.scale_dtype)) is None
    three = Grid(3, CHANNEL, True, GRID.scale_dtype)
    assert "48 input features are not a multiple of 32" in str(FORMAT.check(64, 48, three))
    assert FORMAT.check(32, 96, three) is None


QUANTIZED = [
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.experts.3.gate_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.10.mlp.experts.0.up_proj",
    "model.layers.11.mlp.gate_up_proj",
]
SKIPPED = [
    "lm_head",
    "model.layers.1.mlp.gate",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp.experts.0.up_proj",
]


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        ASYMMETRIC,
        Grid(8, CHANNEL, True, torch.float16),
        Grid(2, 64, False, torch.float16),
        Grid(3, 128, True, torch.float16, act_order=True),
    ],
)
def test_the_config_round_trips_and_is_recognized(grid: Grid) -> None:
    written = FORMAT.config({grid: QUANTIZED}, SKIPPED)
    assert {key: written[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": grid.act_order,
        "lm_head": False,
    }
    assert written["checkpoint_format"] == ("gptq" if grid.symmetric else "gptq_v2")
    assert written["meta"] == {"quantizer": [f"qconv:{__version__}"]}
    assert detect({"quantization_config": written}) is FORMAT
    described = FORMAT.read_config(written, torch.bfloat16)
    read, skipped = described.grid, described.skipped
    assert read == grid
    assert [name for name in (*QUANTIZED, *SKIPPED) if FORMAT.is_skipped(name, skipped)] == SKIPPED


def engine_skips(dynamic: dict[str, Any], module: str) -> bool:
    """The rule of GPTQModel and of vLLM: a ``-:`` pattern that matches from the name's beginning."""
    return any(rule.startswith("-:") and re.match(rule[2:], module) is not None for rule in dynamic)


def test_engines_leave_alone_what_is_skipped_and_nothing_else() -> None:
    dynamic = FORMAT.config({GRID: QUANTIZED}, SKIPPED)["dynamic"]
    assert [name for name in (*QUANTIZED, *SKIPPED) if engine_skips(dynamic, name)] == SKIPPED
    # The names under which an engine looks up what it fuses.
    fused = ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.experts"]
    assert all(engine_skips(dynamic, name) for name in fused)
    assert not any(engine_skips(dynamic, name.replace("layers.", "layers.1")) for name in fused)
    assert not engine_skips(dynamic, "model.layers.1.mlp.experts.1.up_proj")


def test_more_patterns_than_re_remembers_are_matched_fast() -> None:
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(2000)]
    skipped = FORMAT.read_config(FORMAT.config({GRID: []}, names), torch.bfloat16).skipped
    assert FORMAT.is_skipped(names[-1], skipped)
    assert not FORMAT.is_skipped("model.layers.2000.mlp.gate", skipped)


def test_the_least_config_that_loaders_accept_is_read() -> None:
    least = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    described = FORMAT.read_config(least, torch.bfloat16)
    grid, skipped = described.grid, described.skipped
    assert grid == Grid(4, 128, symmetric=True, scale_dtype=torch.float16)
    assert not FORMAT.is_skipped("model.layers.0.mlp.gate", skipped)
    assert FORMAT.is_skipped("lm_head", skipped)
    skipped = FORMAT.read_config(least | {"dynamic": {r"-:.*mlp\.gate$": {}}}, torch.bfloat16).skipped
    assert FORMAT.is_skipped("model.layers.0.mlp.gate", skipped)
    assert not FORMAT.is_skipped("model.layers.0.mlp.gate_proj", skipped)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"group_size": None}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"sym": None}, "sym"),
        ({"desc_act": 1}, "desc_act"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"checkpoint_format": []}, "checkpoint_format"),
        ({"lm_head": True}, "lm_head"),
        ({"dynamic": ["-:x"]}, "dynamic"),
        ({"dynamic": {r"+:.*\.0\..*": {"bits": 8}}}, "dynamic"),
        ({"dynamic": {r".*\.0\..*": {"bits": 8}}}, "dynamic"),
        ({"dynamic": {"-:(": {}}}, "dynamic"),
    ],
)
def test_other_variants_are_refused_by_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{key}"):
        FORMAT.read_config(section(GRID, **change), torch.bfloat16)


def test_the_registry_and_the_recipe_know_it() -> None:
    assert get_format("gptq") is FORMAT
    recipe = load_recipe("gptq")
    assert recipe.format == "gptq"
    assert FORMAT.grid(recipe.grid, torch.bfloat16) == Grid(4, 128, symmetric=True, scale_dtype=torch.float16)
